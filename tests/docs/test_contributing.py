"""The worked example of CONTRIBUTING.md is a method."""

import json
import re
import sys
import types
from pathlib import Path

import pytest

from posttrain.cli.main import main
from posttrain.pipelines import pipeline
from posttrain.rollouts.table import read_table
from tests.small_demo import write


@pytest.mark.slow
def test_the_worked_example_is_a_stage_of_a_pipeline(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("shortest")
    monkeypatch.setitem(sys.modules, "shortest", module)
    exec(example, module.__dict__)
    monkeypatch.setitem(pipeline.METHODS, "shortest", (module, module.ShortestConfig))
    stages = [{"method": "shortest"}]
    assert main(["pipeline", str(write(tmp_path, stages=stages, temperature=0.8, max_tokens=100, slots=8))]) == 0
    table = read_table(tmp_path / "run" / "test")
    correct, lengths = table.rectangle("correct"), table.rectangle("completion_ids")
    best = [
        sum(ok for ok, ids in zip(row, group, strict=True) if len(ids) == min(map(len, group)))
        / sum(len(ids) == min(map(len, group)) for ids in group)
        for row, group in zip(correct, lengths, strict=True)
    ]
    arms = json.loads((tmp_path / "run" / "summary.json").read_text())["arms"]
    assert arms["shortest"]["accuracy"] == sum(best) / len(best)
    assert "shortest of 4" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "shortest" / "summary.json").is_file()

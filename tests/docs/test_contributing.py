"""The worked example of CONTRIBUTING.md is a method."""

import re
import sys
import types
from pathlib import Path

import pytest

from posttrain.config import build
from posttrain.pipelines import pipeline
from tests.small_demo import DEMO


@pytest.mark.slow
def test_the_worked_example_is_a_stage_of_a_pipeline(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("shortest")
    monkeypatch.setitem(sys.modules, "shortest", module)
    exec(example, module.__dict__)
    monkeypatch.setitem(pipeline.METHODS, "shortest", (module, module.ShortestConfig))
    values = {**DEMO, "out": str(tmp_path), "stages": [{"method": "shortest"}]}
    result = pipeline.run(build(pipeline.PipelineConfig, values), lambda _: None)
    pipeline.publish(result)
    correct, lengths = result.tables["test"].rectangle("correct"), result.tables["test"].rectangle("completion_ids")
    best = [
        sum(ok for ok, ids in zip(row, group, strict=True) if len(ids) == min(map(len, group)))
        / sum(len(ids) == min(map(len, group)) for ids in group)
        for row, group in zip(correct, lengths, strict=True)
    ]
    assert result.arms["shortest"].accuracy == sum(best) / len(best)
    assert "shortest of 4" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "shortest" / "summary.json").is_file()

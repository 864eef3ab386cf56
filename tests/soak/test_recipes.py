"""Every recipe of the embedded model and of SmolLM2, to its end, through its own launch line; the short instance: one, made small."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.pipelines.recipe import names, read
from posttrain.record import read_status
from tests.chaos import ROOT
from tests.docs.test_commands import smaller
from tests.small_models import smollm2
from tests.soak.sizes import SOAK, size

SMOLLM2 = [name for name in names() if "SmolLM2" in read(name).config.model]
TINY = [name for name in names() if read(name).config.model == "tiny"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(size(600, 6 * 3600))]


def launched(name: str, folder: Path) -> list[str]:
    """The line of a recipe's header as a command that writes into a folder."""
    words = shlex.split(read(name).line)
    words = [str(smollm2()) if word.endswith(".gguf") else word for word in words]
    if not SOAK:
        words = smaller(words, folder)
    assert words[0] == "posttrain", "one process, without a launcher"
    return [sys.executable, "-m", *words, "--out", str(folder / "run")]


def data_of(name: str, folder: Path, made: Path) -> dict[str, str]:
    """A data set that is there in one split, as SVAMP is, is divided in `made`: seven tenths to learn from, as on the hub."""
    data = read(name).config.data
    if not (folder / data / "train.jsonl").is_file():
        rows = (folder / data / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (made / data).mkdir(parents=True)
        for split, part in (("train", rows[: len(rows) * 7 // 10]), ("test", rows[len(rows) * 7 // 10 :])):
            (made / data / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")
        folder = made
    return {"POSTTRAIN_DATA": str(folder)}


@pytest.mark.parametrize("name", size(["qprobe/arithmetic"], [*TINY, *SMOLLM2]))
def test_a_recipe_runs_to_its_end(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data = data_of(name, request.getfixturevalue("data_dir"), tmp_path / "data") if name in SMOLLM2 else {}
    environment = {**os.environ, **data, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    done = subprocess.run(launched(name, tmp_path), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "run"
    arms = json.loads((out / "summary.json").read_text())["arms"]
    shown = ", ".join(f"{arm} {100 * values['accuracy']:.1f} %" for arm, values in arms.items())
    print(f"{name}: {(time.monotonic() - begun) / 60:.1f} minutes; {shown}")
    status = read_status(out)
    assert status is not None and status.state == "finished"
    assert (out / "report.html").is_file() and {"base"} < arms.keys()
    for values in arms.values():
        low, high = values["interval"]
        assert 0 <= low <= values["accuracy"] <= high <= 1 and values["tokens"] > 0

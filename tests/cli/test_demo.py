import json

import pytest

from posttrain.cli.main import main
from tests.small_demo import FAST, FULL, shrink


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def test_one_table_and_two_files(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "run"), "--seed", "1", "--fast"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for title, name in (("one sample", "base"), ("majority of 4", "majority"), ("oracle of 4", "oracle")):
        assert f"{title} " in shown and f"{100 * summary['arms'][name]['accuracy']:.1f} %" in shown
    assert "learn and choose" in shown
    assert summary["manifest"]["qprobe"]["config"]["test_prompts"] == FAST.test_prompts < FULL.test_prompts
    assert str(tmp_path / "run" / "report.html") in shown and (tmp_path / "run" / "report.html").is_file()


def test_another_seed_in_the_same_folder_is_refused(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["demo", "--out", str(tmp_path), "--seed", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"posttrain: error: seed: {tmp_path / 'train'} was collected with seed 0")


def test_an_out_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("posttrain: error: out: cannot write to")

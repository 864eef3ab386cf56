import json

import pytest

from posttrain.cli.main import main
from posttrain.record import read_metrics, read_status
from tests.small_demo import DEMO, write


@pytest.mark.slow
def test_one_table_and_two_files(tmp_path, capsys):
    path = write(tmp_path, stages=DEMO["stages"][:1])
    out = tmp_path / "other"
    assert main(["pipeline", str(path), "--out", str(out), "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    for title, name in (("one sample", "base"), ("majority of 4", "majority"), ("oracle of 4", "oracle")):
        assert f"{title} " in shown and f"{100 * summary['arms'][name]['accuracy']:.1f} %" in shown
    assert "learn and choose" in shown
    assert summary["manifest"]["config"]["seed"] == 1
    assert f"{out}/report.html" in shown and (out / "report.html").is_file()
    assert read_status(out).state == "finished" and {"train", "test", "qprobe/probe"} <= {
        row["part"] for row in read_metrics(out)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"method": "qprobe", "layers": [7]}]}, "stages[0].layers: tiny has 4 layers, got 7"),
        ({"data": "arithmetik"}, "data: no data set or file named arithmetik (did you mean arithmetic?)"),
        ({"max_tokens": 600}, "max_tokens: tiny reads 512 tokens, prompt included, got 600"),
    ],
)
def test_what_the_stages_would_refuse_is_refused_before_anything_is_sampled(tmp_path, capsys, changes, message):
    assert main(["pipeline", str(write(tmp_path, **changes))]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"posttrain: error: {message}")
    assert shown.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_pipeline_of_the_package_is_found_by_its_name(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["pipeline", "pipeline/demo", "--out", str(tmp_path / "file")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("posttrain: error: out: cannot write to")
    assert main(["pipeline", "pipeline/demos"]) == 2
    assert "no recipe or file pipeline/demos (did you mean pipeline/demo?)" in capsys.readouterr().err

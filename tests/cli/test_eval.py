import json

import pytest

from posttrain.cli import main as cli
from posttrain.models.load import TINY, load_model
from posttrain.models.value import new_value_model

needs_tiny = pytest.mark.skipif(not TINY.is_dir(), reason="the embedded model is not built yet")


def refused(capsys, *argv):
    """The one line that a wrong command prints."""
    capsys.readouterr()
    assert cli.main(["eval", *map(str, argv)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err.removeprefix("posttrain: error: ")


def test_the_presets_are_listed(capsys):
    assert cli.main(["eval", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("gsm8k_cot_8shot", "math500", "aime25", "svamp", "arithmetic"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "benchmark: name at least one"),
        (("gsm8",), "--model: missing"),
        (("gsm8", "--model", "tiny", "--out", "x"), "benchmark: no benchmark 'gsm8' (did you mean gsm8k?)"),
        (("arithmetic", "--model", "tiny"), "--out: missing"),
        (
            ("arithmetic", "--model", "tiny", "--out", "x", "--n", "4", "--k", "8"),
            "n: 4 samples per problem cannot give arithmetic pass@8",
        ),
        (("arithmetic", "--model", "tiny", "--out", "x", "--n", "0"), "n: must be between 1 and 1000, got 0"),
        (("arithmetic", "--model", "tiny", "--out", "x", "--limit", "0"), "limit: "),
        (("arithmetic", "--model", "tiny", "--out", "x", "--threads", "0"), "threads: "),
        (
            ("arithmetic", "--model", "tiny", "--out", "x", "--compare", "y"),
            "--compare: not an option of posttrain eval BENCH",
        ),
        (("arithmetic", "--model", "tiny", "--out", "x", "--lazy"), "--lazy: it is the guide's"),
        (
            ("arithmetic", "--model", "tiny", "--out", "x", "--guide", "g", "--lazy", "--beta", "0.1,1"),
            "--lazy: a sweep over several betas shows accuracy against KL",
        ),
        (
            ("arithmetic", "--model", "tiny", "--out", "x", "--guide", "g", "--lazy", "--top-p", "0.9"),
            "top_p: needs the whole guided law",
        ),
        (("report", "--n", "4"), "--n: not an option of posttrain eval report"),
        (("report",), "dir: give the folder of one evaluation"),
        (("report", "nowhere"), "dir: nowhere holds no evaluation"),
        (("grade", "nowhere"), "dir: nowhere holds no evaluation"),
        (("export", "nowhere"), "--to: missing"),
        (("overlap", "--train", "a.jsonl", "--eval", "b.jsonl"), "data: no such file: a.jsonl"),
        (("overlap", "--train", "a.jsonl"), "--eval: missing"),
        (("arithmetic", "--n", "many"), "--n: invalid int value: 'many'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *argv).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_wrong_data_and_golds_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"problem": "?", "answer": "1"}\n')
    monkeypatch.setenv("POSTTRAIN_DATA", str(tmp_path))
    out = tmp_path / "out"
    assert refused(capsys, "gsm8k", "--model", "./no-model", "--out", out).startswith(
        "data: gsm8k/test is not the data of gsm8k"
    )
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"problem": "?", "answer": "\\\\frac{1}{"}\n')
    assert refused(capsys, bad, "--model", "./no-model", "--out", out).startswith("answer: bad row '1' has the gold")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"problem": "?", "answer": "1"}\n{"problem": "?", "ans')
    assert refused(capsys, torn, "--model", "./no-model", "--out", out).startswith("data: ")


@pytest.mark.parametrize("guided", [(), ("--guide", "./no-guide", "--beta", "0.1,0.3")])
def test_a_full_folder_is_refused_before_a_model_is_loaded(tmp_path, capsys, guided):
    (tmp_path / "file").touch()
    found = refused(capsys, "arithmetic", "--model", "./no-model", "--out", tmp_path, *guided)
    assert found.startswith(f"out: {tmp_path} is not empty; --resume continues")


def test_the_folder_of_a_sweep_names_its_evaluations(tmp_path, capsys):
    for name in ("base", "qsharp-beta-0.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    found = refused(capsys, "report", tmp_path)
    assert found.startswith(
        f"dir: {tmp_path} holds 2 evaluations; give one of them: {tmp_path}/base, {tmp_path}/qsharp"
    )


def test_an_empty_folder_has_no_report(tmp_path, capsys):
    assert refused(capsys, "report", tmp_path).startswith("dir: ")


@needs_tiny
@pytest.mark.slow
def test_the_embedded_model_from_samples_to_comparison(tmp_path, capsys):
    arguments = ["arithmetic", "--model", "tiny", "--limit", 6, "--n", 2, "--threads", 1, "--device", "cpu"]
    out, other = tmp_path / "a", tmp_path / "b"
    assert cli.main(["eval", *map(str, arguments), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "<|assistant|>" in shown and "6 of 1000 problems" in shown and "report.html" in shown
    before = (out / "report.html").read_bytes()
    assert refused(capsys, *arguments, "--out", out).startswith("out: ")
    assert refused(capsys, *arguments, "--out", out, "--resume", "--seed", 1).startswith("seed: ")
    assert cli.main(["eval", *map(str, arguments), "--out", str(out), "--resume"]) == 0
    assert cli.main(["eval", "grade", str(out)]) == 0
    assert (out / "report.html").read_bytes() == before
    assert refused(capsys, *arguments, "--out", other, "--max-tokens", 510).startswith("max_tokens: arithmetic row")
    assert cli.main(["eval", *map(str, arguments), "--out", str(other), "--seed", "1"]) == 0
    assert cli.main(["eval", "report", str(out), "--compare", str(other)]) == 0
    assert "token ratio" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["comparison"]["differs"] == {"seed": [0, 1]}
    assert cli.main(["eval", "export", str(out), "--to", str(tmp_path / "log")]) == 0
    assert (tmp_path / "log" / "samples_arithmetic.jsonl").is_file()


@needs_tiny
@pytest.mark.slow
def test_a_guide_of_preferences_is_called_ipl(tmp_path, capsys):
    new_value_model(load_model("tiny"), "q", layers=1, zero_init=False, preferences=True).save_pretrained(
        tmp_path / "value"
    )
    arguments = ["arithmetic", "--model", "tiny", "--limit", "2", "--threads", "1", "--guide", str(tmp_path / "value")]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "one")]) == 0
    title = "Evaluation of tiny, guided by IPL"
    assert json.loads((tmp_path / "one" / "run.json").read_text())["settings"]["guidance"]["law"] == "ipl"
    assert title in (tmp_path / "one" / "report.html").read_text()
    assert cli.main(["eval", *arguments, "--beta", "0.3,1", "--out", str(tmp_path / "sweep")]) == 0
    assert sorted(path.name for path in (tmp_path / "sweep").glob("*beta*")) == ["ipl-beta-0.3", "ipl-beta-1.0"]
    assert "IPL, beta 0.3" in capsys.readouterr().out

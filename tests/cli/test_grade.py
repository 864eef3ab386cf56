"""`posttrain grade`."""

import io

import pytest

from posttrain.cli.main import main


def test_a_verdict_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", "1/2", "0.5"]) == 0
    assert capsys.readouterr().out == "equal\n"


def test_the_path_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    main(["grade", r"\sqrt{12}", r"so \boxed{2\sqrt3 \text{ cm}}.", "--explain"])
    out = capsys.readouterr().out
    assert "boxed: the last balanced box with content" in out
    assert "2*(3^(1/2)) [cm]" in out
    assert "decided by  structure" in out
    assert out.endswith("verdict     equal\n")


def test_a_completion_comes_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("thinking...\n#### 7\n"))
    main(["grade", "7", "-"])
    assert capsys.readouterr().out == "equal\n"


@pytest.mark.parametrize("pred", ["", "x)(", "__import__('os')", r"\frac{1}{0}", "(" * 500])
def test_nothing_makes_it_fail(capsys: pytest.CaptureFixture[str], pred: str) -> None:
    assert main(["grade", "42", pred, "--explain"]) == 0
    assert "equal" not in capsys.readouterr().out.splitlines()[-1]


def test_a_gold_that_cannot_be_read_is_not_an_answer_that_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", r"\frac{1}{", "0.5"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("posttrain: error: gold: '\\\\frac{1}{' cannot be read")
    assert main(["grade", r"\frac{1}{", r"\frac{1}{"]) == 0
    assert capsys.readouterr().out == "equal\n"


def test_a_missing_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grade", "42"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

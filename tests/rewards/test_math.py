"""The public interface, on real data where there is some."""

import json
import re
import subprocess
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import UserError
from posttrain.rewards.math import Grade, canonical, equal, extract_answer, grade, readable
from posttrain.rewards.pool import grade_in_pool, worth_sharing


def rows(data_dir: Path, name: str) -> list[dict[str, Any]]:
    path = data_dir / name
    if not path.is_file():
        pytest.skip(f"no {name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_extract_answer() -> None:
    assert extract_answer(r"so \boxed{42}") == "42"
    assert extract_answer("no") is None


def test_equal_takes_keywords_only() -> None:
    assert equal(gold="1/2", pred="0.5") == "equal"
    with pytest.raises(TypeError):
        equal("1/2", "0.5")  # type: ignore[misc]


def test_grade() -> None:
    found = grade(completions=[r"\boxed{0.5}", r"\boxed{2}", "hm"], golds=["1/2"] * 3)
    assert found == [Grade("equal", "0.5", "boxed"), Grade("different", "2", "boxed"), Grade("no_answer", None, "none")]
    assert [g.correct for g in found] == [True, False, False]


@pytest.mark.parametrize("gold", ["42", r"\text{Evelyn}", r"\left[-2, 7\right)", "52_8", r"11,\! 111", r"\text{(C)}"])
def test_an_answer_is_readable(gold: str) -> None:
    assert readable(gold)


@pytest.mark.parametrize("gold", ["", r"\frac{1}{", "1 + * 2", r"\boxed{", "{" * 200, "9" * 5_000])
def test_what_is_no_answer_is_not_readable(gold: str) -> None:
    assert not readable(gold)


def test_an_empty_batch_has_no_grades() -> None:
    assert grade(completions=[], golds=[]) == []


def test_lengths_must_agree() -> None:
    with pytest.raises(UserError, match="golds: 1 for 2 completions"):
        grade(completions=["1", "2"], golds=["1"])


PAIRS = [(rf"so \boxed{{{i}}}", str(i if i % 3 else i + 1)) for i in range(700)] + [
    ("", "1"),
    (r"\boxed{\sqrt8}", r"2\sqrt2"),
]


def test_a_pool_gives_the_same_grades() -> None:
    here = grade(completions=[p[0] for p in PAIRS], golds=[p[1] for p in PAIRS])
    assert grade_in_pool(PAIRS, workers=2) == here


def test_a_pool_works_off_the_main_thread_and_leaves_no_process() -> None:
    found: list[Grade] = []
    thread = threading.Thread(target=lambda: found.extend(grade_in_pool(PAIRS, workers=2)))
    thread.start()
    thread.join()
    assert len(found) == len(PAIRS)
    assert not children("posttrain.rewards.worker grade")


def test_a_dead_child_costs_one_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rewards.pool.CHUNK", 10)
    monkeypatch.setattr("posttrain.rewards.pool._Child", DyingChild)
    found = grade_in_pool([(r"\boxed{1}", "1")] * 15 + [("die", "1")] + [(r"\boxed{1}", "1")] * 4, workers=2)
    assert [i for i, g in enumerate(found) if not g.correct] == [15]
    assert found[15].verdict == "timeout"


class DyingChild:
    """A child that dies of one completion."""

    def grade(self, pairs: list[tuple[str, str]], seconds: int) -> list[Grade] | None:
        return (
            None
            if any(completion == "die" for completion, _ in pairs)
            else [Grade("equal", "1", "boxed") for _ in pairs]
        )

    def close(self) -> None:
        pass


def test_only_long_work_is_shared() -> None:
    assert worth_sharing(done=0, seconds=0.0, left=10_000) == 0
    assert worth_sharing(done=64, seconds=0.001, left=10_000_000) == 0
    assert worth_sharing(done=5_000, seconds=0.6, left=5_000) == 0


def children(command: str) -> list[str]:
    """This process's children, running or not, whose command line has these words, and all zombies."""
    import os

    listing = subprocess.run(
        ["ps", "-o", "stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return [line for line in listing.stdout.splitlines() if command in line or line.startswith("Z")]


@pytest.mark.parametrize(
    "spellings",
    [
        ["0.50", "1/2", r"\frac{1}{2}", r"$\dfrac12$", "x = 0.5", r"\frac{\sqrt{1}}{2}", "0.5 cm"],
        [r"2\sqrt{3}", r"\sqrt{12}", r"\frac{6}{\sqrt3}"],
        ["(x+1)^2", "x^2+2x+1"],
        [r"\pm 3", "3, -3", r"\{-3, 3\}", "-3 and 3"],
        [r"(-\infty, 2)", "x < 2", r"x \in (-\infty, 2)"],
        [r"\text{East}", "east"],
        ["52_8", "52_{8}"],
        [r"\sqrt{-4}", "2i"],
        [r"\frac{1+i\sqrt3}{2}", r"e^{i\pi/3}"],
        [r"\sqrt2", r"(10^{100}+\sqrt2)-10^{100}"],
        [r"\sqrt8, 3, 2\sqrt2", r"3, \sqrt8, \sqrt8"],
    ],
)
def test_spellings_of_one_answer_vote_together(spellings: list[str]) -> None:
    assert len({canonical(text) for text in spellings}) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", "1/3"),
        ("0.333", "1/3"),
        ("x", "y"),
        ("(1,2)", "(2,1)"),
        ("[0,1)", "[0,1]"),
        ("3.14", r"\pi"),
        (r"\sqrt8, \sqrt8, 3", r"\sqrt8, 3, 3"),
        (r"(10^{100}+\sqrt2)-10^{100}", r"(10^{100}+\sqrt3)-10^{100}"),
    ],
)
def test_different_answers_vote_apart(a: str, b: str) -> None:
    assert canonical(a) != canonical(b)


# -- on the data sets


def test_labelled_cases(data_dir: Path) -> None:
    cases = rows(data_dir, "grader_dev/cases.jsonl")
    said = [
        equal(gold=c["gold"], pred=c["pred"]) == "equal"
        if c["kind"] == "pair"
        else grade(completions=[c["completion"]], golds=[c["gold"]])[0].correct
        for c in cases
    ]
    wrong = [c["id"] for c, s in zip(cases, said, strict=True) if s != c["equal"]]
    accepted = [c["id"] for c, s in zip(cases, said, strict=True) if s and not c["equal"]]
    assert len(wrong) <= 0.03 * len(cases), wrong
    assert len(accepted) <= 0.01 * len(cases), accepted


def math_golds(data_dir: Path) -> list[str]:
    return sorted({row["answer"] for split in ("train", "test") for row in rows(data_dir, f"math/{split}.jsonl")})


@pytest.mark.slow
def test_every_gold_is_read_and_equals_itself(data_dir: Path) -> None:
    golds = math_golds(data_dir)
    assert [g for g in golds if not readable(g)] == []
    grades = grade(completions=[rf"so $\boxed{{{g}}}$." for g in golds], golds=golds)
    assert [g for g, found in zip(golds, grades, strict=True) if not found.correct] == []


@pytest.mark.slow
@pytest.mark.parametrize("respelt", [r"\({}\).", r"\dfrac{{2({})}}{{2}}"])
def test_every_gold_equals_itself_in_another_spelling(data_dir: Path, respelt: str) -> None:
    golds = math_golds(data_dir)
    if "frac" in respelt:  # of plain values only: what has a bracket, a comma, a relation or words cannot be doubled
        golds = [
            g
            for g in golds
            if re.fullmatch(r"[-+\d./{}^!\s]*(?:\\(?:d?frac|sqrt|pi|cdot|binom)[-+\d./{}^!\s]*)*", g.rstrip("."))
        ]
        golds = [g for g in golds if not g.endswith(".")]
        assert len(golds) > 1_000
    assert [g for g in golds if equal(gold=g, pred=respelt.format(g)) != "equal"] == []


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1, 17, 501, 2500])
def test_shifted_golds_are_wrong_unless_equal(data_dir: Path, shift: int) -> None:
    golds = [row["answer"] for row in rows(data_dir, "math/test.jsonl")]
    shifted = golds[shift:] + golds[:shift]
    accepted = [(a, b) for a, b in zip(golds, shifted, strict=True) if equal(gold=a, pred=b) == "equal"]
    assert [pair for pair in accepted if bare(pair[0]) != bare(pair[1])] == []
    assert [pair for pair in accepted if canonical(pair[0]) != canonical(pair[1])] == []
    assert 20 < len(accepted) < 60


def bare(answer: str) -> Fraction | str:
    """What is left of an answer without units and bases, as a number if it is one; the grader has no part in it."""
    text = re.sub(r"\\text\s*\{[^}]*\}|\^\{?\\circ\}?|\\[%$;!,]|_\{?\d+\}?|[\s{}]", "", answer)
    text = re.sub(r"^\\d?frac(\d)(\d)$", r"\1/\2", text)
    try:
        return Fraction(text)
    except ValueError:
        return text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500/test.jsonl", "math/test.jsonl"])
def test_reference_solutions_in_a_box_are_right(data_dir: Path, name: str) -> None:
    problems = rows(data_dir, name)
    grades = grade(completions=[p["solution"] for p in problems], golds=[p["answer"] for p in problems])
    assert [p["id"] for p, g in zip(problems, grades, strict=True) if not g.correct] == []


@pytest.mark.slow
def test_reference_solutions_after_hashes_are_right(data_dir: Path) -> None:
    problems = rows(data_dir, "gsm8k/test.jsonl")
    completions = [f"{p['solution']}\n#### {p['answer_raw']}" for p in problems]
    assert all(g.correct for g in grade(completions=completions, golds=[p["answer"] for p in problems]))

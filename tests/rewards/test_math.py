import json

import pytest

from posttrain.rewards.math import equal, extract_answer, grade
from tests.rewards.families import DIFFERENT, EQUAL


@pytest.mark.parametrize("family", sorted(EQUAL))
def test_equal_answers(family):
    wrong = [(gold, pred) for gold, pred in EQUAL[family] if equal(gold=gold, pred=pred) != "equal"]
    assert not wrong


@pytest.mark.parametrize("family", sorted(DIFFERENT))
def test_different_answers(family):
    wrong = [(gold, pred) for gold, pred in DIFFERENT[family] if equal(gold=gold, pred=pred) == "equal"]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"First \boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("23+48=(1c)71;71-17=(4c)54;#### 54", "54"),
        ("The answer is 7.", "7"),
        (r"<think>\boxed{3}</think> The answer is 4.", "4"),
        (r"<think> it may be \boxed{3}", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_grades_carry_answer_and_verdict():
    grades = grade(completions=["#### 1,000", "#### 999", "no idea"], golds=["1000", "1000", "1000"])
    assert [g.verdict for g in grades] == ["equal", "different", "no_answer"]
    assert [g.correct for g in grades] == [True, False, False]
    assert grades[2].answer is None


@pytest.mark.parametrize(
    "pred",
    [
        "9**9**9",
        "__import__('os').system('true')",
        "{" * 5000,
        "\\frac" * 2000,
        "9" * 5000,
        "((((" * 3000,
        "1" + "!" * 50,
    ],
)
def test_hostile_answers_are_never_right_and_never_raise(pred):
    assert equal(gold="3", pred=pred) != "equal"


def test_the_development_set(data_dir):
    cases = [json.loads(line) for line in (data_dir / "grader_dev" / "cases.jsonl").read_text().splitlines()]
    accepted = []
    for case in cases:
        if case["kind"] == "pair":
            verdict = equal(gold=case["gold"], pred=case["pred"])
        else:
            verdict = grade(completions=[case["completion"]], golds=[case["gold"]])[0].verdict
        accepted.append(verdict == "equal")
    right = sum(a == case["equal"] for a, case in zip(accepted, cases, strict=True))
    false_accepts = sum(a and not case["equal"] for a, case in zip(accepted, cases, strict=True))
    assert right >= 0.97 * len(cases) and false_accepts <= 0.01 * len(cases)

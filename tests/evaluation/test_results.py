import json

import numpy as np
import pytest

from posttrain.evaluation.benchmarks import Benchmark
from posttrain.evaluation.results import Result, curve_scores, intervals, load_results, metric_scores, summarise, tally


def result_of(verdicts, votes=None, rows=None, confidence=(), finish=None, lm_eval=None, **fields):
    """A result by its verdicts, "=" for equal and "-" for different: one string per problem."""
    names = {"=": "equal", "-": "different", "0": "no_answer", "!": "error"}
    graded = [[names[letter] for letter in group] for group in verdicts]
    n = len(graded[0])
    rows = rows or [{} for _ in graded]
    entry = {"rows": len(graded), "data_rows": len(graded), "data_sha256": "d", **fields.pop("entry", {})}
    return Result(
        benchmark=Benchmark("mine", "mine.jsonl", n=n, **fields),
        manifest=entry,
        rows=[{"id": str(i), "problem": "?", "answer": "1", "rendered": "?", **row} for i, row in enumerate(rows)],
        completions=[["text"] * n for _ in graded],
        verdicts=graded,
        extracted=[[None if verdict == "no_answer" else "1" for verdict in group] for group in graded],
        rules=[["boxed"] * n for _ in graded],
        votes=votes or [["1" if verdict == "equal" else "2" for verdict in group] for group in graded],
        tokens=[[10 * (i + 1)] * n for i in range(len(graded))],
        finish_reasons=finish or [["stop"] * n for _ in graded],
        stops=[[None] * n for _ in graded],
        confidence=list(confidence),
        lm_eval=lm_eval or {},
    )


def values(summary):
    return {name: round(found["value"], 6) for name, found in summary["metrics"].items()}


def test_the_metrics_are_those_of_their_definitions():
    found = values(summarise(result_of(["==--", "=---", "----"])))
    assert found["pass@1"] == round((2 / 4 + 1 / 4) / 3, 6)
    assert found["pass@2"] == round((1 - 1 / 6 + 1 - 3 / 6) / 3, 6)
    assert found["pass@4"] == round(2 / 3, 6)
    assert found["maj@4"] == round((1 / 2) / 3, 6)  # a tie of two and two is shared
    assert found["worst@4"] == 0


def test_spellings_of_one_answer_vote_together(tmp_path, evaluated):
    votes = [["1/2", "1/2", "7", "9"]]
    assert values(summarise(result_of(["==--"], votes=votes)))["maj@4"] == 1


def test_best_of_n_needs_scores():
    with_scores = values(summarise(result_of(["-=", "=-"], confidence=[[-1.0, -0.1], [-1.0, -0.1]])))
    assert with_scores["best-of-2 (mean log-prob)"] == 0.5
    assert not any("mean log-prob" in name for name in values(summarise(result_of(["-=", "=-"]))))


def test_one_sample_per_problem_has_no_curves():
    summary = summarise(result_of(["="] * 9 + ["-"]))
    assert list(summary["metrics"]) == ["pass@1"] and summary["curves"] == {}
    assert summary["metrics"]["pass@1"]["low"] == pytest.approx(0.5958, abs=1e-4)  # Wilson
    assert summary["standard_error"]["within"] is None


def test_one_problem_is_all_uncertainty_and_still_json():
    text = json.dumps(summarise(result_of(["=-"])), allow_nan=False)
    assert json.loads(text)["standard_error"]["se"] is None


def test_intervals_of_curves_hold_where_nothing_varies():
    low, high = intervals(np.array([[0.0, 0.5, 1.0]] * 10))
    assert low[0] == 0 < high[0] and low[2] < 1 == high[2]
    assert low[1] < 0.5 < high[1]


def test_every_interval_holds_its_value():
    chance = np.random.default_rng(0)
    result = result_of(["".join(chance.choice(["=", "-"], 6)) for _ in range(20)])
    summary = summarise(result)
    for found in summary["metrics"].values():
        assert found["low"] <= found["value"] <= found["high"]
    curve = summary["curves"]["pass@k"]
    assert len(curve["value"]) == 6 and curve["value"] == sorted(curve["value"])
    assert values(summary)["pass@4"] == round(curve["value"][3], 6)


def test_k_chooses_what_tables_show():
    result = result_of(["==--"], k=(3,))
    assert [name for name in metric_scores(result, curve_scores(result)) if name.startswith("pass@")] == [
        "pass@1",
        "pass@3",
        "pass@4",
    ]


def test_shares_and_counts():
    summary = summarise(result_of(["=-", "0!"], finish=[["stop", "length"], ["length", "stop"]]))
    assert summary["shares"] == {
        "truncation": 0.5,
        "answer_found": 0.75,
        "grader_error": 0.25,
        "accuracy_finished": 0.5,
    }
    assert summary["verdicts"] == {"different": 1, "equal": 1, "error": 1, "no_answer": 1}
    assert summary["tokens"]["mean"] == 15 and summary["tokens"]["p95"] == 20
    assert len(summary["warnings"]) == 2


def test_the_breakdown_is_by_every_field_that_varies():
    rows = [{"level": 2, "subject": "A"}, {"level": 1, "subject": "A"}, {"level": None, "subject": "A"}]
    found = summarise(result_of(["==", "=-", "--"], rows=rows))["breakdown"]
    assert list(found) == ["level"]
    assert [(group["value"], group["problems"], group["pass@1"]) for group in found["level"]] == [
        (1, 1, 0.5),
        (2, 1, 1.0),
    ]


def test_a_breakdown_by_a_list_is_by_its_text():
    rows = [{"type": ["algebra"]}, {"type": ["algebra", "sums"]}, {"type": "sums"}]
    found = summarise(result_of(["==", "=-", "--"], rows=rows))["breakdown"]["type"]
    assert [group["value"] for group in found] == ['["algebra", "sums"]', '["algebra"]', "sums"]


def test_warnings_name_other_data_and_subsets():
    warned = summarise(result_of(["="], sha256="e" * 64, entry={"data_rows": 9}))["warnings"]
    assert len(warned) == 2 and "1 of 9 problems" in warned[0] and "--any-data" in warned[1]


def test_what_is_loaded_is_what_was_graded(evaluated):
    _, (result,) = load_results(evaluated())
    assert len(result.rows) == 12 and all(len(group) == 4 for group in result.verdicts)
    assert 0 < result.accuracy.mean() < 1
    right = [(vote, row["answer"]) for row, group, votes in zip(result.rows, result.verdicts, result.votes, strict=True)
             for verdict, vote in zip(group, votes, strict=True) if verdict == "equal"]  # fmt: skip
    assert right and all(vote == gold for vote, gold in right)
    assert all(value < 0 for group in result.confidence for value in group)


def test_tally_orders_by_count():
    assert tally([["b", "a"], ["a", None]]) == {"a": 2, "b": 1, "none": 1}

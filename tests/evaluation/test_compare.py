import json

import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.evaluation.compare import compare, within
from posttrain.evaluation.harness import evaluate
from posttrain.evaluation.harness_report import write_reports
from posttrain.evaluation.results import load_results
from tests.evaluation.stand_ins import adder, tasks_of, write_data
from tests.evaluation.test_results import result_of


def run_of(*results, **settings):
    benchmarks = {
        result.benchmark.name: {**result.manifest, "benchmark": {"n": result.benchmark.n}} for result in results
    }
    run = {"model": "m", "fingerprint": "f", "context": 9, "seed": 0, "settings": {}, "versions": {}, **settings}
    return {**run, "benchmarks": benchmarks}, list(results)


def test_differences_are_paired_by_problem():
    better, worse = result_of(["==", "==", "=-", "--"] * 5), result_of(["=-", "==", "--", "--"] * 5)
    found = compare(run_of(better), run_of(worse))["benchmarks"]["mine"]
    score = found["metrics"]["pass@1"]
    assert (score["run"], score["baseline"], score["difference"]) == (0.625, 0.375, 0.25)
    assert 0 < score["low"] < 0.25 < score["high"] and score["p_value"] < 0.01 and score["detectable"] > 0
    assert found["problems"] == 20 and found["tokens"]["ratio"] == 1


def test_a_run_against_itself_differs_by_nothing():
    run = run_of(result_of(["=-", "--", "=="]))
    found = compare(run, run)
    assert found["differs"] == {}
    score = found["benchmarks"]["mine"]["metrics"]["pass@1"]
    assert score["difference"] == 0 and score["p_value"] == 1 and score["detectable"] is None


def test_only_shared_problems_count_whatever_their_order():
    ours = result_of(["=", "-", "="], rows=[{"id": "a"}, {"id": "b"}, {"id": "c"}])
    theirs = result_of(["-", "=", "="], rows=[{"id": "c"}, {"id": "a"}, {"id": "x"}])
    found = compare(run_of(ours), run_of(theirs))["benchmarks"]["mine"]
    assert (found["problems"], found["only_in_run"], found["only_in_baseline"]) == (2, 1, 1)
    assert found["metrics"]["pass@1"]["difference"] == 0.5


def test_a_problem_with_another_gold_is_another_problem():
    ours, theirs = result_of(["="]), result_of(["="], rows=[{"answer": "2"}])
    with pytest.raises(UserError, match="^compare: mine has no problem in common"):
        compare(run_of(ours), run_of(theirs))


def test_evaluations_without_a_common_benchmark_are_refused():
    other = result_of(["="])
    other.benchmark.__dict__["name"] = "other"
    with pytest.raises(UserError, match="^compare: the two evaluations share no benchmark"):
        compare(run_of(result_of(["="])), run_of(other))


def test_settings_that_differ_are_named():
    found = compare(run_of(result_of(["=-"]), seed=1), run_of(result_of(["=-"]), model="n"))
    assert found["differs"] == {"model": ["m", "n"], "seed": [1, 0]}


@pytest.mark.slow
def test_the_report_shows_the_comparison(evaluated, tmp_path, data):
    ours, theirs = evaluated("a", seed=1), evaluated("b", temperature=0.3)
    write_reports(ours, theirs, say=lambda _: None)
    comparison = json.loads((ours / "report.json").read_text())["comparison"]
    assert (
        comparison["differs"]["sums.temperature"] == [0.6, 0.3] and comparison["benchmarks"]["sums"]["problems"] == 12
    )
    for name in ("report.md", "report.html"):
        text = (ours / name).read_text()
        assert "Against adder" in text and "accuracy within b tokens" in text
    budgets = comparison["benchmarks"]["sums"]["budgets"]
    assert len(budgets) > 3 and all(
        f"| sums | {point['tokens']} |" in (ours / "report.md").read_text() for point in budgets
    )
    assert "token budget b" in (ours / "report.html").read_text()


def with_tokens(verdicts, tokens):
    result = result_of(verdicts)
    result.__dict__["tokens"] = tokens
    return result


def test_the_token_ratio_is_paired_by_problem():
    """Lengths spread tenfold over the problems, and are halved in each: the interval knows, unpaired it would be wide."""
    lengths = [[10 * (i + 1)] * 2 for i in range(20)]
    noisy = [[5 * (i + 1) + i % 3, 5 * (i + 1) - i % 2] for i in range(20)]
    found = compare(run_of(with_tokens(["=="] * 20, noisy)), run_of(with_tokens(["=="] * 20, lengths)))
    tokens = found["benchmarks"]["mine"]["tokens"]
    assert tokens["ratio"] == pytest.approx(np.mean(noisy) / np.mean(lengths))
    assert 0.49 < tokens["ratio_low"] < tokens["ratio"] < tokens["ratio_high"] < 0.52
    assert tokens["low"] < tokens["difference"] < tokens["high"] < 0


def test_endpoints_may_count_no_tokens():
    some, none = with_tokens(["=="] * 2, [[0, 0], [5, 7]]), with_tokens(["=="] * 2, [[0, 0], [0, 0]])
    assert compare(run_of(some), run_of(some))["benchmarks"]["mine"]["tokens"]["ratio"] == 1
    assert compare(run_of(some), run_of(none))["benchmarks"]["mine"]["tokens"]["ratio"] is None


def test_accuracy_within_budgets_is_what_counting_gives():
    rng = np.random.default_rng(0)
    runs = []
    for share in (0.6, 0.5):
        verdicts = ["".join(rng.choice(["=", "-"], 3, p=[share, 1 - share])) for _ in range(15)]
        runs.append((verdicts, rng.integers(1, 90, (15, 3)).tolist()))
    ours, theirs = (with_tokens(*run) for run in runs)
    entry = compare(run_of(ours), run_of(theirs))["benchmarks"]["mine"]
    budgets = [point["tokens"] for point in entry["budgets"]]
    lengths = sorted(length for _, tokens in runs for group in tokens for length in group)
    assert budgets == [lengths[9 * (i + 1) - 1] for i in range(10)]
    for point in entry["budgets"]:
        shares = []
        for verdicts, tokens in runs:
            right = 0
            for group, own in zip(verdicts, tokens, strict=True):
                for letter, length in zip(group, own, strict=True):
                    right += letter == "=" and length <= point["tokens"]
            shares.append(right / 45)
        assert [point["run"], point["baseline"]] == pytest.approx(shares)
        assert point["difference"] == pytest.approx(shares[0] - shares[1])
        assert point["difference_low"] <= point["difference"] <= point["difference_high"]
        assert 0 <= point["run_low"] <= point["run"] <= point["run_high"] <= 1
    last, score = entry["budgets"][-1], entry["metrics"]["pass@1"]
    assert [last[name] for name in ("run", "baseline", "difference")] == pytest.approx(
        [score[name] for name in ("run", "baseline", "difference")]
    )


def test_budgets_count_shared_problems_only():
    rows = [{"id": name} for name in "abc"]
    ours, theirs = result_of(["=", "=", "-"], rows=rows), result_of(["=", "-", "="], rows=[{"id": x} for x in "xab"])
    found = compare(run_of(ours), run_of(theirs))["benchmarks"]["mine"]["budgets"]
    assert [(point["tokens"], point["run"], point["baseline"]) for point in found] == [
        (10, 0.5, 0),
        (20, 1, 0),
        (30, 1, 0.5),
    ]


def test_one_token_more_than_the_budget_is_wrong():
    result = with_tokens(["==-", "=--"], [[7, 8, 3], [8, 1, 1]])
    assert within(result, 7).tolist() == [1 / 3, 0] and within(result, 8).tolist() == [2 / 3, 1 / 3]


def test_one_problem_has_no_interval():
    found = compare(run_of(result_of(["=-"])), run_of(result_of(["--"])))["benchmarks"]["mine"]
    assert (found["tokens"]["ratio_low"], found["tokens"]["ratio_high"]) == (0, None)
    assert found["budgets"][-1]["difference_low"] is None


def test_a_subset_is_compared_with_the_whole(evaluated, tmp_path, data):
    whole = load_results(evaluated("whole"))
    few = write_data(tmp_path / "few" / "sums.jsonl", 5) if (tmp_path / "few").mkdir() is None else None
    evaluate(tasks_of(few), adder(), tmp_path / "part", say=lambda _: None)
    found = compare(load_results(tmp_path / "part"), whole)["benchmarks"]["sums"]
    assert found["problems"] == 5 and found["metrics"]["pass@1"]["difference"] == 0

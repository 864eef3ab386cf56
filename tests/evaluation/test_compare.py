import json

import pytest

from posttrain.errors import UserError
from posttrain.evaluation.compare import compare
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


def test_the_report_shows_the_comparison(evaluated, tmp_path, data):
    ours, theirs = evaluated("a", seed=1), evaluated("b", temperature=0.3)
    write_reports(ours, theirs, say=lambda _: None)
    comparison = json.loads((ours / "report.json").read_text())["comparison"]
    assert (
        comparison["differs"]["sums.temperature"] == [0.6, 0.3] and comparison["benchmarks"]["sums"]["problems"] == 12
    )
    for name in ("report.md", "report.html"):
        assert "Against adder" in (ours / name).read_text()


def test_a_subset_is_compared_with_the_whole(evaluated, tmp_path, data):
    whole = load_results(evaluated("whole"))
    few = write_data(tmp_path / "few" / "sums.jsonl", 5) if (tmp_path / "few").mkdir() is None else None
    evaluate(tasks_of(few), adder(), tmp_path / "part", say=lambda _: None)
    found = compare(load_results(tmp_path / "part"), whole)["benchmarks"]["sums"]
    assert found["problems"] == 5 and found["metrics"]["pass@1"]["difference"] == 0

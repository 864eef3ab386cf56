import json

import pytest

from posttrain.errors import UserError
from posttrain.evaluation.harness import evaluate
from posttrain.evaluation.lm_eval_export import export
from tests.evaluation.stand_ins import adder, tasks_of

FIELDS = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash",
}  # fmt: skip  # of lm-eval 0.4.13's sample log


@pytest.fixture
def log(tmp_path, data):
    tasks = tasks_of(
        data, lm_eval="gsm8k_cot", chat=False, prompt="Q: {problem}\nA:", stop=("Q:",), n=1, temperature=0.0
    )
    evaluate(tasks, adder(), tmp_path / "run", say=lambda _: None)
    (path,) = export(tmp_path / "run", tmp_path / "log")
    assert path.name == "samples_gsm8k_cot.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_has_lm_eval_s_fields(log):
    assert len(log) == 12 * 3
    for line in log:
        assert set(line) == FIELDS | set(line["metrics"]) and line["metrics"] == ["exact_match"]
    assert [line["filter"] for line in log[:3]] == ["strict-match", "flexible-extract", "posttrain"]


def test_prompts_and_completions_are_those_that_were_sampled(log):
    first = log[0]
    assert first["arguments"]["gen_args_0"]["arg_0"] == "Q: 0+0=?\nA:"
    assert first["arguments"]["gen_args_0"]["arg_1"]["until"] == ["Q:"]
    assert first["target"] == "0" and first["doc"]["problem"] == "0+0=?"
    assert "Q:" not in first["resps"][0][0]


def test_scores_follow_the_filters(log):
    for line in log:
        if line["filter"] == "strict-match":
            assert line["exact_match"] == float(line["filtered_resps"][0].rstrip(".") == line["target"])
    assert {line["exact_match"] for line in log} == {0.0, 1.0}


def test_a_benchmark_without_a_task_has_our_grades(evaluated, tmp_path):
    (path,) = export(evaluated(), tmp_path / "log")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "samples_sums.jsonl" and {line["filter"] for line in lines} == {"posttrain"}
    assert all(len(line["resps"][0]) == len(line["filtered_resps"]) == 4 for line in lines)


def test_a_file_in_the_way_is_refused(evaluated, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^to: "):
        export(evaluated(), tmp_path / "file")

"""From names to a graded table and its page."""

import json
import re

import pytest

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.pipelines import rollout as pipeline
from posttrain.pipelines.rollout import RolloutConfig, figures_of, publish, rollout
from posttrain.rollouts.engine import Sampling

PLAIN = {"prompt": "{problem}", "sampling": Sampling(max_tokens=40), "shard_prompts": 2}


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu")


def collected(policy, out, resume=False, **changes):
    """(the table of a few sums, what was said)"""
    config = RolloutConfig("arithmetic", **{**PLAIN, "limit": 4, "samples": 2, **changes})
    said = []
    return rollout(policy, config, config.rows(), out, resume, said.append), said


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("samples", {"samples": 0}),
        ("samples", {"samples": 1001}),
        ("slots", {"slots": 0}),
        ("shard_prompts", {"shard_prompts": 0}),
        ("prompt", {"prompt": "no placeholder"}),
    ],
)
def test_settings_out_of_range(field, changes):
    with pytest.raises(UserError, match=f"^{field}: "):
        RolloutConfig("arithmetic", **changes)


def test_the_first_prompt_is_shown_as_the_model_sees_it(policy, tmp_path):
    table, said = collected(policy, tmp_path)
    first = table.column("prompt_ids")[0]
    assert said == [
        f"prompt of row {table.column('prompt_id')[0]!r}, {len(first)} tokens, as the model sees it:",
        policy.tokenizer.decode(first),
    ]


def test_what_cannot_be_sampled_is_refused_before_anything_is_shown(policy, tmp_path, capfd):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"problem": "1+" * 4000, "answer": "1"}) + "\n")
    config = RolloutConfig(str(data), **PLAIN)
    said = []
    with pytest.raises(UserError, match="^prompt: row '1' has 8002 tokens, the model's context is 512"):
        rollout(policy, config, config.rows(), tmp_path / "t", False, said.append)
    assert said == [] and capfd.readouterr().err == ""


def test_figures_are_those_of_the_table(policy, tmp_path):
    table, _ = collected(policy, tmp_path)
    figures, tokens = figures_of(table), [len(ids) for ids in table.column("completion_ids")]
    assert (figures["prompts"], figures["completions"]) == ("4", "8")
    assert figures["accuracy"] == f"{sum(table.column('correct')) / 8:.3f}"
    assert figures["truncated"] == f"{table.column('finish_reason').count('length') / 8:.3f}"
    assert figures["tokens, mean"] == f"{sum(tokens) / 8:.1f}"


@pytest.mark.parametrize(("samples", "figures"), [(1, 1), (2, 2)])
def test_the_page_has_a_curve_where_there_is_more_than_one_sample(policy, tmp_path, samples, figures):
    table, _ = collected(policy, tmp_path, samples=samples)
    page = publish(table).read_text()
    assert page.count("<svg") == figures and ("majority" in page) == (samples > 1)
    assert table.column("verdict")[0] in page and "tiny on arithmetic/test" in page


def test_all_that_differs_on_resume_is_named(policy, tmp_path):
    collected(policy, tmp_path)
    with pytest.raises(UserError, match=re.escape("seed: ") + ".* with seed 0, not 1; resume with the same"):
        collected(policy, tmp_path, resume=True, sampling=Sampling(max_tokens=40, seed=1))
    with pytest.raises(UserError, match="^samples: .* with samples 2, not 3; temperature 1.0, not 0.5; resume"):
        collected(policy, tmp_path, resume=True, samples=3, sampling=Sampling(0.5, max_tokens=40))


def test_a_table_of_another_grader_is_named_when_finished_and_not_continued_when_not(policy, tmp_path, monkeypatch):
    collected(policy, tmp_path)
    monkeypatch.setattr(pipeline, "grader_fingerprint", lambda: "another grader")
    _, said = collected(policy, tmp_path, resume=True)
    assert "graded by another version of the grader" in said[-1]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["shards"]["shard-00001.parquet"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="^grader: .*'another grader'"):
        collected(policy, tmp_path, resume=True)


@pytest.mark.parametrize("beta", [0.0, 1e-50, float("inf"), float("nan")])
def test_beta_is_a_number_that_a_manifest_can_hold(beta):
    with pytest.raises(UserError, match="beta: must be at least 1e-09 and finite"):
        RolloutConfig("arithmetic", beta=beta)

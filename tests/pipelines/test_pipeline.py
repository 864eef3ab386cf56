"""The demo's pipeline, on a handful of problems."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.config import build
from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec
from posttrain.models.load import load_model, load_tokenizer
from posttrain.models.probe import Probe, ProbeCard
from posttrain.pipelines import grpo_lambda
from posttrain.pipelines import pipeline as module
from posttrain.pipelines.pipeline import PipelineConfig, named_files, stages_of
from posttrain.pipelines.qsharp import QSharpConfig
from posttrain.pipelines.value_training import ValueTraining
from posttrain.record import begin, log, read_metrics, recording
from posttrain.rollouts.table import read_table
from tests.small_demo import DEMO

ARMS = (
    *("base", "majority", "oracle", "qprobe", "qsharp", "qsharp_2", "cd", "qsharp_best", "qsharp_vote"),
    *("dqo", "rejection", "grpo", "plain", "grpo_lambda"),
)


def small(out: Path, **changes) -> PipelineConfig:
    return build(PipelineConfig, {"out": str(out), **DEMO, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(its folder, what it returned, what it said)"""
    out, said = tmp_path_factory.mktemp("demo") / "run", []
    result = module.run(small(out), said.append)
    module.publish(result)
    return out, result, said


@pytest.mark.slow
def test_the_summary_and_the_report_are_written(finished):
    out, result, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["arms", "comparisons", "frontier", "manifest"]
    assert tuple(summary["arms"]) == ARMS
    for name, arm in summary["arms"].items():
        assert {"accuracy", "interval", "tokens", "seconds"} <= set(arm)
        assert arm["accuracy"] == result.arms[name].accuracy
        if name != "base":
            difference = summary["comparisons"][f"{name} - base"]["difference"]
            assert difference == pytest.approx(arm["accuracy"] - summary["arms"]["base"]["accuracy"])
    assert [(point["law"], point["beta"]) for point in summary["frontier"]["qsharp"]][2:] == [
        *(("Q#", 0.3), ("CD", 0.3), ("Q#", 1.0), ("CD", 1.0))
    ]
    page = (out / "report.html").read_text()
    assert "a small demo" in page and "What it does" in page and page.count("<svg") == 9
    assert all(arm.title in page for arm in result.arms.values())
    assert "chosen" in page  # by the probe


@pytest.mark.slow
def test_the_snippet_of_the_readme_runs_as_it_stands(finished, tmp_path, monkeypatch, capsys):
    out, result, _ = finished
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2] / "README.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    exec(snippet, {})
    scores = result.outcomes["qprobe"].scores[0]
    best = max(range(len(scores)), key=scores.__getitem__)
    assert capsys.readouterr().out.startswith(result.tables["test"].by_prompt("completion")[0][best])


@pytest.mark.slow
def test_the_methods_share_the_tables_and_the_settings(finished):
    out, result, _ = finished
    assert {path.parent.relative_to(out).as_posix() for path in out.rglob("manifest.json")} == {
        *("train", "test", "qsharp/round-2/rollin", "qsharp/round-2/rollouts"),
        *(path.parent.relative_to(out).as_posix() for path in out.glob("qsharp/guided/*/manifest.json")),
        *("dqo/trained", "dqo/rejection/trained", "grpo-lambda/grpo-test", "grpo-lambda/plain-test"),
        "grpo-lambda/grpo_lambda-test",
    }
    problems = list(dict.fromkeys(result.tables["test"].column("prompt_id")))
    for folder in ("dqo/trained", "dqo/rejection/trained", "grpo-lambda/grpo-test"):
        table = read_table(out / folder)
        assert list(dict.fromkeys(table.column("prompt_id"))) == problems
        assert table.manifest["settings"]["seed"] == 3
    stages = result.manifest["stages"]
    assert {stage["policy"]["fingerprint"] for stage in stages.values()} == {result.policy}
    assert {stage["config"]["seed"] for stage in stages.values()} == {3}
    assert stages["dqo"]["training"]["completions"] == len(result.tables["train"])
    assert stages["dqo"]["baselines"]["rejection"]["rows"] == sum(result.tables["train"].column("correct"))
    assert "kl" not in result.arms["dqo"].measures  # the table does not know it, and it is not 0


@pytest.mark.slow
def test_the_same_file_again_runs_nothing(finished, monkeypatch):
    out, result, _ = finished
    monkeypatch.setattr(module, "METHODS", {name: (None, config) for name, (_, config) in module.METHODS.items()})
    said = []
    again = module.run(small(out), said.append)
    assert said == ["train: kept", "test: kept", "qprobe: kept", "qsharp: kept", "dqo: kept", "grpo-lambda: kept"]
    assert {name: (arm.summary(), arm.title, arm.curve) for name, arm in again.arms.items()} == {
        name: (arm.summary(), arm.title, arm.curve) for name, arm in result.arms.items()
    }
    before = (out / "report.html").read_text()
    module.publish(again)
    assert (out / "report.html").read_text() == before


@pytest.mark.slow
def test_a_changed_stage_is_run_again_and_taken_back_when_the_change_is_undone(tmp_path):
    stages = DEMO["stages"][:1]
    first = module.run(small(tmp_path, stages=stages), lambda _: None)
    said = []
    changed = [{**stages[0], "poolings": ["last"]}, {**stages[0], "name": "second"}]
    other = module.run(small(tmp_path, stages=changed), said.append)
    assert other.outcomes["qprobe"].scores != first.outcomes["qprobe"].scores
    assert other.outcomes["second"].scores == first.outcomes["qprobe"].scores
    assert other.arms["second/qprobe"].title == "second: Q-Probe, best of 4"
    (aside,) = tmp_path.glob("qprobe-*")
    assert any(line.endswith(f"what was there is now {aside}") for line in said) and "qprobe:" in said
    said = []
    module.run(small(tmp_path, stages=stages), said.append)
    assert "qprobe: kept" in said and not aside.exists() and len(list(tmp_path.glob("qprobe-*"))) == 1


def test_what_was_logged_of_a_stage_is_set_aside_and_taken_back_with_it(tmp_path):
    stage, keys = tmp_path / "dqo", (16 * "a", 16 * "b")
    with recording(["pipeline"]):
        begin(tmp_path, {}, ["none"])
        for key in keys:
            module._settle(stage, key, lambda _: None)
            stage.mkdir()
            (stage / "stage.json").write_text(json.dumps({"key": key}))
            log(stage / "policy", 1, {"key": key})
        module._settle(stage, keys[0], lambda _: None)
    found = {row["part"]: row["key"] for row in read_metrics(tmp_path)}
    assert found == {"dqo/policy": keys[0], f"dqo-{keys[1][:12]}/policy": keys[1]}


@pytest.mark.slow
def test_a_stage_that_trains_in_float32_reads_what_a_base_in_bfloat16_has_sampled(tmp_path):
    (stage,) = (each for each in DEMO["stages"] if each["method"] == "dqo")
    result = module.run(small(tmp_path, stages=[{**stage, "baselines": []}], dtype="bfloat16"), lambda _: None)
    assert "dqo" in result.arms and result.tables["train"].manifest["settings"]["dtype"] == "bfloat16"
    assert result.outcomes["dqo"].manifest["training"]["completions"] == len(result.tables["train"])


@pytest.mark.slow
def test_a_stage_is_run_again_where_a_file_that_it_names_has_changed(tmp_path):
    policy = load_model("tiny", "cpu")
    given, folder = tmp_path / "given.jsonl", tmp_path / "probe"

    def give(answer: int) -> None:
        rows = [{"prompt": "1+1=?", "completion": f"1+1={n};#### {n}", "reward": float(n == answer)} for n in range(4)]
        given.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def save_probe(score: float) -> None:
        feature = FeatureSpec(policy.model.config.num_hidden_layers, "last")
        probe = Probe(ProbeCard(policy.model.config.hidden_size, None, feature, policy.fingerprint, "mse"))
        probe.first.bias.data.fill_(score)
        probe.save_pretrained(folder)

    training = {"critic_warmup_steps": 0, "importance_cap": None, "probe": str(folder)}
    stage = {"method": "dqo", "completions": str(given), "test_samples": 2, "training": training}
    config = small(tmp_path / "run", stages=[stage])

    def kept() -> bool:
        said = []
        module.run(config, said.append)
        return "dqo: kept" in said

    give(2)
    save_probe(0.5)
    assert not kept() and kept()
    give(3)
    assert not kept()
    save_probe(0.25)
    assert not kept()
    give(2)
    save_probe(0.5)
    assert kept() and len(list((tmp_path / "run").glob("dqo-*"))) == 2
    given.unlink()
    with pytest.raises(UserError, match="^completions: no such rollout table or file: .*given.jsonl"):
        kept()


def test_a_stage_that_draws_its_own_problems_is_run_again_where_these_have_changed(tmp_path, monkeypatch):
    """Its table of test completions is the same."""
    folder, ran = tmp_path / "sums", []
    folder.mkdir()
    monkeypatch.setenv("POSTTRAIN_DATA", str(tmp_path))
    monkeypatch.setattr(
        grpo_lambda, "run", lambda config, **_: ran.append(config) or SimpleNamespace(arms={}, manifest={})
    )
    monkeypatch.setattr(grpo_lambda, "publish", lambda *_: None)
    monkeypatch.setattr(grpo_lambda, "figures", lambda _: [])

    def give(split: str, *sums: int) -> None:
        rows = [{"problem": f"{n}+{n}=?", "answer": str(2 * n)} for n in sums]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def runs() -> int:
        stage = {"method": "grpo-lambda", "validation_prompts": 2}
        module.run(small(tmp_path / "run", data="sums", test_prompts=2, k=2, stages=[stage]), lambda _: None)
        return len(ran)

    give("train", 1, 2)
    give("val", 3, 4)
    give("test", 5, 6)
    assert runs() == runs() == 1
    give("train", 1, 7)
    assert runs() == runs() == 2
    give("val", 3, 8)
    assert runs() == 3


def test_the_files_that_a_configuration_names(tmp_path):
    config = QSharpConfig(str(tmp_path), value=ValueTraining(base="tiny"))
    assert named_files(config) == {"value.base": load_tokenizer("tiny").fingerprint}
    assert named_files(QSharpConfig(str(tmp_path))) == {}
    with pytest.raises(UserError, match="^value.base: "):
        named_files(replace(config, value=ValueTraining(base=str(tmp_path / "nowhere"))))


@pytest.mark.slow
def test_a_table_of_another_seed_is_refused(finished):
    out, *_ = finished
    with pytest.raises(UserError, match=f"seed: {out / 'train'} was collected with seed 3, not 4"):
        module.run(small(out, seed=4), lambda _: None)


@pytest.mark.slow
def test_online_stages_alone_need_no_table_of_completions(tmp_path):
    stage = {**DEMO["stages"][3], "arms": ["grpo"], "training": {**DEMO["stages"][3]["training"], "steps": 1}}
    result = module.run(small(tmp_path, stages=[stage]), lambda _: None)
    assert list(result.tables) == ["test"] and not (tmp_path / "train").exists()
    assert list(result.arms) == ["base", "majority", "oracle", "grpo"]
    assert stages_of(result.config)[0].config.train_prompts == 2000  # its own, not the pipeline's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages: name at least one, such as {method: qprobe}"),
        ({"stages": ["dqo"]}, "stages[0]: must be a mapping of field to value, got 'dqo'"),
        ({"stages": [{"method": "dpo"}]}, "stages[0].method: must be one of qprobe, qsharp, dqo, grpo-lambda, got 'dpo' (did"),
        ({"stages": [{"name": "x"}]}, "stages[0].method: must be one of"),
        ({"stages": [{"method": "qprobe"}] * 2}, "stages[1].name: qprobe is another folder of the run; name it otherwise"),
        ({"stages": [{"method": "dqo", "name": "train"}]}, "stages[0].name: train is another folder of the run"),
        ({"stages": [{"method": "dqo", "name": "a/b"}]}, "stages[0].name: must be a word of letters"),
        ({"stages": [{"method": "dqo", "seed": 1}]}, "stages[0].seed: is the same for all stages; give it once"),
        ({"stages": [{"method": "qsharp", "test_data": "x"}]}, "stages[0].test_data: all stages are measured on the same"),
        ({"stages": [{"method": "qprobe", "top_p": 0.9}]}, "stages[0].top_p: the stages share tables that the pipeline has"),
        ({"stages": [{"method": "dqo", "engine": "vllm"}]}, "stages[0].engine: the stages share tables that the pipeline"),
        ({"stages": [{"method": "dqo", "out": "x"}]}, "stages[0].out: is the same for all stages; give it once"),
        ({"stages": [{"method": "dqo", "baseline": []}]}, "stages[0].baseline: unknown field (did you mean baselines?)"),
        (
            {"stages": [{"method": "qsharp", "value": {"head": "w"}}]},
            "stages[0].value.head: must be one of v, q, shared, got 'w'",
        ),
        (
            {"stages": [{"method": "qsharp", "rounds": 1, "value": {"head": "q", "loss": "ipl"}}]},
            "stages[0].value.loss: a whole run measures the law of the return",
        ),
        ({"trian_prompts": 3}, "trian_prompts: unknown field (did you mean train_prompts?)"),
        ({"train_prompts": 1}, "train_prompts: must be at least 2, got 1"),
        ({"test_split": "train"}, "test_split: train is the training split too"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_named_before_anything_is_done(tmp_path, changes, message):
    with pytest.raises(UserError) as refused:
        small(tmp_path, **changes)
    assert str(refused.value).startswith(message)


def test_the_problems_of_every_stage_are_looked_at_before_anything_is_sampled(tmp_path):
    stages = [{"method": "qprobe"}, {"method": "grpo-lambda", "validation_split": "vall"}]
    with pytest.raises(UserError, match=r"^stages\[1\].split: .*vall"):
        module.run(small(tmp_path, stages=stages))
    data = tmp_path / "sums.jsonl"  # which has no splits
    data.write_text("".join(json.dumps({"problem": f"{i}+1=?", "answer": str(i + 1)}) + "\n" for i in range(20)))
    stages = [{"method": "grpo-lambda", "validation_prompts": 0}]
    with pytest.raises(UserError, match="^data: 6 test problems are training problems too"):
        module.run(small(tmp_path, stages=stages, data=str(data)))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_launcher_of_several_processes_is_refused(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="launch: this runs in one process: the stages that train have commands"):
        module.run(small(tmp_path))
    assert not list(tmp_path.iterdir())

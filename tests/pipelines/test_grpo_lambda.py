"""GRPO-lambda from beginning to end, on a handful of problems."""

import json
import threading
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from posttrain.cli.main import main
from posttrain.config import build, read_yaml
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.pipelines import grpo_lambda
from posttrain.pipelines.grpo_lambda import (
    GRPOLambdaRunConfig,
    GRPOLambdaTraining,
    arguments,
    correctness,
    run,
    training_rows,
)
from posttrain.trainers.service_rollouts import ServiceRollouts
from tests.rollouts.fakes import Fake

SMALL = GRPOLambdaRunConfig(
    out="",
    arms=("grpo", "grpo_lambda"),
    train_prompts=6,
    validation_prompts=4,
    validation_samples=2,
    validation_steps=1,
    test_prompts=4,
    test_samples=3,
    shard_prompts=3,
    training=GRPOLambdaTraining(
        steps=2, prompts_per_step=3, samples=4, batch_size=6, penalty_warmup_steps=0, gate_fraction=1.0, lora_rank=2
    ),
)


def silent(_):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    return out, run(replace(SMALL, out=str(out)), say=silent)


@pytest.mark.slow
def test_every_arm_is_trained_and_measured(finished):
    out, result = finished
    assert {"base", "majority", "oracle", "grpo", "grpo_lambda"} == set(result.arms)
    transformers.AutoModelForCausalLM.from_pretrained(out / "grpo_lambda")
    grpo_lambda.publish(result, "a title", "a lead")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["arms"]["grpo_lambda"]["accuracy"] == result.arms["grpo_lambda"].accuracy
    assert set(summary["comparisons"]) == {"grpo - base", "grpo_lambda - base", "grpo_lambda - grpo"}
    assert summary["comparisons"]["grpo - base"]["difference"] == pytest.approx(
        result.arms["grpo"].accuracy - result.arms["base"].accuracy
    )
    assert "GRPO-lambda" in (out / "report.html").read_text()
    assert "| **GRPO-lambda** |" in (out / "grpo_lambda" / "README.md").read_text()


@pytest.mark.slow
def test_the_guard_has_something_to_look_at(finished):
    _, result = finished
    looks = [entry for entry in result.training["grpo_lambda"]["log"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in looks] == [0, 1, 2]
    assert all(entry["eval_completions/mean_length"] > 0 for entry in looks)


@pytest.mark.slow
def test_only_the_gated_arm_is_penalised(finished):
    _, result = finished
    for name, alpha in (("grpo", 0.2), ("grpo_lambda", 0.2)):
        steps = [entry for entry in result.training[name]["log"] if "gate/alpha" in entry]
        assert [entry["gate/alpha"] for entry in steps] == [alpha] * 2
        assert all(entry["gate/fraction"] == 0 for entry in steps) == (name == "grpo")


@pytest.mark.slow
def test_everything_is_kept(finished):
    out, result = finished
    stamp = (out / "grpo" / "model.safetensors").stat().st_mtime_ns
    again = run(replace(SMALL, out=str(out)), say=silent)
    assert again.arms["grpo"].accuracy == result.arms["grpo"].accuracy
    assert stamp == (out / "grpo" / "model.safetensors").stat().st_mtime_ns
    assert not list(out.glob("*checkpoints*"))


@pytest.mark.slow
def test_a_policy_of_other_settings_is_not_overwritten(finished):
    out, _ = finished
    other = replace(SMALL, out=str(out), training=replace(SMALL.training, alpha=0.5))
    with pytest.raises(UserError, match="out: .*grpo was trained on other problems or with other settings"):
        run(other, say=silent)


@pytest.mark.slow
def test_an_interrupted_training_continues_from_its_checkpoint_to_the_same_policy(tmp_path, monkeypatch):
    config = replace(
        SMALL,
        arms=("grpo_lambda",),
        train_prompts=12,  # one epoch: TRL's sampler does not remember how many it has shuffled
        validation_prompts=0,
        training=replace(SMALL.training, steps=3, lora_rank=0, trl={"save_steps": 1}),
    )
    calls = []

    def interrupted(completions, answer, **_):
        calls.append(len(completions))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return correctness(completions, answer)

    run(replace(config, out=str(tmp_path / "whole")), say=silent)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo_lambda, "correctness", interrupted)
        run(replace(config, out=str(tmp_path / "parts")), say=silent)
    run(replace(config, out=str(tmp_path / "parts")), say=silent)
    whole, parts = (load_file(tmp_path / name / "grpo_lambda" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_peer_stands_in_the_place_of_the_plain_penalty_alone(tmp_path):
    peer = {"length_reward": "kimi", "length_reward_options": {"weight": 2.0}}
    config = replace(SMALL, arms=("grpo", "plain", "grpo_lambda"), training=replace(SMALL.training, trl=peer))
    made = {arm: arguments(config, arm, tmp_path, use_cpu=True) for arm in config.arms}
    assert {arm: args.length_reward for arm, args in made.items()} == {
        **{"grpo": "group_gated", "plain": "kimi", "grpo_lambda": "group_gated"}
    }
    assert made["plain"].length_reward_options == {"weight": 2.0}


def test_processes_share_what_a_step_takes(tmp_path):
    config = replace(SMALL, training=replace(SMALL.training, prompts_per_step=6))
    made = {count: arguments(config, "grpo", tmp_path, True, count) for count in (1, 2)}
    assert {count: args.gradient_accumulation_steps for count, args in made.items()} == {1: 4, 2: 2}
    with pytest.raises(UserError, match="training.batch_size: in 5 processes 30 completions go forward at once"):
        arguments(config, "grpo", tmp_path, True, 5)


def test_no_more_is_validated_at_once_than_trained_on(tmp_path):
    """TRL puts an evaluation's batch through one forward, logits and all."""
    for batch_size, prompts, expected in ((16, 100, 16), (18, 100, 16), (16, 3, 12), (2, 100, 4), (16, 5, 12)):
        training = replace(SMALL.training, prompts_per_step=72, samples=8, batch_size=batch_size)
        config = replace(SMALL, training=training, validation_prompts=prompts, validation_samples=4)
        assert arguments(config, "grpo", tmp_path, True).per_device_eval_batch_size == expected


def test_the_reward_grades_the_answer():
    completions = [[{"role": "assistant", "content": text}] for text in ("2+2=(4.)4;#### 4", "#### 5", "no idea")]
    assert correctness(completions, ["4"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("recipe", ["arithmetic", "gsm8k_qwen"])
def test_the_recipes_are_ones(recipe):
    assert build(GRPOLambdaRunConfig, read_yaml(f"recipes/grpo_lambda/{recipe}.yaml")).arms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {samples: 1, batch_size: 1}", "training.samples: must be at least 2"),
        ("training: {batch_size: 7}", "training.batch_size: must divide prompts_per_step"),
        ("training: {learning_rate: -1}", "training.learning_rate: must be positive and finite, got -1.0"),
        ("training: {temperature: 0}", "training.temperature: must be positive and finite, got 0.0"),
        ("training: {beta: -1}", "training.beta: must be 0"),
        ("training: {max_tokens: 0}", "training.max_tokens: must be at least 1, got 0"),
        ("training: {loss_type: dr_grppo}", "training.loss_type: must be one of"),
        ("training: {alpha: 2}", "training.alpha: must be between 0 and 1, got 2.0"),
        ("training: {gate_fraction: -1}", "training.gate_fraction: must be between 0 and 1, got -1.0"),
        ("training: {guard_steps: 0}", "training.guard_steps: must be at least 1, got 0"),
        ("training: {lr_scheduler_type: nonsense}", "training.lr_scheduler_type: must be one of linear, cosine"),
        ("training: {trl: {epsilon: abc}}", "training.trl.epsilon: must be a number, got 'abc'"),
        ("training: {trl: {optim: adam}}", "training.trl.optim: must be one of adamw_torch"),
        ("training: {trl: {report_to: 3}}", "training.trl.report_to: must be of type str or list, got 3"),
        ("training: {trl: {generation_batch_size: 7}}", "training.trl.generation_batch_size"),
        ("training: {max_tokens: 100000}", "training.max_tokens: 100000 do not fit into the model's context of "),
        ("max_tokens: 100000", "max_tokens: row "),
        (
            "training: {trl: {use_vlm: true}}",
            "training.trl.use_vlm: no argument of TRL's GRPOConfig (did you mean use_vllm",
        ),
        ("training: {trl: {max_steps: 3}}", "training.trl.max_steps: is a setting of ours"),
        ("device: cpu\ntraining: {trl: {min_p: 0.1}}", "training.trl.min_p: our engine and the service sample by"),
        (
            "engine: service\nurls: ['http://127.0.0.1:1']\ntraining: {trl: {chat_template_kwargs: {}}}",
            "training.trl.chat_template_kwargs: our engine and the service sample by",
        ),
        (
            "training: {trl: {length_reward: kimi}}",
            "training.trl.length_reward: stands in the place of the plain penalty",
        ),
        (
            "arms: [plain]\ntraining: {trl: {length_reward: l1_exact}}",
            "training.trl.length_reward_options: l1_exact: ",
        ),
        ("arms: [grpo, grpo]", "arms: must be different ones"),
        ("arms: [ppo]", "arms[0]: must be one of grpo, plain, grpo_lambda, got 'ppo'"),
        ("test_split: train", "test_split: train is the train_split too"),
        ("test_split: val", "test_split: val is the validation_split too"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, capsys, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(f"out: {tmp_path}/run\n{text}\n")
    assert main(["grpo-lambda", "--config", str(config)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"posttrain: error: {message}") and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("warmup", "warned"), [(1, 0), (2, 1)])
def test_a_warmup_that_is_all_of_the_training_is_said(tmp_path, monkeypatch, warmup, warned):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo_lambda, "load_model", stop)
    training = replace(SMALL.training, penalty_warmup_steps=warmup)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("always")
        run(replace(SMALL, out=str(tmp_path), training=training), say=silent)
    assert sum("training.penalty_warmup_steps: 2 steps" in str(one.message) for one in caught) == warned
    assert grpo_lambda._without_penalty(replace(SMALL, arms=("grpo",), training=training)) is None


@pytest.mark.slow
def test_other_test_data(tmp_path, monkeypatch):
    """A file has no splits: two files are trained and measured on, and no problem may be in both."""
    for name, first in (("train", 0), ("test", 5), ("both", 2)):
        lines = [json.dumps({"problem": f"{n}+1=?", "answer": str(n + 1)}) for n in range(first, first + 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    asked = []

    def sampled(_, plan, rows, *__, **___):
        asked.append((plan.data, [row["problem"] for row in rows]))
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo_lambda, "rollout", sampled)
    files = {"data": str(tmp_path / "train.jsonl"), "validation_prompts": 0, "test_split": "train"}
    config = replace(SMALL, **files, out=str(tmp_path / "run"), test_data=str(tmp_path / "test.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        run(config, say=silent)
    assert asked == [(str(tmp_path / "test.jsonl"), ["5+1=?", "6+1=?", "7+1=?", "8+1=?"])]
    with pytest.raises(UserError, match="data: 2 test problems are training problems too"):
        run(replace(config, test_data=str(tmp_path / "both.jsonl")), say=silent)


@pytest.mark.slow
def test_a_training_that_fails_closes_what_it_asks_the_service_with(tmp_path, monkeypatch):
    replica = Fake()
    config = replace(SMALL, out=str(tmp_path), validation_prompts=0, engine="service", urls=(replica.url,))
    running = []

    def fail(self, prompts, trainer):
        running.append(self.engine._thread.is_alive())
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(ServiceRollouts, "__call__", fail)
    try:
        policy = load_model("tiny", "cpu", "float32")
        with pytest.raises(RuntimeError, match="the service is gone"):
            grpo_lambda.train(policy, config, "grpo", training_rows(config), [])
    finally:
        replica.kill()
    assert running == [True]
    assert not any(thread.name == "rollout service" for thread in threading.enumerate())

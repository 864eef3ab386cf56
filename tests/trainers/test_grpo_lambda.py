"""The trainer beside TRL's own, on the embedded model: what the gate changes, and that nothing else does."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from posttrain.data import arithmetic
from posttrain.data.prompts import messages_for
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.objectives import length as length_rewards
from posttrain.objectives.length import group_gated
from posttrain.trainers.grpo_lambda import PEERS, GRPOLambdaConfig, GRPOLambdaTrainer, collapse

ROOT = Path(__file__).parents[2]
PLAIN = {"gate_fraction": 1.0, "min_group_accuracy": 0.0, "length_std_floor": 0.0}


def verdicts(completions, answer, **_):
    """1 where the text ends in the gold after the mark."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.endswith(f"#### {gold}")) for text, gold in zip(texts, answer, strict=True)]


def brevity(completion_ids, **_):
    return [-len(ids) / 1000 for ids in completion_ids]


def data(count=16):
    rows = arithmetic.rows(count, "train", 0)
    return Dataset.from_list([{"prompt": messages_for(row, "{problem}"), "answer": row["answer"]} for row in rows])


def arguments(cls, folder, **changes):
    settings = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 128,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "scale_rewards": "none",
    }
    if cls is GRPOLambdaConfig:
        settings["penalty_warmup_steps"] = 0
    return cls(str(folder), **{**settings, **changes})


class Recording(GRPOLambdaTrainer):
    """Keeps every batch of rewards, and what it was made of."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def _calculate_rewards(self, inputs, prompts, completions, ids):
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        self.seen.append((rewards, completions, [x["answer"] for x in inputs], ids))
        return rewards


def trainer(folder, rewards=verdicts, cls=Recording, **changes):
    policy = load_model("tiny", "cpu")
    config = GRPOConfig if cls is GRPOTrainer else GRPOLambdaConfig
    return cls(policy.model, rewards, arguments(config, folder, **changes), data(), processing_class=policy.tokenizer)


def trained(*args, **changes):
    made = trainer(*args, **changes)
    made.train()
    return made


def weights(made):
    return {name: value.detach().clone() for name, value in made.model.named_parameters()}


def grouped(made, batch=0, group=4):
    """Rewards, correctness, lengths and whether finished, of one generation batch, [prompts, samples]."""
    rewards, completions, answers, ids = made.seen[batch]
    correct = torch.tensor(verdicts(completions, answers)).view(-1, group)
    lengths = torch.tensor([len(x) for x in ids]).view(-1, group)
    ends = torch.tensor([x[-1] in made.eos_token_ids for x in ids]).view(-1, group)
    return rewards[:, 0].view(-1, group), correct, lengths, ends


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("shaped"), gate_fraction=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"scale_rewards": "group", "beta": 0.01, "per_device_train_batch_size": 8}])
def test_without_a_gate_it_is_trl_bit_for_bit(tmp_path, changes):
    ours = trained(tmp_path / "ours", rewards=[verdicts, brevity], gate_fraction=0.0, **changes)
    theirs = trained(tmp_path / "theirs", rewards=[verdicts, brevity], cls=GRPOTrainer, **changes)
    expected = weights(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in weights(ours).items())
    for own, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        same = [key for key in other if "time" not in key and "per_second" not in key]
        assert {key: own[key] for key in same} == {key: other[key] for key in same}
    initial = dict(load_model("tiny", "cpu").model.named_parameters())
    assert any(not torch.equal(value, initial[name]) for name, value in expected.items())


@pytest.mark.slow
def test_the_shaped_column_is_the_objective(shaped):
    for batch in range(2):
        rewards, correct, lengths, finished = grouped(shaped, batch)
        torch.testing.assert_close(rewards, group_gated(correct, lengths, finished, gate_fraction=0.5))
    assert any((grouped(shaped, batch)[0] % 1 > 0).any() for batch in range(2))


@pytest.mark.slow
def test_a_full_gate_is_the_plain_length_penalty(tmp_path):
    made = trained(tmp_path, **PLAIN, alpha=0.4, max_steps=1)
    rewards, correct, lengths, _ = grouped(made)
    for reward, right, length in zip(rewards, correct.bool(), lengths.double(), strict=True):
        own = length[right]
        spread = own.std(correction=0) if len(own) else 1.0
        expected = 1 - 0.4 * ((length - own.mean()) / (spread + 1e-7)).sigmoid()
        torch.testing.assert_close(reward.double(), torch.where(right, expected, 0.0), atol=1e-6, rtol=0)
    assert made.state.log_history[0]["gate/fraction"] == 1


OPTIONS = {"l1_exact": {"target": 60}, "l1_max": {"target": 60, "alpha": 0.01}, "cosine": {"max_length": 40}}


@pytest.mark.slow
def test_one_step_of_every_peer(tmp_path):
    initial = dict(load_model("tiny", "cpu").model.named_parameters())
    for name in PEERS:
        options = OPTIONS.get(name)
        made = trained(tmp_path / name, length_reward=name, length_reward_options=options, max_steps=1)
        rewards, correct, lengths, finished = grouped(made)
        expected = getattr(length_rewards, name)(correct, lengths, finished, **options or {})
        torch.testing.assert_close(rewards, expected.to(rewards.dtype))
        assert not torch.equal(rewards, correct) or name == "alp"  # its default is below a float's last digit here
        assert made.state.log_history[0]["gate/fraction"] == 1
        assert any(not torch.equal(value, initial[key]) for key, value in weights(made).items())


def test_a_peer_waits_and_grows_with_the_schedule(tmp_path):
    made = trainer(tmp_path, length_reward="difficulty_linear", penalty_warmup_steps=5, alpha_ramp_steps=4)
    made.model.train()
    assert [alpha for _, alpha in strengths(made, (4, 5, 6, 8, 90))] == [0, 0.25, 0.5, 1, 1]
    without = trainer(tmp_path, length_reward="difficulty_linear", gate_fraction=0.0)
    without.model.train()
    assert strengths(without, [90]) == [(0, 0)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arora", None, "length_reward: no 'arora'"),
        ("l1_exact", None, "length_reward_options: l1_exact: .*'target'"),
        ("gr3", {"beta": 1}, "length_reward_options.beta: gr3 has alpha"),
        ("gr3", {"alpha": "much"}, "length_reward_options.alpha: must be a number, got 'much'"),
        ("sigmoid_length", {"alpha": 2}, "length_reward_options: sigmoid_length: alpha: must lie in"),
        ("group_gated", {"alpha": 0.1}, "length_reward_options: group_gated has none"),
        ("gr3", 3, "length_reward_options: must be a mapping, got 3"),
    ],
)
def test_a_peer_that_is_not_one(tmp_path, name, options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        arguments(GRPOLambdaConfig, tmp_path, length_reward=name, length_reward_options=options)


def test_what_it_logs(shaped):
    for batch, entry in enumerate(shaped.state.log_history[:2]):
        _, correct, lengths, finished = grouped(shaped, batch)
        assert entry["accuracy"] == pytest.approx(float(correct.mean()))
        assert entry["reward_unshaped"] == pytest.approx(float(correct.mean()))
        assert entry["reward"] <= entry["reward_unshaped"]
        assert entry["rewards/verdicts/mean"] == pytest.approx(entry["reward"])
        right, wrong = lengths[correct == 1].float(), lengths[correct == 0].float()
        assert entry["completions/mean_length_right"] == pytest.approx(float(right.mean()))
        assert entry["completions/mean_length_wrong"] == pytest.approx(float(wrong.mean()))
        assert entry["gate/alpha"] == 0.2 and 0 <= entry["gate/fraction"] <= 0.5
        assert entry["gate/negative_correct"] == 0 and entry["verifier_errors"] == 0
        assert {"completions/clipped_ratio", "entropy"} <= set(entry)
        assert finished.float().mean() == pytest.approx(1 - entry["completions/clipped_ratio"])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_the_signs_that_it_counts_are_of_what_was_scored(tmp_path, aggregation):
    made = trainer(tmp_path, multi_objective_aggregation=aggregation)
    rewards = torch.tensor([0.96, 0.92, 0.9, torch.nan]).unsqueeze(-1)
    signs = made._centred(rewards, 4).sign().tolist()
    assert [row[:3] for row in signs] == [[1, -1, -1]]
    made.model.train()
    right = torch.tensor([[True, True, True, False]])
    made._measure(rewards, rewards, torch.full((1, 4), 9), right, ~right, right[:, 0], 0.2)
    assert made._metrics["train"]["gate/negative_correct"] == [2]
    assert made._metrics["train"]["reward_unshaped"] == [pytest.approx((0.96 + 0.92 + 0.9) / 3)]


@pytest.mark.slow
def test_truncated_completions_are_incorrect(tmp_path):
    made = trained(
        tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), max_completion_length=30, max_steps=1
    )
    rewards, _, lengths, finished = grouped(made)
    assert torch.equal(rewards == 0, ~finished) and not finished.all() and (lengths[~finished] == 30).all()
    assert made.state.log_history[0]["accuracy"] == pytest.approx(float(finished.float().mean()))


@pytest.mark.slow
def test_correctness_by_name_and_other_rewards_pass_through(tmp_path):
    made = trained(tmp_path, rewards=[brevity, verdicts], correctness_reward="verdicts", gate_fraction=1.0, max_steps=1)
    rewards, completions, answers, ids = made.seen[0]
    assert torch.equal(rewards[:, 0], torch.tensor(brevity(ids)))
    correct = torch.tensor(verdicts(completions, answers))
    assert ((rewards[:, 1] > 0) == (correct > 0)).all() and not torch.equal(rewards[:, 1], correct)


@pytest.mark.slow
def test_evaluation_is_not_shaped(tmp_path):
    made = trainer(tmp_path, **PLAIN, per_device_eval_batch_size=16)
    metrics = made.evaluate(data(8))
    assert all(set(rewards.flatten().tolist()) <= {0.0, 1.0} for rewards, *_ in made.seen)
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_rewards/verdicts/mean"])
    assert "eval_gate/alpha" not in metrics


# -- schedules and the guard


def strengths(made, steps):
    found = []
    for step in steps:
        made.state.global_step = step
        found.append(made._strength())
    return found


def test_warm_up_and_ramps(tmp_path):
    made = trainer(tmp_path, penalty_warmup_steps=10, alpha_ramp_steps=4, gate_ramp_steps=2, gate_fraction=0.4)
    made.model.train()
    expected = [(0, 0), (0, 0), (0.2, 0.05), (0.4, 0.1), (0.4, 0.15), (0.4, 0.2), (0.4, 0.2)]
    assert strengths(made, (0, 9, 10, 11, 12, 13, 500)) == [pytest.approx(pair) for pair in expected]


def evaluation(step, accuracy, length):
    return {"step": step, "eval_accuracy": accuracy, "eval_completions/mean_length": length}


@pytest.mark.parametrize(
    ("history", "found"),
    [
        ([evaluation(10, 0.8, 100), evaluation(20, 0.77, 90)], (0.8, 0.77, 100, 90)),
        ([evaluation(10, 0.8, 100), evaluation(20, 0.79, 90)], None),  # a small fall
        ([evaluation(10, 0.8, 100), evaluation(20, 0.7, 110)], None),  # lengths grow
        ([evaluation(10, 0.8, 100), evaluation(120, 0.7, 90)], None),  # a slow fall
        ([evaluation(10, 0.8, 100), {"step": 15, "loss": 0.1}, evaluation(20, 0.7, 90)], (0.8, 0.7, 100, 90)),
        ([evaluation(0, 0.8, 100), evaluation(5, 0.7, 90)], None),  # in the warm-up
        ([*(evaluation(10, a, 100) for a in (0.8, 0.2)), *(evaluation(20, a, 90) for a in (0.2, 0.8))], None),
        ([evaluation(10 * i, 0.8 - i / 64, 100 - i) for i in range(6)], (0.8, 0.8 - 2 / 64, 100, 98)),
        ([], None),
    ],
)
def test_collapse(history, found):
    assert collapse(history, 0.02, 100, 5) == (found if found is None else pytest.approx(found))


def test_a_collapse_switches_the_penalty_off_and_says_so(tmp_path, caplog):
    made = trainer(tmp_path)
    made.model.train()
    made.state.log_history = [evaluation(10, 0.8, 100)]
    assert strengths(made, [15]) == [(0.2, 0.2)]
    made.state.log_history += [evaluation(20, 0.7, 90)]
    with caplog.at_level(logging.WARNING):
        assert strengths(made, [21, 22]) == [(0.0, 0.0)] * 2
    assert len(caplog.records) == 1
    assert "off from step 21 on: accuracy fell from 0.800 to 0.700 while lengths fell from 100 to 90" in caplog.text
    resumed = trainer(tmp_path)
    resumed.model.train()
    resumed.state.log_history = [*made.state.log_history, evaluation(30, 0.9, 90)]
    assert strengths(resumed, [31]) == [(0.0, 0.0)]


def test_no_guard(tmp_path):
    made = trainer(tmp_path, guard_drop=None)
    made.model.train()
    made.state.log_history = [evaluation(10, 0.8, 100), evaluation(20, 0.1, 9)]
    assert strengths(made, [21]) == [(0.2, 0.2)]


# -- bad input


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_generations", 1, "must be at least 2, got 1"),
        ("alpha", 1.1, "must be between 0 and 1, got 1.1"),
        ("alpha", math.nan, "must be between 0 and 1"),
        ("gate_fraction", -0.1, "must be between 0 and 1, got -0.1"),
        ("min_group_accuracy", 7.0, "must be between 0 and 1"),
        ("length_std_floor", -1.0, "must not be negative"),
        ("penalty_warmup_steps", -1, "must not be negative"),
        ("guard_drop", 0.0, "must be positive"),
        ("guard_steps", 0, "must be at least 1"),
        ("scale_rewards", "std", "must be group, batch or none, got 'std'"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, field, value, message):
    with pytest.raises(UserError, match=f"^{field}: .*{message}"):
        arguments(GRPOLambdaConfig, tmp_path, **{field: value})


def test_what_trl_refuses_is_one_line(tmp_path):
    with pytest.raises(UserError, match="^generation_batch_size .* must be divisible by num_generations"):
        arguments(GRPOLambdaConfig, tmp_path, num_generations=5)


def test_an_unknown_correctness_reward(tmp_path):
    with pytest.raises(UserError, match="correctness_reward: no reward function 'verdict' .did you mean verdicts"):
        trainer(tmp_path, correctness_reward="verdict")


def test_group_scaling_warns(tmp_path):
    with pytest.warns(UserWarning, match="scale_rewards: .* inert"):
        arguments(GRPOLambdaConfig, tmp_path, scale_rewards="group")


@pytest.mark.slow
def test_a_verifier_that_raises_marks_that_completion_and_the_run_goes_on(tmp_path, caplog):
    worst = arithmetic.rows(16, "train", 0)

    def fragile(completions, answer, **_):
        if any(gold == worst[0]["answer"] for gold in answer):
            raise ZeroDivisionError("by nothing")
        return verdicts(completions, answer)

    made = trainer(tmp_path, rewards=fragile, max_steps=4)  # 16 prompts, 4 a step: every one is met
    with caplog.at_level(logging.WARNING):
        made.train()
    marked = 0
    for rewards, _, answers, _ in made.seen:
        failed = torch.tensor([gold == worst[0]["answer"] for gold in answers])
        assert torch.equal(rewards[:, 0].isnan(), failed)
        marked += int(failed.sum())
    assert marked >= 4
    assert sum(entry.get("verifier_errors", 0) for entry in made.state.log_history) == marked
    assert "completions could not be scored: fragile: ZeroDivisionError: by nothing" in caplog.text
    assert all(torch.isfinite(value).all() for value in weights(made).values())


@pytest.mark.slow
def test_the_completions_table_says_what_was_wrong(tmp_path):
    async def fragile(completions, log_extra, **_):
        log_extra("own", list(range(len(completions))))
        if len(completions) > 1 or "#" not in completions[0][0]["content"]:
            raise ValueError("no mark")
        return [1.0]

    trained(tmp_path, rewards=fragile, max_steps=2, max_completion_length=60, log_completions=True)
    rows = [row for file in sorted(tmp_path.glob("completions/*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 2 * 16
    for row in rows:
        failed = "#" not in row["completion"][0]["content"]
        assert row["verifier_error"] == ("fragile: ValueError: no mark" if failed else None)
    assert {row["verifier_error"] is None for row in rows} == {True, False}


@pytest.mark.slow
def test_a_verifier_that_always_raises_is_refused_at_once(tmp_path):
    def broken(**_):
        raise KeyError("gold")

    with pytest.raises(UserError, match="reward_funcs: every completion of the first batch failed, broken: KeyError"):
        trained(tmp_path, rewards=broken)


@pytest.mark.slow
def test_a_wrong_number_of_rewards(tmp_path):
    with pytest.raises(UserError, match="reward_funcs: short returned 1 rewards for 16 completions"):

        def short(**_):
            return [1.0]

        trained(tmp_path, rewards=short)


@pytest.mark.slow
def test_truncation_without_end_warns_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, max_completion_length=2, max_steps=12)
    said = [record for record in caplog.records if "max_completion_length: all completions" in record.getMessage()]
    assert len(said) == 1 and "last 10 batches were cut off at 2 tokens" in said[0].getMessage()


# -- two ranks


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_two_ranks_choose_the_gate_that_one_would(tmp_path):
    """Three groups of four over ranks of six: the second straddles them."""
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(Path(__file__).with_name("two_ranks_grpo.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert reports[0]["rewards"] == reports[1]["rewards"]
    assert reports[0]["same_prompt"] != reports[1]["same_prompt"]  # of different seeds
    for step, rewards in enumerate(reports[0]["rewards"]):
        correct, lengths = (
            torch.tensor(reports[0][name][step] + reports[1][name][step]).view(-1, 4) for name in ("correct", "lengths")
        )
        finished = torch.tensor(reports[0]["finished"][step] + reports[1]["finished"][step]).view(-1, 4)
        expected = group_gated(correct, lengths, finished, gate_fraction=0.34)
        torch.testing.assert_close(torch.tensor(rewards).view(-1, 4), expected)
    assert reports[0]["log"] == reports[1]["log"]


def test_arguments_are_ours(tmp_path):
    policy = load_model("tiny", "cpu")
    with pytest.raises(UserError, match="args: must be a GRPOLambdaConfig, got a GRPOConfig"):
        GRPOLambdaTrainer(policy.model, verdicts, arguments(GRPOConfig, tmp_path), data())
    if not torch.cuda.is_available():  # the default ones want a GPU, as TRL's own do
        with pytest.raises(UserError, match="use_cpu"):
            GRPOLambdaTrainer(policy.model, verdicts, train_dataset=data(), processing_class=policy.tokenizer)

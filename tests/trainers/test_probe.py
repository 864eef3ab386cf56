"""The probe trainer, end to end on synthetic features."""

import time

import numpy as np
import pytest
import torch

from posttrain.config import build
from posttrain.decoding.rerank import best_of_k
from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec
from posttrain.models.probe import Probe
from posttrain.trainers.probe import ProbeConfig, ProbeTrainer


def problem(seed, prompts=80, samples=12, d=16, signal=1.0):
    """Features [prompts, samples, d]: the first direction tells good samples apart, the second easy prompts."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.randn(prompts, 1, generator=generator)
    quality = torch.randn(prompts, samples, generator=generator)
    rewards = (torch.rand(prompts, samples, generator=generator) < torch.sigmoid(2 * quality + 2 * ease)).float()
    features = torch.randn(prompts, samples, d, generator=generator)
    features[..., 0] += 2 * signal * quality
    features[..., 1] += 2 * ease
    return features * torch.linspace(0.1, 20, d) + 5, rewards


def quick(**changes):
    return ProbeConfig(**{"max_steps": 300, "learning_rate": 1e-2, **changes})


@pytest.mark.parametrize("loss", ["policy", "bce", "mse", "preference"])
@pytest.mark.parametrize("seed", [0, 1])
def test_reranking_new_prompts_beats_the_base_policy(loss, seed):
    features, rewards = problem(seed)
    result = ProbeTrainer(quick(loss=loss, seed=seed)).fit(features, rewards)
    new_features, new_rewards = problem(seed + 100)
    value = best_of_k(result.probe(new_features), new_rewards, 8).item()
    base, oracle = new_rewards.mean().item(), best_of_k(new_rewards, new_rewards, 8).item()
    assert base + 0.5 * (oracle - base) < value <= oracle


@pytest.mark.parametrize("loss", ["bce", "mse", "preference"])
def test_with_dropout_a_score_hangs_less_on_single_features(loss):
    features, rewards = problem(0)
    new_features, new_rewards = problem(100)
    spreads = []
    for dropout in (0.0, 0.7):
        result = ProbeTrainer(quick(loss=loss, dropout=dropout)).fit(features, rewards)
        spreads.append(result.probe.spread(new_features - result.probe.mean).mean().item())
        assert best_of_k(result.probe(new_features), new_rewards, 8) > new_rewards.mean() + 0.1
    assert spreads[1] < spreads[0]


def test_hidden_layer_learns_what_a_line_cannot():
    features = torch.randn(100, 8, 2, generator=torch.Generator().manual_seed(0))
    rewards = (features.prod(-1) > 0).float()
    line, layer = (ProbeTrainer(quick(hidden=hidden)).fit(features, rewards) for hidden in (None, 16))
    assert line.metrics["value"] < 0.75
    assert layer.metrics["value"] > 0.95


@pytest.mark.parametrize("hidden", [None, 8])
def test_same_seed_same_probe_whatever_was_drawn_before(hidden):
    features, rewards = problem(0)
    first = ProbeTrainer(quick(max_steps=15, hidden=hidden)).fit(features, rewards)
    torch.rand(7)
    second = ProbeTrainer(quick(max_steps=15, hidden=hidden)).fit(features, rewards)
    assert first.curve == second.curve
    assert all(torch.equal(a, b) for a, b in zip(first.probe.parameters(), second.probe.parameters(), strict=True))


def test_training_leaves_the_global_random_state_alone():
    features, rewards = problem(0)
    state = torch.get_rng_state()
    ProbeTrainer(quick(max_steps=3, hidden=4)).fit(features, rewards)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_informative_feature_is_chosen():
    candidates = [problem(0, signal=signal)[0] for signal in (0.0, 1.0, 0.1)]
    specs = [FeatureSpec(1, "last"), FeatureSpec(1, "mean"), FeatureSpec(2, "mean")]
    result = ProbeTrainer(quick()).fit(torch.stack(candidates, 2), problem(0)[1], specs=specs, policy="fp")
    assert result.spec == result.probe.card.feature == specs[1]
    assert result.probe.card.policy == "fp"
    assert len(result.values) == 3
    assert max(result.values) == result.values[1] == result.metrics["value"]


def test_the_probe_returned_is_the_best_on_the_curve():
    features, rewards = problem(0, prompts=12, samples=6)
    config = {"learning_rate": 0.1, "patience": 4, "eval_steps": 3}
    result = ProbeTrainer(quick(**config)).fit(features, rewards)
    best = result.curve.index(max(result.curve))
    assert 0 < best == len(result.curve) - 1 - 4
    assert (result.metrics["best_step"], result.metrics["steps"]) == (3 * best, 3 * best + 12)
    again = ProbeTrainer(quick(**config, max_steps=3 * best)).fit(features, rewards)
    assert torch.equal(again.probe.first.weight, result.probe.first.weight)


def test_prompts_are_held_out_whole():
    """Rewards that no new prompt can tell: the held-out value stays at the base, however well training fits."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 6, 300, generator=generator)
    rewards = (torch.rand(100, 6, generator=generator) < 0.5).float()
    result = ProbeTrainer(quick(patience=1000)).fit(features, rewards)
    assert result.metrics["prompts"] + result.metrics["validation_prompts"] == 100
    assert sum(result.curve) / len(result.curve) == pytest.approx(result.metrics["base"], abs=0.1)


def test_the_held_out_prompts_are_named():
    features, rewards = problem(0)
    result = ProbeTrainer(quick(max_steps=3)).fit(features, rewards)
    trained = [prompt for prompt in range(80) if prompt not in result.held_out]
    assert len(set(result.held_out)) == len(result.held_out) == result.metrics["validation_prompts"] == 16
    mean = features[trained].flatten(0, 1).mean(0)
    torch.testing.assert_close(result.probe.mean, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("samples", "k"), [(12, 6), (5, 3), (2, 2), (40, 10)])
def test_a_held_out_value_is_the_best_of_half_of_the_samples(samples, k):
    result = ProbeTrainer(quick(max_steps=3)).fit(*problem(0, samples=samples))
    assert result.k == k


def test_the_untrained_probe_is_the_base_policy():
    features, rewards = problem(0)
    metrics = ProbeTrainer(quick(validation_fraction=0.99)).fit(features, rewards).metrics
    assert metrics["base"] == pytest.approx(rewards.mean().item(), abs=0.02)


@pytest.mark.parametrize("loss", ["policy", "bce", "mse", "preference"])
def test_ragged_groups_give_the_same_probe_padded_or_listed(loss):
    features, rewards = problem(0, prompts=30)
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 13, (30,), generator=generator)
    mask = torch.arange(12) < counts[:, None]
    padded = features.masked_fill(~mask[..., None], float("nan")), rewards.masked_fill(~mask, float("nan"))
    listed = (
        [x[m].numpy() for x, m in zip(features, mask, strict=True)],
        [r[m].tolist() for r, m in zip(rewards, mask, strict=True)],
    )
    config = quick(loss=loss, max_steps=10, eval_steps=5)
    first = ProbeTrainer(config).fit(*padded, mask=mask)
    second = ProbeTrainer(config).fit(*listed)
    assert torch.equal(first.probe.first.weight, second.probe.first.weight)
    assert first.curve == second.curve


def test_embeddings_as_float64_arrays():
    features, rewards = problem(0, prompts=20)
    result = ProbeTrainer(quick(max_steps=3)).fit(features.double().numpy(), rewards.numpy().astype(np.int64))
    assert result.spec is None
    assert result.probe.card.policy is None
    assert result.probe.first.weight.dtype == torch.float32


def test_pairs_are_groups_of_two():
    """Preference data: chosen and rejected, rewards 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 2, 8, generator=generator)
    features[:, 0, 3] += 1.5
    result = ProbeTrainer(quick(loss="preference", k_train=2)).fit(features, torch.tensor([[1.0, 0.0]] * 200))
    assert result.metrics["value"] > 0.75


def test_chunks_are_drawn_anew_and_hold_every_sample_once():
    from posttrain.trainers.probe import _Groups

    features, rewards = problem(0, prompts=5)
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[3, 5:] = False
    groups = _Groups.of(features, rewards, mask, None)
    trainer, generator = ProbeTrainer(quick(loss="mse", k_train=5)), torch.Generator().manual_seed(0)
    first, second = (trainer._chunks(groups, generator) for _ in range(2))
    owner = torch.repeat_interleave(torch.arange(5), mask.sum(1))
    for chunks in (first, second):
        assert sorted(chunks[chunks >= 0].tolist()) == list(range(53))
        assert all(len(set(owner[chunk[chunk >= 0]].tolist())) == 1 for chunk in chunks)
    assert {tuple(sorted(chunk.tolist())) for chunk in first} != {tuple(sorted(chunk.tolist())) for chunk in second}


def test_a_saved_probe_scores_the_same(tmp_path):
    features, rewards = problem(0)
    result = ProbeTrainer(quick(max_steps=20)).fit(features[:, :, None], rewards, specs=[FeatureSpec(3)], policy="fp")
    result.probe.save_pretrained(tmp_path)
    assert torch.equal(Probe.from_pretrained(tmp_path, "fp")(features), result.probe(features))


def test_graded_rewards():
    features, rewards = problem(0)
    result = ProbeTrainer(quick()).fit(features, rewards * 10 - 3)
    assert result.metrics["value"] > result.metrics["base"] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "polcy"}, r"loss: must be one of .*did you mean policy\?"),
        ({"k_train": 1}, "k_train: must be at least 2"),
        ({"beta_train": 0.0}, "beta_train: "),
        ({"learning_rate": float("nan")}, "learning_rate: "),
        ({"weight_decay": -1.0}, "weight_decay: "),
        ({"max_steps": 0}, "max_steps: "),
        ({"eval_steps": 0}, "eval_steps: "),
        ({"patience": 0}, "patience: "),
        ({"batch_chunks": 0}, "batch_chunks: "),
        ({"hidden": 0}, "hidden: "),
        ({"dropout": 1.0}, "dropout: must be at least 0 and below 1"),
        ({"dropout": 0.1}, "dropout: its closed form is of a linear probe with loss bce, mse or preference"),
        ({"dropout": 0.1, "loss": "mse", "hidden": 8}, "dropout: its closed form"),
        ({"validation_fraction": 1.0}, "validation_fraction: "),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        ProbeConfig(**changes)


def test_settings_from_yaml_values():
    config = build(ProbeConfig, {"loss": "bce", "learning_rate": "5e-5", "hidden": 256})
    assert config == ProbeConfig(loss="bce", learning_rate=5e-5, hidden=256)
    with pytest.raises(UserError, match="k_trian"):
        build(ProbeConfig, {"k_trian": 4})


FEATURES, REWARDS = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.0, 1, 0, 1]] * 6)


@pytest.mark.parametrize(
    ("features", "rewards", "options", "message"),
    [
        (FEATURES, REWARDS * float("nan"), {}, "rewards: must be finite"),
        (FEATURES, torch.ones(6, 4), {}, "rewards: 0 of 6 prompts"),
        (FEATURES, torch.cat([REWARDS[:1], torch.ones(5, 4)]), {}, "rewards: 1 of 6 prompts"),
        (FEATURES, torch.ones(6, 3), {}, r"rewards: must be \[prompts, samples\] \[6, 4\], got \[6, 3\]"),
        (FEATURES, [[0.0, None, 1.0, 1.0]] * 6, {}, "rewards: not an array"),
        (FEATURES * float("inf"), REWARDS, {}, "features: must be finite"),
        (FEATURES[..., 0], REWARDS, {}, "features: must be"),
        (FEATURES[:, :, None], REWARDS, {"specs": [FeatureSpec(0), FeatureSpec(1)]}, "specs: must name the 1"),
        (FEATURES[..., None], REWARDS, {}, "specs: must name the 3"),
        (FEATURES, REWARDS, {"mask": torch.ones(6, 3, dtype=torch.bool)}, "mask: "),
        (list(FEATURES), list(REWARDS[:5]), {}, "rewards: must have one entry"),
        (list(FEATURES), [1.0] * 6, {}, "rewards: must have one entry"),
        ([*FEATURES[:5], torch.zeros(4, 9)], list(REWARDS), {}, "features: must have the same size"),
        ([], [], {}, "rewards: "),
    ],
)
def test_bad_data(features, rewards, options, message):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        ProbeTrainer(quick(max_steps=1)).fit(features, rewards, **options)
    assert "\n" not in str(caught.value)


def test_cross_entropy_wants_rewards_within_0_and_1():
    with pytest.raises(UserError, match="rewards: .*bce"):
        ProbeTrainer(quick(loss="bce")).fit(FEATURES, REWARDS * 2)


def test_a_run_that_diverges_says_so():
    with pytest.raises(UserError, match="learning_rate: "):
        ProbeTrainer(quick(loss="mse", learning_rate=1e30, standardise=False)).fit(FEATURES * 1e4, REWARDS)


@pytest.mark.slow
def test_ten_thousand_samples_of_4096_features_take_seconds():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(1000, 10, generator=generator) < 0.5).float()
    features = torch.randn(1000, 10, 4096, generator=generator).half()
    features[..., :50] += 0.3 * rewards[..., None]
    ProbeTrainer(quick(max_steps=1)).fit(features[:9], rewards[:9])  # the optimiser's own imports
    started = time.process_time()
    result = ProbeTrainer(ProbeConfig()).fit(features, rewards)
    assert time.process_time() - started < 60
    assert result.metrics["value"] > result.metrics["base"] + 0.1

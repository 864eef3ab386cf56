"""The losses of Q-Probe: every vector of the paper's notes, and the properties that hold for all inputs."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.decoding.rerank import chunked_value
from posttrain.objectives.qprobe import (
    best_of_n,
    dropout_penalty,
    policy_loss,
    policy_value,
    preference_loss,
    reward_loss,
    select,
)

NAN = float("nan")
LOSSES = {
    "mse": lambda scores, rewards, mask=None: reward_loss(scores, rewards, "mse", mask),
    "bce": lambda scores, rewards, mask=None: reward_loss(scores, rewards, "bce", mask),
    "policy": lambda scores, rewards, mask=None: policy_loss(scores, rewards, 0.5, mask),
    "value": lambda scores, rewards, mask=None: policy_value(scores, rewards, 0.5, mask),
}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.detach().double(), double(expected), atol=atol, rtol=0)


def rho(scores, beta):
    """What `policy_value` puts on each sample: its gradient in the rewards. [rows, samples]"""
    rewards = torch.zeros_like(scores, requires_grad=True)
    return torch.autograd.grad(policy_value(scores, rewards, beta), rewards)[0] * len(scores)


# The limit and finite k: a base policy over four actions with scores of their own.
P0, Q0 = double([0.4, 0.3, 0.2, 0.1]), double([0.0, 1.0, 2.0, -1.0])
OPTIMUM = [0.146516, 0.298703, 0.541306, 0.013475]


def reranked_policy(k, beta=1.0):
    """pi_k, summed over every multiset of k actions that the base policy can draw."""
    draws = torch.tensor(list(itertools.combinations_with_replacement(range(4), k)))
    counts = torch.stack([(draws == action).sum(-1) for action in range(4)], -1).double()
    weights = (math.lgamma(k + 1) - torch.lgamma(counts + 1).sum(-1) + counts @ P0.log()).exp()
    kept = rho(Q0[draws], beta) * weights[:, None]
    return torch.stack([kept[draws == action].sum() for action in range(4)])


@pytest.mark.parametrize(
    ("k", "policy", "kl", "distance"),
    [
        (1, [0.4, 0.3, 0.2, 0.1], 0.0, 0.341306),
        (2, [0.302103, 0.350575, 0.306758, 0.040565], 0.064430, 0.234549),
        (3, [0.248832, 0.354516, 0.368882, 0.027770], 0.131312, 0.172425),
        (5, [0.203016, 0.343064, 0.433623, 0.020297], 0.211530, 0.107683),
        (10, [0.171474, 0.323405, 0.488860, 0.016261], 0.286437, 0.052446),
        (48, [0.151098, 0.303863, 0.531072, 0.013967], 0.347929, 0.010234),
    ],
)
def test_vector_finite_k(k, policy, kl, distance):
    reranked = reranked_policy(k)
    close(reranked, policy)
    close((reranked * (reranked / P0).log()).sum(), kl)
    close((reranked - double(OPTIMUM)).abs().sum() / 2, distance, atol=1.5e-6)  # the optimum is rounded, too


def test_vector_first_order_expansion():
    f = (Q0).exp()
    mean = P0 @ f
    optimum = P0 * f / mean
    close(optimum, OPTIMUM)
    variance = P0 @ (f - mean).square()
    expansion = optimum * (1 + (variance / mean**2 - f / mean + 1) / 48)
    close(expansion, [0.150947, 0.303820, 0.531286, 0.013948])
    for k in (5, 10, 48):
        expansion = optimum * (1 + (variance / mean**2 - f / mean + 1) / k)
        assert (k**2 * (reranked_policy(k) - expansion).abs()).max() < 0.5


def test_vector_argmax_of_three():
    policy = reranked_policy(3, beta=0)
    close(policy, [0.124, 0.387, 0.488, 0.001])
    close((policy * (policy / P0).log()).sum(), 0.384010)
    assert (policy * (policy / P0).log()).sum() <= math.log(3) - 2 / 3


@pytest.mark.parametrize(("k", "expected"), [(1, 0.4), (2, 0.391139), (3, 0.382286)])
def test_vector_expected_reward_is_exact_for_every_k(k, expected):
    rewards = double([0.0, 1.0, 0.0, 1.0])
    tuples = torch.tensor(list(itertools.product(range(4), repeat=k)))
    weights = P0[tuples].prod(-1)
    values = torch.stack([policy_value(Q0[t][None], rewards[t][None], 1.0) for t in tuples])
    close(values @ weights, expected)
    close(reranked_policy(k) @ rewards, expected)


def test_vector_one_sample_of_three_carries_a_third():
    tuples = torch.tensor(list(itertools.product(range(4), repeat=3)))
    rewards = double([0.0, 1.0, 0.0, 1.0])[tuples]
    first = (rewards * rho(Q0[tuples], 1.0))[:, 0]
    close(first @ P0[tuples].prod(-1), 0.127429)


SCORES, REWARDS = [0.5, -0.2, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("beta", "weights", "loss", "gradient"),
    [
        (1.0, [0.266536, 0.132358, 0.439444, 0.161662], -0.428198, [-0.152406, 0.056675, 0.188169, -0.092439]),
        (0.1, [0.006693, 0.000006, 0.993256, 0.000045], -0.006738, [-0.066474, 0.0, 0.066922, -0.000448]),
    ],
)
def test_vector_policy_loss(beta, weights, loss, gradient):
    scores = double([SCORES]).requires_grad_()
    close(rho(scores.detach(), beta)[0], weights)
    actual = policy_loss(scores, double([REWARDS]), beta)
    actual.backward()
    close(actual, loss)
    close(scores.grad[0], gradient)
    close(scores.grad.sum(), 0.0, atol=1e-15)


@pytest.mark.parametrize(("baseline", "loss"), [(0.5, 0.071802), (0.34, -0.088198)])
def test_vector_a_baseline_does_not_change_the_gradient(baseline, loss):
    scores = double([SCORES]).requires_grad_()
    (plain,) = torch.autograd.grad(policy_loss(scores, double([REWARDS]), 1.0), scores)
    shifted = policy_loss(scores, double([REWARDS]) - baseline, 1.0)
    close(shifted, loss)
    torch.testing.assert_close(torch.autograd.grad(shifted, scores)[0], plain, atol=1e-15, rtol=0)


def test_vector_leave_one_out_only_rescales_the_gradient():
    scores, rewards = double([SCORES]).requires_grad_(), double([REWARDS])
    (plain,) = torch.autograd.grad(policy_loss(scores, rewards, 1.0), scores)
    advantages = rewards - (rewards.sum() - rewards) / 3
    close(advantages.abs()[0], [0.666667] * 4)
    loss = policy_loss(scores, advantages, 1.0)
    close(loss, 0.095735)
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], plain * 4 / 3, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("loss", "value", "theta_gradient", "bias_gradient"),
    [
        (LOSSES["mse"], 0.141667, [-0.7, -0.033333, -0.166667], -0.733333),
        (LOSSES["bce"], 0.439203, [-0.343170, 0.247901, -0.402725], -0.095268),
        (lambda q, r: policy_loss(q, r, 1.0), -0.860681, [-0.175376, 0.175376, -0.276528], 0.0),
    ],
)
def test_vector_linear_probe(loss, value, theta_gradient, bias_gradient):
    features = double([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [2.0, -1.0, 0.5]])
    theta, bias = double([0.1, -0.2, 0.3]).requires_grad_(), double(0.05).requires_grad_()
    scores = (features @ theta + bias)[None]
    close(scores[0], [0.75, -0.45, 0.60])
    close(rho(scores.detach(), 1.0)[0], [0.462556, 0.139319, 0.398125])
    actual = loss(scores, double([[1.0, 0.0, 1.0]]))
    actual.backward()
    close(actual, value)
    close(theta.grad, theta_gradient)
    close(bias.grad, bias_gradient)


def test_vector_bradley_terry():
    chosen, rejected = double([0.8]).requires_grad_(), double([0.3])
    loss = preference_loss(chosen, rejected)
    loss.backward()
    close(loss, 0.474077)
    close(chosen.grad, [-0.377541])


# ---- properties ----------------------------------------------------------------------------------------------------


def synthetic(seed, prompts=60, samples=40):
    """Features [prompts, samples, 12]: a strong direction of prompt difficulty, a noisy one of quality, and one that
    falls with quality within a prompt but rises with the prompt's ease; the rest is noise."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.randn(prompts, 1, generator=generator)
    quality = torch.randn(prompts, samples, generator=generator)
    rewards = (torch.rand(prompts, samples, generator=generator) < torch.sigmoid(2 * ease + quality - 0.2)).float()
    features = torch.randn(prompts, samples, 12, generator=generator)
    features[..., 0] += 2 * ease
    features[..., 1] = features[..., 1] * 1.5 + quality
    features[..., 2] = features[..., 2] * 0.5 - quality + 2 * ease
    return features, rewards


def trained_scores(loss, seed):
    features, rewards = synthetic(seed)
    theta, bias = torch.zeros(12, requires_grad=True), torch.zeros((), requires_grad=True)
    optimiser = torch.optim.Adam([theta, bias], lr=0.1)
    for _ in range(120):
        optimiser.zero_grad()
        loss((features @ theta + bias).view(-1, 10), rewards.view(-1, 10)).backward()
        optimiser.step()
    test_features, test_rewards = synthetic(seed + 100)
    return (test_features @ theta + bias).detach(), test_rewards


@pytest.mark.slow
def test_with_a_confounded_feature_the_policy_loss_beats_the_pointwise_ones():
    def mean_value(loss, beta):
        return sum(chunked_value(*trained[loss, seed], 10, beta).item() for seed in range(6)) / 6

    losses = {**LOSSES, "policy": lambda scores, rewards: policy_loss(scores, rewards, 1.0)}
    trained = {(n, seed): trained_scores(losses[n], seed) for n in ("policy", "bce", "mse") for seed in range(6)}
    base = sum(trained["policy", seed][1].mean().item() for seed in range(6)) / 6
    for beta in (0, 0.1, 1.0):
        policy = mean_value("policy", beta)
        assert policy > base + 0.05
        for other in ("bce", "mse"):
            assert policy > mean_value(other, beta) + 0.01, (beta, other)


@pytest.mark.parametrize("beta", [0, 0.3])
def test_value_is_what_selection_earns_over_all_tuples(beta):
    scores, rewards = double([0.3, -0.1, 0.3]), double([1.0, 0.25, 0.0])  # a tie, broken by order at beta 0
    p0 = double([0.5, 0.2, 0.3])
    tuples = torch.tensor(list(itertools.product(range(3), repeat=3)))
    probability = p0[tuples].prod(-1)
    value = torch.stack([policy_value(scores[t][None], rewards[t][None], beta) for t in tuples]) @ probability
    draws = 400 if beta else 1
    generator = torch.Generator().manual_seed(0)
    kept = select(scores[tuples].repeat(draws, 1), beta, generator).view(draws, -1)
    earned = (rewards[tuples].gather(1, kept.T).mean(1)) @ probability
    assert earned.item() == pytest.approx(value.item(), abs=0.02 if beta else 1e-12)


def test_selection_follows_rho():
    scores = double([SCORES])
    generator = torch.Generator().manual_seed(1)
    kept = select(scores.expand(20_000, -1), 0.4, generator)
    expected = rho(scores, 0.4)[0] * 20_000
    observed = torch.bincount(kept, minlength=4).double()
    assert ((observed - expected).square() / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001


def test_selection_is_deterministic_by_generator():
    scores = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    first, second = (select(scores, 1.0, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_argmax_takes_the_first_of_a_tie_and_skips_masked_entries():
    scores = torch.tensor([[1.0, 3.0, 3.0], [9.0, 2.0, 2.0], [NAN, -5.0, NAN]])
    mask = torch.tensor([[True, True, True], [False, True, True], [False, True, False]])
    assert select(scores, 0, mask=mask).tolist() == [1, 1, 1]


def test_a_tiny_beta_is_the_argmax():
    scores = torch.tensor([[1.0, 1.001, -4e8], [2.0, -1.0, 0.0]])
    assert select(scores, 1e-30).tolist() == [1, 0]
    assert policy_value(scores, torch.eye(3)[[1, 0]], 1e-8).item() == 1


def test_selection_never_takes_a_masked_entry():
    scores = torch.tensor([[100.0, 0.0, NAN, 0.1]]).expand(500, -1)
    mask = torch.tensor([[False, True, False, True]]).expand(500, -1)
    assert set(select(scores, 1.0, torch.Generator().manual_seed(0), mask).tolist()) == {1, 3}


def test_selection_from_nothing_is_an_error():
    with pytest.raises(ValueError, match="row 1"):
        select(torch.zeros(2, 2), 0, mask=torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_selection_refuses_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        select(torch.tensor([[0.0, bad]]), 0)


@pytest.mark.parametrize("call", [lambda x: select(x, -1.0), lambda x: policy_value(x, x, -1.0)])
def test_negative_beta_is_an_error(call):
    with pytest.raises(ValueError, match="beta"):
        call(torch.zeros(1, 2))


def test_policy_loss_needs_a_positive_beta():
    with pytest.raises(ValueError, match="beta"):
        policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0)


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="hinge"):
        reward_loss(torch.zeros(1, 2), torch.zeros(1, 2), "hinge")


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    ("scores", "rewards", "mask"),
    [
        ([[0.3, -2.0, 1.7]], [[0.7, 0.7, 0.7]], None),
        ([[0.3]], [[1.0]], None),
        ([[0.3, 5.0, NAN]], [[1.0, NAN, NAN]], [[True, False, False]]),
        ([[0.3, 5.0, NAN]], [[0.1, 0.1, 0.0]], [[True, True, False]]),
    ],
)
def test_without_a_contrast_the_gradient_is_exactly_zero(scores, rewards, mask, beta):
    scores = torch.tensor(scores, requires_grad=True)
    policy_loss(scores, torch.tensor(rewards), beta, None if mask is None else torch.tensor(mask)).backward()
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries_are_never_read(name):
    generator = torch.Generator().manual_seed(3)
    scores, rewards = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator)
    mask = torch.tensor([[True, True, False, True], [False] * 4, [False, True, False, True]])
    clean = scores.clone().requires_grad_()
    expected = LOSSES[name](clean, rewards, mask)
    expected.backward()
    dirty = scores.masked_fill(~mask, NAN).requires_grad_()
    actual = LOSSES[name](dirty, rewards.masked_fill(~mask, NAN), mask)
    actual.backward()
    assert actual.item() == expected.item()
    assert torch.equal(dirty.grad, clean.grad)
    assert (dirty.grad[~mask] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_ragged_rows_are_as_if_cut(name):
    generator = torch.Generator().manual_seed(4)
    scores, rewards = torch.randn(2, 4, generator=generator), torch.rand(2, 4, generator=generator)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    actual = LOSSES[name](scores, rewards, mask)
    first = LOSSES[name](scores[:1], rewards[:1])
    second = LOSSES[name](scores[1:, ::2], rewards[1:, ::2])
    share = 1 / 2 if name in ("policy", "value") else 4 / 6  # mean over rows, mean over entries
    torch.testing.assert_close(actual, share * first + (1 - share) * second)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_a_valid_entry_do_not_count(name):
    scores, rewards = torch.tensor([SCORES, [NAN] * 4]), torch.tensor([REWARDS, [NAN] * 4])
    mask = torch.tensor([[True] * 4, [False] * 4])
    torch.testing.assert_close(LOSSES[name](scores, rewards, mask), LOSSES[name](scores[:1], rewards[:1]))


@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_over_nothing_is_zero_with_zero_gradient(name):
    scores = torch.full((2, 3), NAN, requires_grad=True)
    loss = LOSSES[name](scores, scores.detach(), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (scores.grad == 0).all()


def test_no_pairs_is_zero():
    assert preference_loss(torch.zeros(0), torch.zeros(0)).item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_permutation_invariance(name):
    generator = torch.Generator().manual_seed(5)
    scores, rewards = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 6, generator=generator) < 0.7
    rows, columns = torch.randperm(5, generator=generator), torch.randperm(6, generator=generator)
    permuted = [x[rows][:, columns] for x in (scores, rewards, mask)]
    torch.testing.assert_close(LOSSES[name](*permuted), LOSSES[name](scores, rewards, mask))


@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences(name):
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    assert torch.autograd.gradcheck(lambda scores: LOSSES[name](scores, rewards, mask), scores)


def test_preference_finite_differences():
    pairs = torch.randn(2, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda pairs: preference_loss(pairs[0], pairs[1]), pairs)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=6),
    st.floats(1e-4, 1e4),
)
def test_value_lies_between_the_rewards_and_gradients_are_finite(samples, beta):
    scores = torch.tensor([[q for q, _ in samples]], requires_grad=True)
    rewards = torch.tensor([[r for _, r in samples]])
    value = policy_value(scores, rewards, beta)
    value.backward()
    slack = 1e-3 * (1 + rewards.abs().max().item())
    assert rewards.min().item() - slack <= value.item() <= rewards.max().item() + slack
    assert scores.grad.isfinite().all()


@settings(max_examples=50)
@given(st.floats(-100, 100), st.floats(-1e4, 1e4))
def test_constants_added_to_scores_or_rewards_change_nothing_but_the_value(score_shift, reward_shift):
    scores, rewards = double([SCORES]).requires_grad_(), double([REWARDS])
    (plain,) = torch.autograd.grad(policy_loss(scores, rewards, 0.5), scores)
    (moved,) = torch.autograd.grad(policy_loss(scores + score_shift, rewards + reward_shift, 0.5), scores)
    torch.testing.assert_close(moved, plain, atol=1e-9, rtol=0)


# adjacent to Q-Probe: Digi-Q's worked example, of one prompt with four candidates and twin heads
TWINS = torch.tensor([[[0.45, 0.62, 0.58, 0.40]], [[0.40, 0.55, 0.66, 0.48]]], dtype=torch.float64)
VALUES = torch.tensor([[0.50], [0.52]], dtype=torch.float64)


@pytest.mark.parametrize(("reduce", "advantage", "kept"), [("max", 0.14, (True, True)), ("min", 0.08, (True, False))])
def test_vector_best_of_n_by_twin_heads(reduce, advantage, kept):
    for threshold, expected in zip((0.05, 0.10), kept, strict=True):
        chosen, found, above = best_of_n(TWINS, VALUES, threshold, reduce)
        assert (chosen.tolist(), above.tolist()) == ([2], [expected])
        assert found.item() == pytest.approx(advantage, abs=1e-12)


@pytest.mark.parametrize(("reduce", "expected"), [("max", 0.207), ("min", 0.085)])
def test_the_min_of_two_noisy_heads_believes_least_in_the_best_of_equals(reduce, expected):
    noise = 0.1 * torch.randn(2, 20_000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, advantages, _ = best_of_n(noise, torch.zeros(2, 20_000, dtype=torch.float64), 0.0, reduce)
    assert advantages.mean().item() == pytest.approx(expected, abs=0.002)


def test_best_of_n_against_the_mean_of_the_samples():
    scores = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]])
    chosen, advantages, kept = best_of_n(scores)
    assert (chosen.tolist(), advantages.tolist(), kept.tolist()) == ([1, 0], [1.0, 0.0], [True, False])
    with pytest.raises(ValueError, match="head_reduce"):
        best_of_n(scores, head_reduce="median")


# -- dropout of a linear score's inputs, in closed form

INPUTS, THETA = double([1, -2, 0.5, 3]), double([0.2, 0.1, -0.4, 0.3])
SCORE, SPREAD = (INPUTS @ THETA)[None], (INPUTS * THETA).square().sum()[None]


def test_vector_of_the_dropout_penalty():
    right = torch.ones(1, dtype=torch.float64)
    close(reward_loss(SCORE, right, "mse"), 0.09)
    close(reward_loss(SCORE, right, "mse") + dropout_penalty(SCORE, SPREAD, 0.5, "mse"), 1.02)
    close(reward_loss(SCORE, right, "bce") + dropout_penalty(SCORE, SPREAD, 0.5, "bce"), 0.5063, atol=5e-5)


@pytest.mark.parametrize(("kind", "atol"), [("mse", 1e-9), ("bce", 3e-3)])
def test_the_penalty_is_the_mean_over_all_masks(kind, atol):
    """All 16 masks, each entry kept with probability 0.8; exact for squares, to second order for bce."""
    right, penalty = torch.ones(1, dtype=torch.float64), dropout_penalty(SCORE, SPREAD, 0.2, kind)
    mean = torch.zeros((), dtype=torch.float64)
    for kept in itertools.product([0.0, 1.0], repeat=4):
        chance = math.prod(0.8 if one else 0.2 for one in kept)
        mean += chance * reward_loss((INPUTS * double(kept) / 0.8 @ THETA)[None], right, kind)
    close(reward_loss(SCORE, right, kind) + penalty, mean.item(), atol=atol)


def test_masked_scores_have_no_penalty():
    scores, spread = torch.tensor([[0.3, NAN]]), torch.tensor([[2.0, NAN]])
    for kind in ("mse", "bce"):
        found = dropout_penalty(scores, spread, 0.1, kind, torch.tensor([[True, False]]))
        assert found == dropout_penalty(scores[:, 0], spread[:, 0], 0.1, kind)
    assert dropout_penalty(scores[:, 0], spread[:, 0], 0.0) == 0


@pytest.mark.parametrize(("rate", "kind", "message"), [(1.0, "mse", "rate: must be"), (0.1, "policy", "kind: must be")])
def test_bad_dropout(rate, kind, message):
    with pytest.raises(ValueError, match=message):
        dropout_penalty(SCORE, SPREAD, rate, kind)

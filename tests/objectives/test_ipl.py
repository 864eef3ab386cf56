"""IPL: the vector of the paper's account, DPO on a tree by brute force, expectiles, gradients, and what is never read."""

import itertools
import math

import pytest
import torch

from posttrain.objectives.ipl import expectile_loss, implied_rewards, preference_loss, reward_penalty

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


Q = f64([0.2, 0.5, 1], [0.1, 0, 0.2])
V = f64([0.3, 0.4, 0.8], [0.3, 0.1, 0.1])
ALL = torch.ones(2, 3, dtype=torch.bool)


# -- the vector


@pytest.mark.parametrize(
    ("gamma", "difference", "preference", "penalty", "total"),
    [(1.0, 0.4, 0.513015, 0.098333, 0.611349), (0.99, 0.41, 0.509014, 0.097790, 0.606804)],
)
def test_the_vector(gamma, difference, preference, penalty, total):
    rewards = implied_rewards(Q, V, ALL, gamma)
    if gamma == 1:
        torch.testing.assert_close(rewards, f64([-0.2, -0.3, 1], [0, -0.1, 0.2]))
    assert (rewards[0].sum() - rewards[1].sum()).item() == pytest.approx(difference, abs=1e-12)
    found = preference_loss(rewards[:1], rewards[1:]), reward_penalty(rewards, ALL, 0.5)
    assert [part.item() for part in found] == pytest.approx([preference, penalty], abs=1e-6)
    assert sum(found).item() == pytest.approx(total, abs=1e-6)


# -- a tree: two tokens, three deep; states are prefixes


def tree(seed=0):
    """Q of every action in every state of the tree, {prefix: [2]}."""
    generator = torch.Generator().manual_seed(seed)
    states = [prefix for depth in range(3) for prefix in itertools.product((0, 1), repeat=depth)]
    return {state: torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True) for state in states}


def of_path(q, path):
    """Q of the path's actions and V = log sum exp Q before each, [1, time] both."""
    states = [path[:depth] for depth in range(len(path))]
    taken = torch.stack([q[state][action] for state, action in zip(states, path, strict=True)])
    return taken[None], torch.stack([q[state].logsumexp(0) for state in states])[None]


def log_law(q, path):
    return sum(torch.log_softmax(q[path[:depth]], 0)[action] for depth, action in enumerate(path))


def test_with_soft_values_it_is_dpo_without_a_reference():
    """Over all pairs of leaves, loss and gradient; and the sum of a path is V of the root and its log-probability."""
    q = tree()
    leaves = list(itertools.product((0, 1), repeat=3))
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = {leaf: implied_rewards(*of_path(q, leaf), mask) for leaf in leaves}
    for leaf in leaves:
        torch.testing.assert_close(rewards[leaf].sum(), q[()].logsumexp(0) + log_law(q, leaf))
    pairs = list(itertools.permutations(leaves, 2))
    chosen, rejected = (torch.cat([rewards[pair[i]] for pair in pairs]) for i in (0, 1))
    found = preference_loss(chosen, rejected)
    dpo = -torch.stack([torch.sigmoid(log_law(q, one) - log_law(q, other)).log() for one, other in pairs]).mean()
    torch.testing.assert_close(found, dpo, atol=1e-12, rtol=0)
    weights = list(q.values())
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(dpo, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_segment_may_have_any_length():
    q, values, mask = Q.clone(), V.clone(), ALL.clone()
    mask[1, 2] = False  # the rejected one ends a token earlier, in V = 0
    rewards = implied_rewards(q, values, mask)
    torch.testing.assert_close(rewards, f64([-0.2, -0.3, 1], [0, 0, 0]))
    assert reward_penalty(rewards, mask, 1.0).item() == pytest.approx((1.13 / 3 + 0) / 2)
    assert preference_loss(rewards[:1], rewards[1:]).item() == pytest.approx(math.log1p(math.exp(-0.5)))


# -- expectiles


def fitted(samples, tau):
    """The V that the loss is least at, by brute force over a grid."""
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    mask = torch.ones(1, len(samples), dtype=torch.bool)
    losses = [expectile_loss(samples[None], value.expand(1, len(samples)), mask, tau) for value in grid]
    return grid[int(torch.stack(losses).argmin())].item()


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9])
def test_the_minimiser_is_the_expectile(tau):
    """Where tau of the mass of errors lies above: tau * E(u+) = (1 - tau) * E(u-)."""
    samples = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = samples.min(), samples.max()
    for _ in range(60):
        middle = (low + high) / 2
        balance = tau * (samples - middle).clamp(min=0).sum() - (1 - tau) * (middle - samples).clamp(min=0).sum()
        low, high = (middle, high) if balance > 0 else (low, middle)
    assert fitted(samples, tau) == pytest.approx(middle.item(), abs=6e-4)


def test_half_is_the_mean_and_one_the_maximum():
    samples = f64(-1, 0, 0.5, 2)
    assert fitted(samples, 0.5) == pytest.approx(samples.mean().item(), abs=6e-4)
    assert fitted(samples, 0.9999) == pytest.approx(2, abs=5e-3)
    assert expectile_loss(
        samples[None], torch.zeros(1, 4, dtype=torch.float64), ALL[:1].new_ones(1, 4), 0.5
    ).item() == (pytest.approx(samples.square().mean().item() / 2))


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.1])
def test_tau_is_checked(tau):
    with pytest.raises(ValueError, match="tau: must lie between 0 and 1"):
        expectile_loss(Q, V, ALL, tau)


# -- gradients, and masks


def loss(q, values, mask):
    rewards = implied_rewards(q, values, mask)
    return preference_loss(*rewards.chunk(2)) + reward_penalty(rewards, mask) + expectile_loss(q, values, mask)


def test_gradients():
    q, values = Q.clone().requires_grad_(), V.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss(Q, values, ALL), values)

    def of_q(q):
        rewards = implied_rewards(q, V, ALL)
        return preference_loss(*rewards.chunk(2)) + reward_penalty(rewards, ALL)

    assert torch.autograd.gradcheck(of_q, q)
    expectile_loss(q, values, ALL).backward()
    assert q.grad is None and (values.grad != 0).all()


def test_what_is_masked_is_never_read():
    """A prompt before, padding after: as if they were not there, in the gradient too."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    q, values = (torch.full((2, 5), NAN, dtype=torch.float64).masked_scatter(mask, each) for each in (Q, V))
    q.requires_grad_(), values.requires_grad_()
    found = loss(q, values, mask)
    assert found.item() == pytest.approx(loss(Q, V, ALL).item(), abs=1e-12)
    found.backward()
    for each in (q, values):
        assert (each.grad[~mask] == 0).all() and each.grad[mask].isfinite().all()

"""DQO's returns, weights and losses: the paper account's numbers, brute force on its tree of 15 completions, the edges."""

import math

import pytest
import torch

from posttrain.objectives.dqo import (
    importance_weights,
    kl_rewards,
    label_count,
    lambda_returns,
    policy_loss,
    token_rewards,
    value_loss,
)
from posttrain.objectives.soft import soft_value

NAN = float("nan")
LAMBDAS = (1.0, 0.95, 0.5, 0.0)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


# -- oracles: plain loops, from the equations


def looped_returns(rewards, values, lam):
    """G of one sequence by the recursion, backwards."""
    following_value = following_return = 0.0
    returns = []
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following_return = reward + (1 - lam) * following_value + lam * following_return
        following_value = value
        returns.insert(0, following_return)
    return returns


def mixed_returns(rewards, values, lam):
    """G of one sequence by its definition, a geometric mixture of n-step returns."""

    def n_step(h, n):
        return sum(rewards[h : h + n]) + (values[h + n] if h + n < len(values) else 0)

    returns = []
    for h in range(len(rewards)):
        left = len(rewards) - h
        mixture = (1 - lam) * sum(lam ** (n - 1) * n_step(h, n) for n in range(1, left))
        returns.append(mixture + lam ** (left - 1) * n_step(h, left))
    return returns


def losses(logprobs, ref_logprobs, values, rewards, mask, beta, lam=1.0, mu=None, full_gradient=False, **options):
    """(L_Q, L_V) as a trainer computes them; mu: log mu, None for no weights."""
    segments = options.get("segments")
    paid = kl_rewards(logprobs, ref_logprobs, rewards, mask, beta)
    returns = lambda_returns(paid, values, mask, lam, segments)
    if mu is not None:
        options["weights"] = importance_weights(logprobs, mu, mask, segments=segments)
    policy = policy_loss(
        logprobs, ref_logprobs, values, rewards, returns, mask, beta, full_gradient=full_gradient, **options
    )
    return policy, value_loss(values, returns, mask, **options)


# -- TV1: a worked batch with padding; whatever is masked is NaN

BETA = 0.1
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
LOGPROBS = f64([-0.5, -1.2, -0.3, -0.9], [-0.7, -2.0, NAN, NAN])
REF = f64([-0.8, -1.0, -0.6, -1.0], [-0.4, -1.5, NAN, NAN])
VALUES = f64([0.4, 0.5, 0.3, 0.7], [0.4, 0.2, NAN, NAN])
REWARDS = f64([0, 0, 0, 1], [0, 0, NAN, NAN])
PROCESS = f64([0, 0.25, 0, 0.75], [0, -0.5, NAN, NAN])
RETURNS = {
    1.0: f64([0.95, 0.98, 0.96, 0.99], [0.08, 0.05, 0, 0]),
    0.95: f64([0.881564, 0.933225, 0.9455, 0.99], [0.0875, 0.05, 0, 0]),
    0.5: f64([0.50875, 0.5775, 0.815, 0.99], [0.155, 0.05, 0, 0]),
    0.0: f64([0.47, 0.32, 0.67, 0.99], [0.23, 0.05, 0, 0]),
}
LOSSES = {  # (normalisation, weighted): [(L_Q, L_V) for each of LAMBDAS]
    ("seq", False): [(0.162800, 0.162800), (0.154928, 0.145084), (0.112935, 0.066526), (0.102213, 0.045137)],
    ("seq", True): [(0.230961, 0.230961), (0.217982, 0.203174), (0.148748, 0.084938), (0.131069, 0.059007)],
    ("token", False): [(0.196250, 0.196250), (0.185754, 0.173419), (0.129764, 0.074947), (0.115467, 0.051617)],
    ("token", True): [(0.298594, 0.298594), (0.281290, 0.261901), (0.188977, 0.107070), (0.165405, 0.074827)],
}


def worked(**changes):
    """Losses of the worked batch, and its gradients [(dL_Q, dL_V)] for log pi and V."""
    logprobs, values = LOGPROBS.clone().requires_grad_(), VALUES.clone().requires_grad_()
    weighted = changes.pop("weighted", False)
    rewards = changes.pop("rewards", REWARDS)
    found = losses(logprobs, REF, values, rewards, MASK, BETA, mu=REF if weighted else None, **changes)
    gradients = [torch.autograd.grad(loss, (logprobs, values), retain_graph=True, allow_unused=True) for loss in found]
    return [loss.detach() for loss in found], gradients


def test_tv1_kl_rewards():
    close(kl_rewards(LOGPROBS, REF, REWARDS, MASK, BETA), f64([-0.03, 0.02, -0.03, 0.99], [0.03, 0.05, 0, 0]))


@pytest.mark.parametrize("lam", LAMBDAS)
def test_tv1_returns(lam):
    close(lambda_returns(kl_rewards(LOGPROBS, REF, REWARDS, MASK, BETA), VALUES, MASK, lam), RETURNS[lam])


def test_tv1_weights():
    close(importance_weights(LOGPROBS, REF, MASK), (1.648721, 0.449329))
    likely = f64([-0.1, -0.2, -0.1, -0.1], [-0.7, -2.0, NAN, NAN])
    close(importance_weights(likely, REF, MASK), (math.e, 0.449329))
    close(importance_weights(likely, REF, MASK, cap=math.inf), (18.174145, 0.449329))
    close(importance_weights(likely, REF, MASK, cap=0.1), (0.1, 0.1), 1e-12)


@pytest.mark.parametrize(("normalisation", "weighted"), LOSSES)
@pytest.mark.parametrize("lam", LAMBDAS)
def test_tv1_losses(lam, normalisation, weighted):
    found, _ = worked(lam=lam, normalisation=normalisation, weighted=weighted)
    close(torch.stack(found), LOSSES[normalisation, weighted][LAMBDAS.index(lam)])


@pytest.mark.parametrize(
    ("lam", "policy_residuals", "value_residuals"),
    [
        (1.0, ([-0.55, -0.48, -0.66, -0.29], [0.32, 0.15]), ([-0.55, -0.48, -0.66, -0.29], [0.32, 0.15])),
        (
            0.95,
            ([-0.503225, -0.4655, -0.66, -0.29], [0.32, 0.15]),
            ([-0.481564, -0.433225, -0.6455, -0.29], [0.3125, 0.15]),
        ),
        (0.5, ([-0.1475, -0.335, -0.66, -0.29], [0.32, 0.15]), ([-0.10875, -0.0775, -0.515, -0.29], [0.245, 0.15])),
        (0.0, ([0.11, -0.19, -0.66, -0.29], [0.32, 0.15]), ([-0.07, 0.18, -0.37, -0.29], [0.17, 0.15])),
    ],
)
def test_tv1_residuals(lam, policy_residuals, value_residuals):
    """From the gradients: of the sum of squares, 2 * beta * delta_Q and 2 * delta_V."""
    _, ((by_logprobs, _), (_, by_values)) = worked(lam=lam, denominator=1)
    close((by_logprobs / (2 * BETA))[MASK], [*policy_residuals[0], *policy_residuals[1]])
    close((by_values / 2)[MASK], [*value_residuals[0], *value_residuals[1]])


def test_tv1_gradients():
    _, ((by_logprobs, _), (_, by_values)) = worked(normalisation="seq")
    close(by_logprobs, f64([-0.01375, -0.012, -0.0165, -0.00725], [0.016, 0.0075, 0, 0]))
    close(by_values, f64([-0.1375, -0.12, -0.165, -0.0725], [0.16, 0.075, 0, 0]))
    _, ((by_logprobs, _), _) = worked(normalisation="seq", weighted=True)
    close(by_logprobs, f64([-0.0226699, -0.0197847, -0.0272039, -0.0119532], [0.0071893, 0.00337, 0, 0]), 1e-7)


@pytest.mark.parametrize("full_gradient", [False, True])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_tv1_neither_loss_trains_the_other_s_parameters(lam, full_gradient):
    """The weights and the returns pass nothing on, in full_gradient to the values neither."""
    _, ((_, policy_to_values), (value_to_logprobs, _)) = worked(lam=lam, weighted=True, full_gradient=full_gradient)
    assert policy_to_values is None and value_to_logprobs is None


def test_tv1_full_gradient():
    (policy, _), ((by_logprobs, _), _) = worked(normalisation="seq", full_gradient=True)
    close(policy, 0.162800)
    close(by_logprobs, f64([-0.01375, -0.02575, -0.04225, -0.0495], [0.016, 0.0235, 0, 0]))


@pytest.mark.parametrize("lam", LAMBDAS)
def test_full_gradient_is_the_derivative_with_the_values_held(lam):
    logprobs = LOGPROBS[:1].clone().requires_grad_()

    def loss(logprobs):
        return losses(
            logprobs, REF[:1], VALUES[:1], REWARDS[:1], MASK[:1], BETA, lam, full_gradient=True, normalisation="seq"
        )[0]

    assert torch.autograd.gradcheck(loss, (logprobs,))


@pytest.mark.parametrize(
    ("lam", "expected", "returns"),
    [
        (1.0, (0.361550, 0.361550), ([0.95, 0.98, 0.71, 0.74], [-0.42, -0.45, 0, 0])),
        (0.95, (0.358293, 0.339690), ([0.90472, 0.9576, 0.708, 0.74], [-0.3875, -0.45, 0, 0])),
    ],
)
def test_tv1_process_rewards(lam, expected, returns):
    found, _ = worked(lam=lam, rewards=PROCESS, normalisation="seq")
    close(torch.stack(found), expected)
    close(lambda_returns(kl_rewards(LOGPROBS, REF, PROCESS, MASK, BETA), VALUES, MASK, lam), f64(*returns), 1e-5)


def test_tv1_the_pad_trap():
    """A value that stands in the padding is not V after the last token; only lam < 1 would show it."""
    padded = VALUES.nan_to_num(9.0)
    found = lambda_returns(kl_rewards(LOGPROBS, REF, REWARDS, MASK, BETA), padded, MASK, 0.95)
    close(found[1], (0.0875, 0.05, 0, 0))
    trapped = looped_returns([0.03, 0.05, 0.0], [0.4, 0.2, 9.0], 0.95)
    assert trapped[:2] != pytest.approx([0.0875, 0.05])


def test_tv2_through_the_softmax():
    """Token 1 of three, V = .3, and a return of 1 after it; the second token's own residual is 0."""
    logits = f64(0.2, -0.1, 0.5).requires_grad_()
    ref = f64([1 / 3, 1 / 3]).log()
    logprobs = torch.stack((torch.log_softmax(logits, -1)[1], ref[0, 1]))[None]
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = policy_loss(logprobs, ref, f64([0.3, 0]), f64([0, 0]), f64([NAN, 1]), mask, 0.1, denominator=1)
    close(loss.detach(), 0.537256)
    close(torch.autograd.grad(loss, logits)[0], (0.0474315, -0.1114574, 0.0640259), 1e-7)


# -- the tree: three tokens, the last of which (2) ends a completion; the third ends it anyway

STATES = ["", "0", "1", "00", "01", "10", "11"]
REF_LOGITS = f64(
    [0.5, 0.1, -0.9],
    [0.2, -0.4, 0.3],
    [-0.1, 0.6, 0],
    [0.3, 0, -0.2],
    [-0.5, 0.4, 0.1],
    [0, 0.2, -0.3],
    [0.7, -0.6, 0.2],
)
LEAVES = {
    "2": 0.1,
    "02": 0.3,
    "12": -0.2,
    "000": 1,
    "001": 0,
    "002": 0.6,
    "010": -0.5,
    "011": 0.2,
    "012": 0.4,
    "100": 0.9,
    "101": -0.1,
    "102": 0,
    "110": 0.5,
    "111": 0.8,
    "112": -0.3,
}
TREE_BETA = 0.5


def grid(of, empty, dtype=None):
    """[leaves, time] of (leaf, position)."""
    rows = [[of(leaf, h) if h < len(leaf) else empty for h in range(3)] for leaf in LEAVES]
    return torch.tensor(rows, dtype=dtype)


STATE = grid(lambda leaf, h: STATES.index(leaf[:h]), 0)
ACTION = grid(lambda leaf, h: int(leaf[h]), 0)
TREE_MASK = grid(lambda leaf, h: True, False)
TREE_REWARDS = grid(lambda leaf, h: float(LEAVES[leaf]) if h == len(leaf) - 1 else 0.0, NAN, torch.float64)


def of_tokens(logits):
    """log pi of the leaves' tokens, NaN beyond their ends."""
    return torch.log_softmax(logits, -1)[STATE, ACTION].masked_fill(~TREE_MASK, NAN)


TREE_REF = of_tokens(REF_LOGITS)
UNDER_REF = TREE_REF.nansum(-1).exp()  # probability of every leaf
UNIFORM = torch.full_like(UNDER_REF, 1 / len(LEAVES))


def spread(law):
    """Log-probabilities of tokens that add up to the law of the leaves."""
    return (law.log() / TREE_MASK.sum(-1))[:, None].expand(TREE_MASK.shape)


def optimum(reward=lambda prefix: LEAVES.get(prefix, 0.0), beta=TREE_BETA):
    """(pi* [states, actions], V* [states]) by backward induction; reward: paid on arrival at a prefix."""
    values, policy = {}, {}
    for state in sorted(STATES, key=len, reverse=True):
        q = f64(*(reward(state + action) + values.get(state + action, 0.0) for action in "012"))
        ref = torch.log_softmax(REF_LOGITS[STATES.index(state)], -1)
        values[state] = soft_value(q, ref, beta).item()
        policy[state] = (ref + (q - values[state]) / beta).exp()
    return torch.stack([policy[state] for state in STATES]), f64(*(values[state] for state in STATES))


POLICY, OPTIMAL_VALUES = optimum()


def objective(policy):
    """J: E[R] - beta * KL over whole completions, by enumeration."""
    logprobs = of_tokens(policy.log())
    law = logprobs.nansum(-1).exp()
    return (law * (f64(*LEAVES.values()) - TREE_BETA * (logprobs - TREE_REF).nansum(-1))).sum()


def tree_losses(logits, values, **options):
    return losses(of_tokens(logits), TREE_REF, values[STATE], TREE_REWARDS, TREE_MASK, TREE_BETA, **options)


def test_tree_optimum():
    close(OPTIMAL_VALUES, (0.406402, 0.497335, 0.337347, 0.731780, 0.213335, 0.483481, 0.425531))
    close(
        POLICY,
        f64(
            [0.625720, 0.304578, 0.069702],
            [0.602196, 0.117178, 0.280626],
            [0.325197, 0.583200, 0.091603],
            [0.728443, 0.073033, 0.198524],
            [0.045460, 0.453426, 0.501114],
            [0.776545, 0.128362, 0.095093],
            [0.617649, 0.306716, 0.075635],
        ),
    )
    close(objective(torch.softmax(REF_LOGITS, -1)), 0.259268)
    close(objective(POLICY), 0.406402)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_tree_the_returns_of_the_optimum_are_its_values_on_every_completion(lam):
    logprobs, values = of_tokens(POLICY.log()), OPTIMAL_VALUES[STATE]
    returns = lambda_returns(kl_rewards(logprobs, TREE_REF, TREE_REWARDS, TREE_MASK, TREE_BETA), values, TREE_MASK, lam)
    close(returns[TREE_MASK], values[TREE_MASK], 1e-15)
    close(torch.stack(tree_losses(POLICY.log(), OPTIMAL_VALUES, lam=lam)), (0, 0), 1e-30)


TREE_LOSSES = {  # (normalisation, weighted, lam): L_Q / L_V after 0, 1, 10, 50 steps
    ("token", False, 1.0): [(0.270732,), (0.222102,), (0.145502,), (0.051428,)],
    ("token", True, 1.0): [(0.270732,), (0.225773,), (0.147873,), (0.047356,)],
    ("token", False, 0.95): [(0.262147, 0.245505), (0.216759, 0.203124), (0.141242, 0.132405), (0.049854, 0.046725)],
    ("token", True, 0.95): [(0.262147, 0.245505), (0.220363, 0.206496), (0.143744, 0.134781), (0.045920, 0.043073)],
    ("seq", False, 1.0): [(0.250000,), (0.207561,), (0.138480,), (0.051760,)],
    ("seq", True, 1.0): [(0.250000,), (0.210326,), (0.141411,), (0.048674,)],
    ("seq", False, 0.95): [(0.242178, 0.226875), (0.202417, 0.189730), (0.134486, 0.126099), (0.050175, 0.047013)],
    ("seq", True, 0.95): [(0.242178, 0.226875), (0.205128, 0.192265), (0.137444, 0.128903), (0.047223, 0.044280)],
}


@pytest.mark.parametrize(("normalisation", "weighted", "lam"), TREE_LOSSES)
def test_tree_losses_of_plain_gradient_descent(normalisation, weighted, lam):
    logits, values = REF_LOGITS.clone().requires_grad_(), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([logits, values], lr=1.0)
    expected = dict(zip((0, 1, 10, 50), TREE_LOSSES[normalisation, weighted, lam], strict=True))
    for step in range(51):
        mu = TREE_REF if weighted else None
        policy, value = tree_losses(logits, values, lam=lam, mu=mu, normalisation=normalisation)
        if step in expected:
            close(torch.stack((policy, value)).detach(), torch.broadcast_to(f64(*expected[step]), (2,)))
        optimiser.zero_grad()
        (policy + value).backward()
        optimiser.step()


def test_tree_gradients_at_the_start():
    logits, values = REF_LOGITS.clone().requires_grad_(), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    policy, value = tree_losses(logits, values)
    policy.backward()
    value.backward()
    close(logits.grad[0], (-0.001703, -0.007467, 0.009170))
    close(values.grad, (-0.180488, -0.097561, -0.078049, -0.078049, -0.004878, -0.039024, -0.048780))


def learned(mu, lam, weighted, full_gradient=False, scalar=False, normalisation="token", steps=600):
    """(pi, V) where Adam ends, from pi_ref and V = 0; leaves count as often as mu samples them."""
    logits = REF_LOGITS.clone().requires_grad_()
    values = torch.zeros(1 if scalar else 7, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits, values], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        logprobs, per_token = of_tokens(logits), values.expand(7)[STATE]
        weights = mu * (importance_weights(logprobs, spread(mu), TREE_MASK) if weighted else 1)
        paid = kl_rewards(logprobs, TREE_REF, TREE_REWARDS, TREE_MASK, TREE_BETA)
        returns = lambda_returns(paid, per_token, TREE_MASK, lam)
        loss = value_loss(per_token, returns, TREE_MASK, weights, normalisation) + policy_loss(
            logprobs,
            TREE_REF,
            per_token,
            TREE_REWARDS,
            returns,
            TREE_MASK,
            TREE_BETA,
            weights,
            normalisation,
            full_gradient,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return torch.softmax(logits.detach(), -1), values.detach()


def converges(mu, lam, weighted, full_gradient=False, steps=600):
    policy, values = learned(mu, lam, weighted, full_gradient, steps=steps)
    close(policy, POLICY, 1e-8)
    close(values, OPTIMAL_VALUES, 1e-8)


@pytest.mark.slow
def test_tree_converges_to_the_optimum():
    converges(UNDER_REF, 1.0, weighted=True)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("mu", [UNDER_REF, UNIFORM], ids=["reference", "uniform"])
def test_tree_converges_whoever_sampled_and_whatever_lam_and_weights(mu, lam, weighted):
    converges(mu, lam, weighted)


@pytest.mark.slow
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("mu", [UNDER_REF, UNIFORM], ids=["reference", "uniform"])
def test_tree_full_gradient_converges(mu, lam):
    converges(mu, lam, weighted=False, full_gradient=True, steps=1200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lam", "weighted", "full_gradient", "expected"),
    [
        (1.0, False, False, 0.3998),
        (1.0, True, False, 0.4061),
        (1.0, False, True, 0.4046),
        (0.0, False, False, 0.3968),
        (0.0, True, False, 0.4027),
    ],
)
def test_tree_one_value_for_all_states(lam, weighted, full_gradient, expected):
    """Failure 2 of the paper's account: V cannot be right; the weights and lam = 1 both help. Its figures are of `seq`."""
    policy, _ = learned(UNDER_REF, lam, weighted, full_gradient, scalar=True, normalisation="seq")
    close(objective(policy), expected, 5e-5)


def learned_in_one_graph(stop):
    """pi after the last of those runs, one value and lam = 0, with both losses written out.

    stop: what keeps the gradient of L_Q from V, and that of L_V from G.
    """
    logits, value = REF_LOGITS.clone().requires_grad_(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits, value], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 600)
    rewards = TREE_REWARDS.where(TREE_MASK, 0)

    def following(x):
        return torch.nn.functional.pad(x[:, 1:], (0, 1))

    for _ in range(600):
        log_ratios, values = (of_tokens(logits) - TREE_REF).where(TREE_MASK, 0), value * TREE_MASK
        paid = rewards - TREE_BETA * log_ratios
        to_go = following(paid + following(stop(values)))
        of_policy = TREE_BETA * log_ratios + stop(values) - rewards - to_go
        of_value = values - stop(paid + following(values))
        loss = (UNDER_REF * ((of_policy**2 + of_value**2) * TREE_MASK).sum(1) / TREE_MASK.sum(1)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return torch.softmax(logits.detach(), -1)


@pytest.mark.slow
def test_tree_full_gradient_is_of_later_log_probabilities_alone():
    """The account's last figure, 0.3887, stops no gradient at all; `full_gradient` keeps V out of L_Q and G out of L_V."""
    policy, _ = learned(UNDER_REF, 0.0, False, full_gradient=True, scalar=True, normalisation="seq")
    close(policy, learned_in_one_graph(stop=torch.Tensor.detach), 1e-9)
    close(objective(policy), 0.3922, 5e-5)
    close(objective(learned_in_one_graph(stop=lambda x: x)), 0.3887, 5e-5)


def test_tree_weights_undo_the_bias_of_values_learned_off_policy():
    """Failure 1: of a policy half-way to the optimum, on samples of pi_ref."""
    logits = (torch.log_softmax(REF_LOGITS, -1) + POLICY.log()) / 2
    logprobs = of_tokens(logits)
    paid = kl_rewards(logprobs, TREE_REF, TREE_REWARDS, TREE_MASK, TREE_BETA)

    def regressed(weights, normalisation="token"):
        """Where L_V is least, in one Newton step: it is a sum of squares of one parameter each."""
        values = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        returns = lambda_returns(paid, values[STATE], TREE_MASK, 1.0)
        weights = UNDER_REF * weights

        def gradient(values):
            loss = value_loss(values[STATE], returns, TREE_MASK, weights, normalisation)
            return torch.autograd.grad(loss, values)[0]

        at_zero = gradient(values)
        return at_zero / (at_zero - gradient(values + 1))

    truth, policy = {}, torch.softmax(logits, -1)
    for state in reversed(STATES):
        row = STATES.index(state)
        log_ratios = policy[row].log() - torch.log_softmax(REF_LOGITS[row], -1)
        ahead = f64(*(LEAVES[state + a] if state + a in LEAVES else truth[state + a] for a in "012"))
        truth[state] = (policy[row] * (ahead - TREE_BETA * log_ratios)).sum().item()
    truth = f64(*(truth[state] for state in STATES))

    close(truth[0], 0.3720, 5e-5)
    close(regressed(1)[0], 0.2989, 5e-5)
    close(regressed(importance_weights(logprobs, TREE_REF, TREE_MASK)), truth, 1e-12)  # the cap does not bind
    tight = regressed(importance_weights(logprobs, TREE_REF, TREE_MASK, cap=1.2))
    close((tight - truth).abs().max(), 0.0546, 5e-5)
    by_sequence = regressed(importance_weights(logprobs, TREE_REF, TREE_MASK), "seq")
    close((by_sequence - truth).abs().max(), 0.026, 5e-4)


def test_tree_noise_in_the_reward_leaves_the_optimum_where_it_is():
    """Every completion twice, its reward one higher and one lower: no gradient at (pi*, V*)."""
    logits, values = POLICY.log().requires_grad_(), OPTIMAL_VALUES.clone().requires_grad_()
    ends = torch.where(TREE_REWARDS.roll(-1, 1).isnan() | (torch.arange(3) == 2), 1.0, 0.0)
    twice = [tensor.repeat(2, 1) for tensor in (of_tokens(logits), TREE_REF, values[STATE])]
    rewards = torch.cat((TREE_REWARDS + ends, TREE_REWARDS - ends))
    policy, value = losses(*twice, rewards, TREE_MASK.repeat(2, 1), TREE_BETA)
    (policy + value).backward()
    assert policy > 0.1 and value > 0.1
    close(logits.grad, torch.zeros(7, 3), 1e-14)
    close(values.grad, torch.zeros(7), 1e-14)


# -- process rewards


def steps_of(leaf, potential):
    """(index, score) of every prefix of a leaf, the leaf included."""
    return [(h - 1, potential[leaf[:h]]) for h in range(1, len(leaf) + 1)]


def tree_process_rewards(kind):
    """(reward on arrival at a prefix, potential): of `token_rewards`, read off the leaves."""
    generator = torch.Generator().manual_seed(0)
    prefixes = sorted({leaf[:h] for leaf in LEAVES for h in range(1, len(leaf) + 1)})
    scores = torch.rand(len(prefixes), generator=generator, dtype=torch.float64).tolist()
    potential = dict(zip(prefixes, scores, strict=True))
    paid = {}
    for leaf, outcome in LEAVES.items():
        for h, reward in enumerate(token_rewards(outcome, len(leaf), steps_of(leaf, potential), kind).tolist()):
            assert paid.setdefault(leaf[: h + 1], reward) == reward  # a function of state and action
    return paid, potential


def test_shaping_keeps_the_optimal_policy_and_shifts_its_values():
    paid, potential = tree_process_rewards("shaping")
    policy, values = optimum(lambda prefix: paid[prefix])
    close(policy, POLICY)
    close(values, OPTIMAL_VALUES - f64(*(potential.get(state, 0.0) for state in STATES)))


def test_additive_scores_change_the_optimal_policy():
    paid, _ = tree_process_rewards("additive")
    policy, _ = optimum(lambda prefix: paid[prefix])
    assert (policy - POLICY).abs().max() > 0.05


def test_token_rewards():
    assert token_rewards(1.0, 4).tolist() == [0, 0, 0, 1]
    assert token_rewards(1.0, 4, [(3, 0.5), (1, 0.25), (1, 0.5)], scale=2).tolist() == [0, 1.5, 0, 2]
    assert token_rewards(1.0, 5, [(3, 0.5), (1, 0.25)], "shaping").tolist() == [0, 0.25, 0, 0.25, 0.5]
    assert token_rewards(1.0, 5, [(1, 0.25), (4, 9.0)], "shaping", scale=2).tolist() == [0, 0.5, 0, 0, 0.5]
    assert token_rewards(1.0, 0).tolist() == []


# -- any batch: ragged rows of random numbers


def ragged(lengths=(5, 1, 7, 2, 3), begins=None, seed=0):
    """(log pi, log pi_ref, values, rewards, mask) in float64, NaN where masked; rows begin at `begins`, or at 0."""
    generator = torch.Generator().manual_seed(seed)
    begins = begins or [0] * len(lengths)
    time = torch.arange(max(b + n for b, n in zip(begins, lengths, strict=True)))
    mask = torch.stack([(time >= b) & (time < b + n) for b, n in zip(begins, lengths, strict=True)])
    numbers = [torch.full(mask.shape, NAN, dtype=torch.float64) for _ in range(4)]
    for tensor in numbers:
        for row, length in enumerate(lengths):
            tensor[row, mask[row]] = torch.randn(length, generator=generator, dtype=torch.float64)
    return (*numbers, mask)


def packed(batch, rows):
    """The ragged batch's sequences, several in each of `rows` (lists of their numbers), and their segments."""
    mask = batch[-1]
    lengths = mask.sum(-1).tolist()
    # Each comes behind a prompt of two masked tokens; what is left of a row is masked too.
    time = max(sum(lengths[i] + 2 for i in row) for row in rows) + 1
    shape = len(rows), time
    tensors = [torch.full(shape, NAN, dtype=torch.float64) for _ in range(4)]
    packed_mask, segments = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for row, members in enumerate(rows):
        at = 0
        for i in members:
            span = slice(at + 2, at + 2 + lengths[i])
            for tensor, source in zip(tensors, batch, strict=False):
                tensor[row, span] = source[i, mask[i]]
            packed_mask[row, span] = True
            segments[row, at : span.stop] = i
            at = span.stop
    return (*tensors, packed_mask), segments


@pytest.mark.parametrize("lam", [1.0, 0.99, 0.95, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("oracle", [looped_returns, mixed_returns])
def test_returns_are_those_of_the_loop(oracle, lam):
    _, _, values, rewards, mask = ragged((5, 1, 7, 2, 3, 16, 17, 33))
    found = lambda_returns(rewards, values, mask, lam)
    for row in range(len(mask)):
        valid = mask[row]
        close(found[row, valid], oracle(rewards[row, valid].tolist(), values[row, valid].tolist(), lam), 1e-13)
    assert (found[~mask] == 0).all()


def test_long_returns_lose_nothing():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 1, 3000, generator=generator)
    mask = torch.ones(1, 3000, dtype=torch.bool)
    for lam in (1.0, 0.95):
        expected = f64(*looped_returns(rewards[0].tolist(), values[0].tolist(), lam))
        close(lambda_returns(rewards, values, mask, lam)[0].double(), expected, 1e-4)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_residuals_are_minus_the_advantage_estimate_and_differ_by_the_next_one(lam):
    logprobs, ref, values, rewards, mask = ragged()
    paid = kl_rewards(logprobs, ref, rewards, mask, 0.3)
    returns = lambda_returns(paid, values, mask, lam)
    logprobs.requires_grad_()
    values.requires_grad_()
    policy = policy_loss(logprobs, ref, values, rewards, returns, mask, 0.3, denominator=1)
    value = value_loss(values, returns, mask, denominator=1)
    policy_residuals = torch.autograd.grad(policy, logprobs)[0] / (2 * 0.3)
    value_residuals = torch.autograd.grad(value, values)[0] / 2
    for row in range(len(mask)):
        valid = mask[row]
        v = [*values[row, valid].tolist(), 0.0]
        errors = [r + v[h + 1] - v[h] for h, r in enumerate(paid[row, valid].tolist())]
        advantages = looped_returns(errors, [0.0] * len(errors), lam)
        close(value_residuals[row, valid], [-a for a in advantages], 1e-13)
        ahead = torch.cat((value_residuals[row, valid][1:], f64(0)))
        close(policy_residuals[row, valid], value_residuals[row, valid] + (1 - lam) * ahead, 1e-13)


@pytest.mark.parametrize("normalisation", ["token", "seq"])
@pytest.mark.parametrize("weighted", [False, True])
def test_at_lam_one_both_losses_are_equal(normalisation, weighted):
    logprobs, ref, values, rewards, mask = ragged()
    mu = ref + 0.1 if weighted else None
    policy, value = losses(logprobs, ref, values, rewards, mask, 0.3, mu=mu, normalisation=normalisation)
    close(policy, value, 1e-14)


def gradients_of(batch, **options):
    """Losses and the gradients of log pi and V where the mask is true, in order of `segments` or of the rows."""
    logprobs, ref, values, rewards, mask = batch
    logprobs, values = logprobs.clone().requires_grad_(), values.clone().requires_grad_()
    found = losses(logprobs, ref, values, rewards, mask, 0.3, **options)
    sum(found).backward()
    return torch.stack(found).detach(), logprobs.grad, values.grad


OPTIONS = [
    {"lam": lam, "normalisation": normalisation, "full_gradient": full_gradient}
    for lam in (1.0, 0.9)
    for normalisation in ("token", "seq")
    for full_gradient in (False, True)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masked_entries_are_never_read(options):
    """They hold NaN; in its stead any number gives the same losses and gradients, and none of their own."""
    batch = ragged()
    mask = batch[-1]
    noise = [torch.where(mask, tensor, 100 * torch.randn_like(tensor)) for tensor in batch[:4]]
    mu, noisy_mu = batch[1] - 0.2, noise[1] - 0.2
    found = gradients_of(batch, mu=mu, **options)
    expected = gradients_of((*noise, mask), mu=noisy_mu, **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert (found[1][~mask] == 0).all() and (found[2][~mask] == 0).all()
    assert found[1][mask].abs().min() > 0 and found[2][mask].abs().min() > 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 4]], [[3, 0], [4, 2, 1]]], ids=["one row", "two rows"])
def test_packed_rows_equal_padded_ones(rows, options):
    batch = ragged()
    packed_batch, segments = packed(batch, rows)
    assert segments.min() == -1
    found = gradients_of(packed_batch, segments=segments, mu=packed_batch[1] - 0.2, **options)
    expected = gradients_of(batch, mu=batch[1] - 0.2, **options)
    close(found[0], expected[0], 1e-14)
    mask = batch[-1]
    for one, other in zip(found[1:], expected[1:], strict=True):
        for i in range(len(mask)):
            close(one[packed_batch[-1] & (segments == i)], other[i, mask[i]], 1e-14)


def test_packed_returns_and_weights_equal_padded_ones():
    batch = ragged()
    (logprobs, ref, values, rewards, mask), segments = packed(batch, [[3, 0], [4, 2, 1]])
    weights = importance_weights(logprobs, ref, mask, segments=segments)
    close(weights, importance_weights(batch[0], batch[1], batch[4]), 1e-14)
    for lam in (1.0, 0.9):
        found, expected = (
            lambda_returns(rewards, values, mask, lam, segments),
            lambda_returns(*batch[3:1:-1], batch[4], lam),
        )
        assert (found[~mask] == 0).all()
        for i in range(5):
            close(found[mask & (segments == i)], expected[i, batch[4][i]], 1e-14)


def test_completions_need_not_begin_with_the_row():
    shifted, batch = ragged(begins=[3, 0, 1, 6, 2]), ragged()
    mu = [b[1] - 0.2 for b in (shifted, batch)]
    options = {"lam": 0.9, "normalisation": "seq"}
    found, expected = gradients_of(shifted, mu=mu[0], **options), gradients_of(batch, mu=mu[1], **options)
    close(found[0], expected[0], 1e-14)
    for one, other in zip(found[1:], expected[1:], strict=True):
        close(one[shifted[-1]], other[batch[-1]], 1e-14)


def test_a_gap_is_passed_over():
    """Tokens in the middle that the policy did not choose: the state after them is the next one."""
    whole = ragged((4,))
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    holed = [torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, tensor) for tensor in whole[:4]]
    found = losses(*holed, mask, 0.3, 0.9)
    close(torch.stack(found), torch.stack(losses(*whole, 0.3, 0.9)), 1e-14)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_parts_of_a_batch_add_up_to_the_whole(options):
    batch = ragged()
    mask = batch[-1]
    count = label_count(mask, options["normalisation"])
    whole = gradients_of(batch, mu=batch[1] - 0.2, **options)
    parts = [
        gradients_of([tensor[rows] for tensor in batch], mu=batch[1][rows] - 0.2, denominator=count, **options)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    close(parts[0][0] + parts[1][0], whole[0], 1e-14)
    for i in (1, 2):
        close(torch.cat((parts[0][i], parts[1][i])), whole[i], 1e-14)


def test_what_a_mean_is_taken_over():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert label_count(mask) == 4 and label_count(mask, "seq") == 2
    segments = torch.tensor([[0, 1, 1], [2, 2, 2], [3, 3, 4]])
    assert label_count(mask, "seq", segments) == 4


@pytest.mark.parametrize("normalisation", ["token", "seq"])
def test_a_row_without_tokens_does_not_count(normalisation):
    batch = ragged()
    empty = [torch.cat((tensor, torch.full((1, 7), NAN, dtype=torch.float64))) for tensor in batch[:4]]
    mask = torch.cat((batch[-1], torch.zeros(1, 7, dtype=torch.bool)))
    found = losses(*empty, mask, 0.3, mu=empty[1], normalisation=normalisation)
    close(torch.stack(found), torch.stack(losses(*batch, 0.3, mu=batch[1], normalisation=normalisation)), 1e-14)


@pytest.mark.parametrize("time", [0, 3])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("normalisation", ["token", "seq"])
def test_of_nothing_the_losses_are_zero_and_can_be_differentiated(time, segmented, normalisation):
    """One rank of many may get such a batch."""
    nothing = torch.full((2, time), NAN, dtype=torch.float64)
    segments = torch.full((2, time), -1) if segmented else None
    batch = (nothing, nothing, nothing, nothing, torch.zeros(2, time, dtype=torch.bool))
    found, *gradients = gradients_of(batch, mu=nothing, normalisation=normalisation, segments=segments)
    assert found.tolist() == [0, 0]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("normalisation", ["token", "seq"])
def test_only_the_ratio_of_reward_and_beta_matters(normalisation):
    logprobs, ref, values, rewards, mask = ragged()
    options = {"mu": ref, "normalisation": normalisation}
    found = losses(logprobs, ref, 10 * values, 10 * rewards, mask, 3.0, 0.9, **options)
    close(
        torch.stack(found), 100 * torch.stack(losses(logprobs, ref, values, rewards, mask, 0.3, 0.9, **options)), 1e-11
    )


def test_weights_of_one_change_nothing_and_weights_multiply_sequences():
    batch = ragged()
    mask = batch[-1]
    returns = lambda_returns(batch[3], batch[2], mask, 1.0)
    plain = value_loss(batch[2], returns, mask)
    close(value_loss(batch[2], returns, mask, torch.ones(5)), plain, 1e-14)
    one = [value_loss(batch[2], returns, mask, weights) for weights in torch.eye(5, dtype=torch.float64)]
    close(sum(one), plain, 1e-14)


# -- mistakes


def arguments():
    mask = torch.ones(2, 3, dtype=torch.bool)
    return {"mask": mask, "beta": 0.1} | {
        name: torch.zeros(2, 3) for name in ("logprobs", "ref_logprobs", "values", "rewards", "returns")
    }


def calling(function, **changes):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return function(**{name: value for name, value in (arguments() | changes).items() if name in names})


@pytest.mark.parametrize("function", [kl_rewards, policy_loss])
@pytest.mark.parametrize("beta", [0.0, -0.1, NAN])
def test_beta_must_be_positive(function, beta):
    with pytest.raises(ValueError, match="beta: must be positive"):
        calling(function, beta=beta)


@pytest.mark.parametrize("lam", [-0.01, 1.01, NAN])
def test_lam_is_a_fraction(lam):
    with pytest.raises(ValueError, match=r"lam: must lie in \[0, 1\]"):
        calling(lambda_returns, kl_rewards=torch.zeros(2, 3), lam=lam)


@pytest.mark.parametrize("cap", [0.0, -1.0, NAN])
def test_the_cap_must_be_positive(cap):
    with pytest.raises(ValueError, match="cap: must be positive"):
        calling(importance_weights, behaviour_logprobs=torch.zeros(2, 3), cap=cap)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *((kl_rewards, name) for name in ("logprobs", "ref_logprobs", "rewards")),
        *((lambda_returns, name) for name in ("kl_rewards", "values", "segments")),
        *((importance_weights, name) for name in ("logprobs", "behaviour_logprobs", "segments")),
        *((value_loss, name) for name in ("values", "returns", "segments")),
        *((policy_loss, name) for name in ("logprobs", "ref_logprobs", "values", "rewards", "returns", "segments")),
    ],
)
@pytest.mark.parametrize("shape", [(2, 4), (2, 1), (2,), (1, 3)])
def test_shapes_must_agree(function, name, shape):
    """Also those that would broadcast."""
    others = {"kl_rewards": torch.zeros(2, 3), "behaviour_logprobs": torch.zeros(2, 3), "lam": 1.0}
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        calling(function, **(others | {name: torch.zeros(shape)}))


@pytest.mark.parametrize("function", [value_loss, policy_loss])
@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(1), torch.ones(2, 3), torch.ones(())])
def test_there_is_one_weight_for_each_sequence(function, weights):
    with pytest.raises(ValueError, match="weights: must be one"):
        calling(function, weights=weights)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long), torch.ones(3) > 0])
def test_the_mask_is_boolean_and_of_rows(mask):
    with pytest.raises(ValueError, match="mask: must be boolean"):
        calling(value_loss, mask=mask)


@pytest.mark.parametrize("function", [value_loss, policy_loss, label_count])
def test_normalisation_is_named(function):
    with pytest.raises(ValueError, match="normalisation: must be 'token' or 'seq'"):
        calling(function, normalisation="mean")


def test_unmasked_tokens_belong_to_a_segment():
    with pytest.raises(ValueError, match="segments: must not be negative"):
        calling(value_loss, segments=torch.tensor([[0, 0, 1], [-1, 2, 2]]))


def test_full_gradient_wants_returns_with_gradient():
    with pytest.raises(ValueError, match="returns: full_gradient"):
        calling(policy_loss, logprobs=torch.zeros(2, 3, requires_grad=True), full_gradient=True)


def test_process_scores_are_checked():
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"scores: token {index} is not"):
            token_rewards(1.0, 3, [(index, 0.5)])
    with pytest.raises(ValueError, match="scores: token 1 has two potentials"):
        token_rewards(1.0, 3, [(1, 0.5), (1, 0.6)], "shaping")
    with pytest.raises(ValueError, match="kind: must be 'additive' or 'shaping'"):
        token_rewards(1.0, 3, [(1, 0.5)], "dense")


def test_without_weights_and_by_sequences_the_losses_are_oreo_s():
    """Its equations as they stand (arXiv 2412.16145), without the regulariser: sums over the rest of a completion, each detached."""
    generator = torch.Generator().manual_seed(5)
    logprobs, ref, values, rewards = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    lengths, beta = [6, 2, 4], 0.3
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    logprobs.requires_grad_(), values.requires_grad_()
    of_values, of_policy = [], []
    for row, length in enumerate(lengths):
        log_ratios = (logprobs - ref)[row, :length]
        to_go = torch.stack([rewards[row, t:length].sum() for t in range(length)])
        for t in range(length):
            of_values.append((values[row, t] - to_go[t] + beta * log_ratios[t:].sum().detach()) ** 2 / length)
            later = beta * log_ratios[t + 1 :].sum().detach()
            of_policy.append((values[row, t].detach() - to_go[t] + beta * log_ratios[t] + later) ** 2 / length)
    with torch.no_grad():
        returns = lambda_returns(kl_rewards(logprobs, ref, rewards, mask, beta), values, mask, 1.0)
    found = (
        value_loss(values, returns, mask, None, "seq"),
        policy_loss(logprobs, ref, values, rewards, returns, mask, beta, None, "seq"),
    )
    for ours, theirs, leaf in zip(found, (sum(of_values) / 3, sum(of_policy) / 3), (values, logprobs), strict=True):
        torch.testing.assert_close(ours, theirs)
        gradients = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs))
        torch.testing.assert_close(*gradients)

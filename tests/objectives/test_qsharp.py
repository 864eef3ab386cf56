"""Q#'s return models: the paper's numbers, brute force on trees, and the edges. The vectors' beta is 1 / ours."""

import math

import pytest
import torch

from posttrain.objectives.qsharp import (
    bernoulli_log_tilt,
    bernoulli_loss,
    categorical_log_tilt,
    categorical_loss,
    expected_log_tilt,
    expected_return,
    history_weights,
    nearest_atom,
    squared_loss,
)
from posttrain.objectives.soft import tilt

NAN, INF = float("nan"), float("inf")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


LOGITS = f64(2, 1, 0, -1)
VALUES = torch.logit(f64(0.1, 0.6, 0.9, 0.5))
ATOMS = f64(0, 0.25, 0.5, 0.75, 1)
PMF = f64([0.4, 0.3, 0.2, 0.1, 0], [0.1, 0.1, 0.1, 0.1, 0.6], [0.2] * 5, [0, 0, 1, 0, 0])


# -- A: Bernoulli


@pytest.mark.parametrize(
    ("scale", "tilts", "law"),
    [
        (1, (0.15856508, 0.70851307, 0.93470166, 0.62011451), (0.49734531, 0.31710488, 0.14626516, 0.03928466)),
        (10, (7.69782342, 9.48920464, 9.89464453, 9.30689822), (0.21400385, 0.47218707, 0.26055530, 0.05325378)),
    ],
)
def test_a_bernoulli_tilt_and_law(scale, tilts, law):
    found = bernoulli_log_tilt(VALUES, 1 / scale)
    close(found, tilts)
    close(tilt(LOGITS, found).exp(), law)


def test_a_kl_and_log_expectation():
    ref = torch.log_softmax(LOGITS, -1)
    for scale, kl, log_expectation in ((1, 0.04776373, 0.41684609), (10, 0.40237818, 8.79939499)):
        found = bernoulli_log_tilt(VALUES, 1 / scale)
        law = tilt(LOGITS, found)
        close((law.exp() * (law - ref)).sum(), kl)
        close(torch.logsumexp(ref + found, -1), log_expectation)


def test_a_posterior_limit_and_controlled_decoding():
    close(tilt(LOGITS, bernoulli_log_tilt(VALUES, 1e-4)).exp(), (0.21393900, 0.47222256, 0.26058146, 0.05325698))
    close(tilt(LOGITS, expected_log_tilt(VALUES, 0.1)).exp(), (0.00216570, 0.11824302, 0.87370431, 0.00588697))


def test_a_released_expectation_mode_is_the_same_law():
    q = f64(0.22180175, 0.65413411, 0.91353353, 0.56766764)  # E[exp(beta (r - 1))], which that mode regresses
    close((bernoulli_log_tilt(VALUES, 0.5) - 2).exp(), q)
    close(tilt(LOGITS, q.log()).exp(), (0.36104068, 0.39170893, 0.20124573, 0.04600466))
    close(tilt(LOGITS, bernoulli_log_tilt(VALUES, 0.5)).exp(), (0.36104068, 0.39170893, 0.20124573, 0.04600466))


@pytest.mark.parametrize(
    ("logit", "scale", "expected"),
    [(-200, 1000, 800), (50, 1000, 1000), (-1000, 10, 0), (0, 0, 0), (-3, 1e4, 9996.95141265)],
)
def test_a_stable_at_the_extremes(logit, scale, expected):
    close(bernoulli_log_tilt(f64(logit), 1 / scale if scale else INF), [expected])


def test_tilts_are_monotone_and_bounded_in_float32():
    logits = torch.linspace(-60, 60, 2001)
    for beta in (0.01, 0.1, 1.0, 10.0):
        found = bernoulli_log_tilt(logits, beta)
        assert (found >= 0).all() and (found <= 1 / beta * (1 + 1e-6)).all()
        assert (found.diff() >= -2e-6 / beta).all()


def test_infinite_beta_is_exactly_no_tilt():
    torch.manual_seed(0)
    assert (bernoulli_log_tilt(torch.randn(50), INF) == 0).all()
    assert (categorical_log_tilt(torch.randn(50, 5), ATOMS, INF) == 0).all()
    assert (expected_log_tilt(torch.randn(50), INF) == 0).all()


def test_every_row_has_its_own_beta():
    logits = torch.randn(3, 4, dtype=torch.float64)
    betas = f64(0.1, 1, INF)
    rows = torch.stack([bernoulli_log_tilt(row, float(beta)) for row, beta in zip(logits, betas, strict=True)])
    close(bernoulli_log_tilt(logits, betas[:, None]), rows)
    histogram = torch.randn(3, 4, 5, dtype=torch.float64)
    rows = torch.stack(
        [categorical_log_tilt(row, ATOMS, float(beta)) for row, beta in zip(histogram, betas, strict=True)]
    )
    close(categorical_log_tilt(histogram, ATOMS, betas[:, None]), rows)


@pytest.mark.parametrize("beta", [0.0, -1.0, torch.tensor([1.0, 0.0])])
def test_beta_must_be_positive(beta):
    for call in (
        lambda: bernoulli_log_tilt(torch.zeros(2), beta),
        lambda: categorical_log_tilt(torch.zeros(2, 2), f64(0, 1), beta),
        lambda: expected_log_tilt(torch.zeros(2), beta),
    ):
        with pytest.raises(ValueError, match="beta: must be positive"):
            call()


# -- B: histogram


@pytest.mark.parametrize(
    ("scale", "tilts", "law"),
    [
        (3, (1.05786370, 2.62176326, 2.00611685, 1.5), (0.31403980, 0.55192894, 0.10970258, 0.02432868)),
        (10, (5.36850376, 9.50396798, 8.47620884, 5), (0.03695334, 0.84990130, 0.11187264, 0.00127271)),
    ],
)
def test_b_categorical_tilt_and_law(scale, tilts, law):
    found = categorical_log_tilt(PMF.log(), ATOMS, 1 / scale)
    close(found, tilts)
    close(tilt(LOGITS, found).exp(), law)


def test_b_values_and_means():
    close(categorical_log_tilt(PMF.log(), ATOMS, 1 / 3) / 3, (0.35262123, 0.87392109, 0.66870562, 0.5))
    close(expected_return(PMF.log(), ATOMS), (0.25, 0.75, 0.5, 0.5))


def test_two_atoms_are_a_bernoulli():
    logits = torch.linspace(-5, 5, 11, dtype=torch.float64)
    pair = torch.stack((torch.zeros_like(logits), logits), -1)
    close(categorical_log_tilt(pair, f64(0, 1), 0.1), bernoulli_log_tilt(logits, 0.1), 1e-12)
    close(expected_log_tilt(pair, 0.1, f64(0, 1)), expected_log_tilt(logits, 0.1), 1e-12)


def test_b_bins():
    assert nearest_atom(f64(0.37, 0.875, 0.625), ATOMS).tolist() == [1, 4, 2]


def test_bins_of_any_range_and_spacing():
    atoms = f64(-3, -1, 0, 10)
    returns = f64(-9, -3, -2.1, -2, -1.9, -0.4, 4.9, 5.1, 99)
    assert nearest_atom(returns, atoms).tolist() == [0, 0, 0, 0, 1, 2, 2, 3, 3]


def test_bins_of_an_even_grid_are_rounded_half_to_even():
    atoms = torch.linspace(-2, 6, 17, dtype=torch.float64)
    returns = torch.linspace(-2, 6, 401, dtype=torch.float64)
    away = ((returns * 4).round() - returns * 4).abs() > 1e-9  # not on a boundary, where the grid itself is rounded
    expected = ((returns + 2) / 0.5).round().long()
    assert (nearest_atom(returns, atoms) == expected)[away].all()


@pytest.mark.parametrize("atoms", [[0.0], [0.0, 0.0], [1.0, 0.0], [0.0, NAN], [0.0, INF]])
def test_atoms_must_increase(atoms):
    with pytest.raises(ValueError, match="atoms: must be"):
        nearest_atom(f64(0.5), torch.tensor(atoms))


# -- C and D: trees, by brute force

TREE = {"": 0.3, "0": 0.6, "1": 0.2, "00": 0.5, "01": 0.9, "10": 0.25, "11": 0.7}  # pi_ref(1 | prefix)
LEAVES = {"000": 0, "001": 1, "010": 0, "011": 0, "100": 1, "101": 0, "110": 0, "111": 0.5}


def reference(path, start=""):
    """pi_ref of a path from a prefix on."""
    total, prefix = 1.0, start
    for step in path[len(start) :]:
        total *= TREE[prefix] if step == "1" else 1 - TREE[prefix]
        prefix += step
    return total


def returns_below(prefix):
    """The law of the return under pi_ref: [(return, probability)]."""
    return [(reward, reference(leaf, prefix)) for leaf, reward in LEAVES.items() if leaf.startswith(prefix)]


def tree_policy(beta, law):
    """pi(1 | prefix) of the guided policy, by the functions under test; law: log-tilt of [(return, probability)]."""
    policy = {}
    for prefix, p in TREE.items():
        tilts = torch.stack([law(returns_below(prefix + step), beta) for step in "01"])
        policy[prefix] = tilt(f64(1 - p, p).log(), tilts).exp()[1].item()
    return policy


def soft_law(outcomes, beta):
    atoms = f64(*(reward for reward, _ in outcomes)) if len(outcomes) > 1 else f64(outcomes[0][0])
    return categorical_log_tilt(f64(*(p for _, p in outcomes)).log().reshape(-1), atoms.reshape(-1), beta)


def mean_law(outcomes, beta):
    atoms = f64(*(reward for reward, _ in outcomes)).reshape(-1)
    return expected_log_tilt(f64(*(p for _, p in outcomes)).log().reshape(-1), beta, atoms)


def measured(policy):
    """E[r] and the KL of whole paths, by enumeration."""
    mean = kl = 0.0
    for leaf, reward in LEAVES.items():
        p, prefix = 1.0, ""
        for step in leaf:
            p *= policy[prefix] if step == "1" else 1 - policy[prefix]
            prefix += step
        mean += p * reward
        kl += p * math.log(p / reference(leaf)) if p else 0.0
    return mean, kl


D = [  # eta, V*, pi*(1 | root, 0, 1, 00, 10, 11), E[r], KL; CD(1 | root, 0, 1), E[r], KL, objective
    (
        1.0,
        0.45558548,
        (0.40361324, 0.44654274, 0.13706397, 0.73105858, 0.10923177, 0.79368751),
        (0.57350539, 0.11791991),
        (0.40677879, 0.47638386, 0.14352765),
        (0.56058989, 0.10616092, 0.45442897),
    ),
    (
        0.25,
        0.72835584,
        (0.55462253, 0.05119616, 0.03213979, 0.98201379, 0.00606817, 0.94517884),
        (0.95693914, 0.91433320),
        (0.73743943, 0.16874683, 0.04804890),
        (0.92882046, 0.89979568, 0.70387154),
    ),
    (
        0.1,
        0.88615401,
        (0.56284672, 0.00013618, 0.00157422, 0.99995460, 0.00001513, 0.99712062),
        (0.99946782, 1.13313814),
        (0.97921871, 0.01000579, 0.00455804),
        (0.99753830, 1.59529541, 0.83800876),
    ),
]


@pytest.mark.parametrize(("beta", "value", "optimum", "reached", "cd", "cd_reached"), D)
def test_d_tree(beta, value, optimum, reached, cd, cd_reached):
    policy = tree_policy(beta, soft_law)
    close(f64(*(policy[prefix] for prefix in ("", "0", "1", "00", "10", "11"))), optimum)
    assert policy["01"] == pytest.approx(0.9, abs=1e-12)
    mean, kl = measured(policy)
    assert (mean, kl) == pytest.approx(reached, abs=1e-6)
    assert mean - beta * kl == pytest.approx(value, abs=1e-6)  # the objective it reaches is V*
    assert float(soft_law(returns_below(""), beta)) * beta == pytest.approx(value, abs=1e-6)

    baseline = tree_policy(beta, mean_law)
    close(f64(*(baseline[prefix] for prefix in ("", "0", "1"))), cd)
    mean, kl = measured(baseline)
    assert (mean, kl, mean - beta * kl) == pytest.approx(cd_reached, abs=1e-6)


@pytest.mark.parametrize(
    ("left", "beta", "right", "right_one", "cd_right", "ours", "theirs"),
    [
        (0.5, 1, 0.49560564, 0.12516100, 0.48750260, (0.11246993, 0.02122025), (0.11226605, 0.02114772)),
        (0.5, 0.1, 0.99754000, 0.99913814, 0.37754067, (0.99692626, 3.65481682), (0.43946122, 1.15773125)),
        (0.5, 0.02, 1.0, 1.0, 0.07585818, (1.0, 3.68887945), (0.16827236, 0.65186279)),
        (0.01, 0.1, 0.99997509, 0.99913814, 0.98361905, (0.99911575, 2.99605295), (0.98440941, 2.93905808)),
        (0.01, 0.01, 1.0, 1.0, 0.40014040, (1.0, 3.00578261), (0.46012636, 3.29212205)),
    ],
)
def test_c_two_branches(left, beta, right, right_one, cd_right, ours, theirs):
    """Left pays 0.1 for sure; right pays 1 with probability 0.05."""
    ref = f64(left, 1 - left).log()
    lottery, leaves = f64(0.95, 0.05).log(), f64(0, 1)
    sure = f64(0.0)

    def reach(root, branch):
        mean = root[0] * 0.1 + root[1] * branch[1]
        terms = (root * (root.log() - ref)).nansum() + root[1] * (branch * (branch.log() - lottery)).nansum()
        return mean.item(), terms.item()

    tilts = torch.stack((categorical_log_tilt(sure, f64(0.1), beta), categorical_log_tilt(lottery, leaves, beta)))
    root, branch = tilt(ref, tilts).exp(), tilt(lottery, leaves / beta).exp()
    close(root[1], right)
    close(branch[1], right_one)
    assert reach(root, branch) == pytest.approx(ours, abs=1e-6)

    tilts = torch.stack((expected_log_tilt(sure, beta, f64(0.1)), expected_log_tilt(lottery, beta, leaves)))
    root = tilt(ref, tilts).exp()
    close(root[1], cd_right)
    assert reach(root, branch) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.25, 0.1])
def test_d_learned_from_samples_of_the_reference(beta):
    """Roll-outs of pi_ref, a tabular maximum-likelihood fit, the guided policy: pi* within sampling error."""
    generator = torch.Generator().manual_seed(3)
    leaves = list(LEAVES)
    drawn = torch.multinomial(
        f64(*(reference(leaf) for leaf in leaves)), 200_000, replacement=True, generator=generator
    ).bincount(minlength=len(leaves))
    counts = dict(zip(leaves, drawn.tolist(), strict=True))
    atoms = f64(0, 0.5, 1)

    def fitted(prefix, beta):
        """The law of the returns seen below a prefix, on the atoms."""
        law = torch.zeros(3, dtype=torch.float64)
        for leaf, count in counts.items():
            if leaf.startswith(prefix):
                law[nearest_atom(f64(LEAVES[leaf]), atoms)] += count
        return categorical_log_tilt(law.log(), atoms, beta)

    policy = {
        prefix: tilt(f64(1 - p, p).log(), torch.stack([fitted(prefix + step, beta) for step in "01"])).exp()[1].item()
        for prefix, p in TREE.items()
    }
    exact = tree_policy(beta, soft_law)
    assert all(policy[prefix] == pytest.approx(exact[prefix], abs=0.02) for prefix in TREE)
    assert measured(policy) == pytest.approx(measured(exact), abs=0.02)


# -- E: losses

LOSS_LOGITS = f64([0, 0, 0.5, -1, 2, 0.3], [0, 0.2, -0.4, 1, -2, 0.7])
LOSS_MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)


def test_e_bernoulli_loss():
    returns = f64(1, 0)
    rows = [bernoulli_loss(LOSS_LOGITS[[i]], returns[[i]], LOSS_MASK[[i]]) for i in (0, 1)]
    close(torch.stack(rows), (0.66484831, 1.10318601))
    close(bernoulli_loss(LOSS_LOGITS, returns, LOSS_MASK), 0.88401717)
    close(bernoulli_loss(LOSS_LOGITS, returns, LOSS_MASK, "token"), 0.77443272)
    close(squared_loss(LOSS_LOGITS, returns, LOSS_MASK), 0.34486330)


def test_e_categorical_loss():
    logits = LOSS_LOGITS[..., None] * torch.arange(5)
    close(categorical_loss(logits, f64(0.37, 1.0), ATOMS, LOSS_MASK), 1.92701018)


def test_masked_entries_are_never_read():
    logits = torch.where(LOSS_MASK, LOSS_LOGITS, NAN).requires_grad_()
    returns = torch.where(LOSS_MASK, f64(1, 0)[:, None], NAN)
    loss = bernoulli_loss(logits, returns, LOSS_MASK)
    close(loss.detach(), 0.88401717)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[~LOSS_MASK] == 0).all()

    atoms_last = torch.where(LOSS_MASK[..., None], LOSS_LOGITS[..., None] * torch.arange(5), NAN).requires_grad_()
    loss = categorical_loss(atoms_last, returns, ATOMS, LOSS_MASK)
    loss.backward()
    assert loss.isfinite() and atoms_last.grad.isfinite().all()


def test_rows_without_labels_do_not_count():
    mask = torch.cat((LOSS_MASK, torch.zeros(1, 6, dtype=torch.bool)))
    logits = torch.cat((LOSS_LOGITS, torch.full((1, 6), NAN, dtype=torch.float64)))
    close(bernoulli_loss(logits, f64(1, 0, 1), mask), 0.88401717)
    assert bernoulli_loss(logits, f64(1, 0, 1), torch.zeros_like(mask)) == 0


def test_the_minimiser_is_the_law_of_the_return():
    returns = f64(0, 0, 1, 0.5, 1)[:, None]
    mask = torch.ones(5, 1, dtype=torch.bool)
    atoms = f64(0, 0.5, 1)
    logits = f64(2 / 5, 1 / 5, 2 / 5).log().requires_grad_()
    categorical_loss(logits.expand(5, 1, 3), returns, atoms, mask).backward()
    close(logits.grad, (0, 0, 0), 1e-12)
    logit = torch.logit(returns.mean()).requires_grad_()
    bernoulli_loss(logit.expand(5, 1), returns, mask).backward()
    close(logit.grad, 0, 1e-12)


def test_reduction_is_named():
    with pytest.raises(ValueError, match="reduction: must be 'row' or 'token'"):
        bernoulli_loss(LOSS_LOGITS, f64(1, 0), LOSS_MASK, "mean")


# -- G: the first choice in a star graph


@pytest.mark.parametrize(
    ("arms", "right", "wrong", "ours", "cd"),
    [
        (2, 1.0, 0.0, 0.99995460, None),
        (2, 0.99, 0.01, 0.98995551, None),
        (2, 0.9, 0.1, 0.89996368, None),
        (5, 1.0, 0.0, 0.99981843, None),
        (5, 0.99, 0.01, 0.96099731, 0.99977828),
        (5, 0.9, 0.1, 0.69222174, 0.99865995),
    ],
)
def test_g_star(arms, right, wrong, ours, cd):
    p = f64(right, *[wrong] * (arms - 1))
    close(tilt(torch.zeros_like(p), bernoulli_log_tilt(torch.logit(p), 0.1)).exp()[0], ours)
    if cd is not None:
        close(tilt(torch.zeros_like(p), expected_log_tilt(torch.logit(p), 0.1)).exp()[0], cd)


# -- several rounds together (StaQ)


def test_weights_of_several_rounds():
    close(history_weights(3), (0.369004, 0.332103, 0.298893))
    close(history_weights(10)[:3], (0.153534, 0.138181, 0.124363))
    close(history_weights(3) @ f64([1, 0], [0.5, 0.5], [0, 1]), (0.535055, 0.464945))
    assert history_weights(1).tolist() == [1]

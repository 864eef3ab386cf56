"""Length rewards: the paper account's vectors, its seven properties as what our defaults do, the edges."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.objectives import length
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.length import gate, group_gated, sigmoid_length

NAN = float("nan")
ALL = {
    "group_gated": group_gated,
    "sigmoid_length": sigmoid_length,
    "kimi": length.kimi,
    "l1_exact": functools.partial(length.l1_exact, target=500),
    "l1_max": functools.partial(length.l1_max, target=500),
    "soft_overlong": length.soft_overlong,
    "shorter_better": length.shorter_better,
    "alp": length.alp,
    "difficulty_linear": length.difficulty_linear,
    "gr3": length.gr3,
    "cosine": length.cosine,
}


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def done(correct):
    return torch.ones(correct.shape, dtype=torch.bool)


def of(reward, lengths, correct, **options):
    """Rewards of one finished group."""
    correct = f64(correct)
    return reward(correct, f64(lengths), done(correct), **options)[0]


def advantages(rewards, scale="none", ddof=0, eps=1e-6):
    """As the account's vectors have them."""
    return group_advantages(rewards, scale, ddof, eps)


# -- vectors: five groups of four

GROUPS = {
    "A": ([200, 400, 600, 800], [1, 1, 1, 1]),
    "B": ([300, 500, 700, 900], [1, 1, 0, 1]),
    "C": ([100, 900, 500, 700], [1, 0, 0, 1]),
    "D": ([250, 350, 450, 950], [0, 0, 1, 0]),
    "E": ([500, 600, 700, 800], [0, 0, 0, 0]),
}
LENGTHS = f64(*(lengths for lengths, _ in GROUPS.values()))
CORRECT = f64(*(correct for _, correct in GROUPS.values()))
EFFICIENT = [  # group, alpha, rewards, advantages with std, without
    (
        *("A", 0.2, [0.958552, 0.921995, 0.878005, 0.841448]),
        *([1.323854, 0.497312, -0.497312, -1.323854], [0.058552, 0.021995, -0.021995, -0.058552]),
    ),
    (
        *("A", 0.6, [0.875656, 0.765986, 0.634014, 0.524344]),
        *([1.323874, 0.497320, -0.497320, -1.323874], [0.175656, 0.065986, -0.065986, -0.175656]),
    ),
    (
        *("B", 0.2, [0.948883, 0.913284, 0, 0.841624]),
        *([0.695968, 0.605192, -1.723623, 0.422463], [0.272935, 0.237336, -0.675948, 0.165676]),
    ),
    (
        *("B", 0.6, [0.846649, 0.739852, 0, 0.524871]),
        *([0.977805, 0.650250, -1.618939, -0.009116], [0.318806, 0.212009, -0.527843, -0.002972]),
    ),
]


@pytest.mark.parametrize(("fraction", "chosen"), [(0, ""), (0.2, "A"), (0.4, "AB"), (0.21, "AB"), (1, "ABCDE")])
def test_the_gate_takes_the_top_fraction(fraction, chosen):
    found = gate(CORRECT, done(CORRECT), fraction, min_group_accuracy=0)
    assert "".join(name for name, on in zip(GROUPS, found.tolist(), strict=True) if on) == chosen


@pytest.mark.parametrize(("name", "alpha", "rewards", "with_std", "without"), EFFICIENT)
def test_efficient_groups(name, alpha, rewards, with_std, without):
    row = "ABCDE".index(name)
    found = group_gated(CORRECT, LENGTHS, done(CORRECT), gate_fraction=0.4, alpha=alpha)
    close(found[row], rewards)
    close(advantages(found, "group")[row], with_std)
    close(advantages(found)[row], without)


def test_accurate_groups_keep_their_correctness():
    found = group_gated(CORRECT, LENGTHS, done(CORRECT), gate_fraction=0.2)
    assert torch.equal(found[1:], CORRECT[1:])


def test_the_deviation_of_samples():
    found = advantages(f64([0.958552, 0.921995, 0.878005, 0.841448]), "group", ddof=1)
    close(found[0], [1.146495, 0.430686, -0.430686, -1.146495], 2e-5)  # from rewards of six digits
    exact = of(group_gated, *GROUPS["A"], gate_fraction=1)
    close(advantages(exact[None], "group", ddof=1)[0], [1.146495, 0.430686, -0.430686, -1.146495])


def test_a_single_correct_completion_pays_half_alpha():
    close(of(group_gated, *GROUPS["D"], gate_fraction=1, min_group_accuracy=0), [0, 0, 0.9, 0])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1])
def test_a_group_that_is_all_wrong_gets_nothing(alpha):
    rewards = of(group_gated, *GROUPS["E"], gate_fraction=1, min_group_accuracy=0, alpha=alpha)
    close(rewards, [0, 0, 0, 0])
    close(advantages(rewards[None], "group")[0], [0, 0, 0, 0])


def test_equal_lengths_all_correct_have_no_advantage():
    rewards = of(group_gated, [300] * 4, [1] * 4)
    close(rewards, [0.9] * 4)
    close(advantages(rewards[None], "group")[0], [0, 0, 0, 0])


PEERS = {
    "sigmoid_length": (sigmoid_length, {"alpha": 0.2}, [0.948883, 0.913284, 0, 0.841624]),
    "kimi": (length.kimi, {}, [1.5, 1.166667, -0.166667, 0.5]),
    "l1_exact": (length.l1_exact, {"target": 500}, [0.91, 0.97, -0.03, 0.91]),
    "l1_max": (length.l1_max, {"target": 500}, [0.59, 0.53, 0, 0.41]),
    "l1_max released": (length.l1_max, {"target": 500, "alpha": 1.5e-4}, [0.545, 0.515, 0, 0.455]),
    "soft_overlong": (length.soft_overlong, {"max_length": 800, "cache": 400}, [1, 1, -1.5, 0]),
    "shorter_better": (length.shorter_better, {}, [2, 1.8, -0.4, 1.4]),
    "alp": (length.alp, {"beta": 1e-4}, [0.985, 0.97, -0.045, 0.94]),
    "gr3": (length.gr3, {}, [0.883392, 0.791139, 0, 0.654450]),
    "cosine": (length.cosine, {"max_length": 1000}, [1.904508, 1.654508, -3.454915, 1.095492]),
    "difficulty_linear": (length.difficulty_linear, {}, [0.953125, 0.90625, -0.140625, 0.8125]),
}


@pytest.mark.parametrize("peer", PEERS)
def test_peers(peer):
    reward, options, expected = PEERS[peer]
    close(of(reward, [200, 400, 600, 800], [1, 1, 0, 1], **options), expected)


def test_dr_grpo():
    close(advantages(f64([1, 1, 0, 1])), [[0.25, 0.25, -0.75, 0.25]])


def test_targets_of_each_prompt():
    correct, lengths = f64([1, 1], [1, 0]), f64([100, 200], [100, 200])
    both = length.l1_exact(correct, lengths, done(correct), target=f64([100], [300]), alpha=1e-3)
    close(both, [[1, 0.9], [0.8, -0.1]])


# -- seven properties


def test_1_alpha_is_inert_in_all_right_groups_only_under_group_scaling():
    found = {alpha: of(group_gated, *GROUPS["A"], alpha=alpha)[None] for alpha in (0.01, 0.1, 0.2, 0.6)}
    for alpha, first in ((0.01, 1.3233), (0.1, 1.3238), (0.6, 1.3239)):
        assert float(advantages(found[alpha], "group")[0, 0]) == pytest.approx(first, abs=6e-5)
    close(2 * advantages(found[0.1]), advantages(found[0.2]), 1e-12)


def test_2_one_token_does_not_get_full_force():
    rewards = of(group_gated, [400, 401, 400, 400], [1] * 4)
    close(rewards, [0.900625, 0.898126, 0.900625, 0.900625])
    assert advantages(rewards[None]).abs().max() < 0.002
    without_floor = of(group_gated, [400, 401, 400, 400], [1] * 4, length_std_floor=0)
    close(without_floor, [0.9281, 0.8301, 0.9281, 0.9281], 5e-5)
    close(advantages(without_floor[None], "group")[0], [0.577, -1.732, 0.577, 0.577], 5e-4)
    assert torch.equal(of(group_gated, *GROUPS["A"]), of(group_gated, *GROUPS["A"], length_std_floor=0))


@given(st.lists(st.integers(1, 30_000), min_size=8, max_size=8), st.integers(4, 7))
def test_3_no_correct_completion_goes_negative_from_the_gate_up_to_seven_eighths(lengths, right):
    correct = [1] * right + [0] * (8 - right)
    assert (advantages(of(group_gated, lengths, correct)[None])[0, :right] > 0).all()


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.05, 0.309), (0.1, 0.237), (0.2, 0.081), (0.4, -0.274), (0.6, -0.683)]
)
def test_3_an_outlier_under_group_scaling(alpha, expected):
    """Seven of eight right, one of them of 2000 tokens (the account does not give the others): what the defaults avoid."""
    lengths = [300, 360, 420, 480, 540, 600, 2000, 500]
    rewards = of(group_gated, lengths, [1] * 7 + [0], gate_fraction=1, alpha=alpha)
    found = float(advantages(rewards[None], "group")[0, 6])
    assert found == pytest.approx(expected, abs=0.0011) and (found < 0) == (expected < 0)


def test_4_an_all_hard_batch_is_not_penalised():
    correct = f64([1, *[0] * 7], [0] * 8, [0] * 8)
    lengths = torch.arange(24, dtype=torch.float64).view(3, 8) + 100
    assert torch.equal(group_gated(correct, lengths, done(correct)), correct)
    assert not gate(correct, done(correct)).any()


@given(st.permutations(range(8)))
def test_5_ties_go_to_the_first(order):
    """Whatever stands in between: the chosen are the first of the best."""
    accuracy = [1, 1, 1, 0.5, 1, 0.5, 0, 1]
    correct = f64(*([1, float(accuracy[i] == 1)] if accuracy[i] else [0, 0] for i in order))
    best = [row for row in range(8) if correct[row].all()]
    assert gate(correct, done(correct), 0.375).nonzero()[:, 0].tolist() == best[:3]


def test_6_a_chosen_all_right_group_has_a_pure_length_gradient():
    found = advantages(group_gated(CORRECT, LENGTHS, done(CORRECT)))[0]
    assert (found.diff() < 0).all()
    assert torch.equal(advantages(group_gated(CORRECT, LENGTHS, done(CORRECT), gate_fraction=0))[0], f64(0, 0, 0, 0))


def test_7_truncated_completions_are_wrong_and_out_of_the_statistics():
    correct, finished = f64([1, 1, 1, 1]), torch.tensor([[True, True, True, False]])
    found = group_gated(correct, f64([200, 400, 600, 4096]), finished)
    close(found[0], [*of(group_gated, [200, 400, 600], [1, 1, 1]), 0])


# -- the edges


@pytest.mark.parametrize("name", ALL)
def test_what_was_cut_off_is_wrong(name):
    correct, lengths = f64([1, 1, 0, 1], [0, 0, 0, 1]), f64([100, 300, 200, 400], [100, 300, 200, 400])
    finished = torch.tensor([[True, True, True, False]] * 2)
    wrong = correct.where(finished, 0)
    close(ALL[name](correct, lengths, finished), ALL[name](wrong, lengths, finished), 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_what_was_not_scored_stays_so_and_its_group_is_finite(name):
    correct = f64([1, NAN, 0, 1], [NAN, NAN, NAN, NAN])
    found = ALL[name](correct, f64([100, 300, 200, 400], [1, 2, 3, 4]), done(correct))
    assert torch.equal(found.isnan(), correct.isnan())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("lengths", [[0, 0], [5, 5], [0, 9], [10**7, 1]])
@pytest.mark.parametrize("correct", [[1, 1], [0, 1], [0, 0]])
def test_rewards_are_finite(name, lengths, correct):
    assert of(ALL[name], lengths, correct).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_integers_and_booleans_do(name):
    correct = torch.tensor([[True, False, True]])
    found = ALL[name](correct, torch.tensor([[3, 4, 5]]), done(correct))
    assert found.dtype == torch.float32
    close(found.double(), ALL[name](correct.double(), f64([3, 4, 5]), done(correct)), 1e-6)


def test_the_accuracy_is_that_of_the_scored():
    correct = f64([1, NAN, NAN, 0], [NAN] * 4)
    close(length.group_accuracy(correct, done(correct)), [0.5, 0])


def test_a_fraction_that_is_a_whole_number_of_groups_is_not_rounded_up():
    correct = torch.ones(30, 2)
    assert gate(correct, done(correct), 0.1).sum() == 3


def test_an_accuracy_at_the_floor_reaches_it():
    correct = torch.tensor([[1.0] * 7 + [0.0] * 3])
    assert gate(correct, done(correct), 1, min_group_accuracy=0.7).all()


def test_no_prompts():
    assert group_gated(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha: .* got 1.5"),
        ({"alpha": NAN}, "alpha"),
        ({"gate_fraction": -0.1}, "gate_fraction: .* got -0.1"),
        ({"min_group_accuracy": 2}, "min_group_accuracy"),
        ({"length_std_floor": -1}, "length_std_floor"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        of(group_gated, *GROUPS["A"], **options)


def test_wrong_shapes_and_values_are_named():
    with pytest.raises(ValueError, match=r"lengths: must be \[1, 4\] like finished, got \[1, 3\]"):
        group_gated(f64([1] * 4), f64([1] * 3), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="finished: must be boolean"):
        group_gated(f64([1] * 4), f64([1] * 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="correct: must be 0 or 1"):
        group_gated(f64([1, 0.5]), f64([1, 1]), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="cache"):
        of(length.soft_overlong, *GROUPS["A"], max_length=10, cache=11)

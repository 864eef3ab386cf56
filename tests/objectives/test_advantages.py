"""Group-relative advantages: the paper account's vectors, what each scale divides by, what was not scored."""

import pytest
import torch

from posttrain.objectives.advantages import group_advantages

NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def advantages(rewards, scale="none", ddof=0, eps=1e-6):
    """As the account's vectors have them."""
    return group_advantages(rewards, scale, ddof, eps)


def test_the_defaults_are_trl_s():
    rewards = f64([1, 0.5, 0, 1])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    close(group_advantages(rewards), expected, 1e-12)


VECTORS = [  # rewards, with std, without
    ([1, 1, 0, 1], [0.577349, 0.577349, -1.732047, 0.577349], [0.25, 0.25, -0.75, 0.25]),
    ([1, 0, 0, 1], [0.999998, -0.999998, -0.999998, 0.999998], [0.5, -0.5, -0.5, 0.5]),
    ([0, 0, 1, 0], [-0.577349, -0.577349, 1.732047, -0.577349], [-0.25, -0.25, 0.75, -0.25]),
    ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("rewards", "with_std", "without"), VECTORS)
def test_vectors(rewards, with_std, without):
    close(advantages(f64(rewards), "group"), [with_std])
    close(advantages(f64(rewards)), [without])


def test_batch_divides_all_groups_by_one_deviation():
    rewards = f64([1, 0], [1, 1], [0, 0.5])
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-6)
    close(advantages(rewards, "batch"), expected, 1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_sums_to_zero(scale):
    rewards = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(advantages(rewards, scale).sum(-1), [0.0] * 5, 1e-12)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_what_was_not_scored_changes_nothing_for_the_others(scale):
    found = advantages(f64([1, NAN, 0, 1]), scale)
    close(found[0, [0, 2, 3]], advantages(f64([1, 0, 1]), scale)[0])
    assert found[0, 1] == 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("rewards", [[[NAN, NAN]], [[1.0, NAN]], [[1.0]]])
def test_too_few_rewards_teach_nothing(scale, rewards):
    close(advantages(f64(*rewards), scale, ddof=1), torch.zeros(1, len(rewards[0])))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scale: .*'std'"):
        advantages(f64([1, 0]), "std")
    with pytest.raises(ValueError, match=r"rewards: must be \[prompts, samples\], got \[3\]"):
        advantages(torch.zeros(3))

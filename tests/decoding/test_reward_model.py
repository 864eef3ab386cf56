"""Scores of whole completions, against one completion at a time."""

import pytest
import torch

from posttrain.decoding.reward_model import token_values, value_scores
from posttrain.objectives.ipl import implied_rewards
from tests.decoding.test_guide import ATOMS, value_model
from tests.small_models import build_model


def rows(count=9):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (count, 2), generator=generator).tolist()
    return [tuple(torch.randint(2, 101, (n,), generator=generator).tolist() for n in pair) for pair in lengths]


@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", ["v", "q", "shared"])
def test_a_score_is_the_mean_of_the_return_after_the_last_token(head, atoms):
    """Whatever stands beside it in a batch, and in the order of the rows."""
    policy, value, asked = build_model("llama"), value_model(head, atoms=atoms), rows()
    found = value_scores(value, asked, policy, batch_tokens=100)
    assert found.shape == (9,) and found.dtype == torch.float32
    for score, (prompt, completion) in zip(found, asked, strict=True):
        with torch.inference_mode():
            logits = value(torch.tensor([[*prompt, *completion]]), trunk=policy.get_decoder())[0, -1]
        probabilities = torch.sigmoid(logits) if atoms is None else torch.softmax(logits, -1)
        expected = (probabilities * torch.tensor(atoms or 1.0)).sum()
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["v", "q", "shared"])
def test_every_token_has_the_score_of_the_completion_cut_after_it(head):
    policy, value, asked = build_model("llama"), value_model(head), rows(4)
    for (prompt, completion), found in zip(asked, token_values(value, asked, policy, batch_tokens=100), strict=True):
        cut = [(prompt, completion[: end + 1]) for end in range(len(completion))]
        torch.testing.assert_close(torch.tensor(found), value_scores(value, cut, policy), atol=1e-5, rtol=1e-5)


def test_the_last_token_has_a_say():
    policy, value = build_model("llama"), value_model("v")
    one, other = value_scores(value, [((5, 9), (33, 7)), ((5, 9), (33, 8))], policy)
    assert abs(one - other) > 1e-4


@pytest.mark.parametrize("head", ["q", "shared"])
def test_of_preferences_a_score_is_the_sum_of_implied_rewards(head):
    """Q of every token less V of the state it leads to, which after the last one is 0; all less V of the prompt."""
    policy, value, asked = build_model("llama"), value_model(head), rows(5)
    value.config.preferences = True
    found = value_scores(value, asked, policy, batch_tokens=100)
    for score, after, (prompt, completion) in zip(found, token_values(value, asked, policy), asked, strict=True):
        with torch.inference_mode():
            q, v = value(torch.tensor([[*prompt, *completion]]), trunk=policy.get_decoder())[:, len(prompt) :].unbind(
                -1
            )
        rewards = implied_rewards(q, v, torch.ones_like(q, dtype=torch.bool))
        torch.testing.assert_close(score, rewards.sum() - v[0, 0], atol=1e-4, rtol=1e-5)
        assert len(after) == len(completion) and after[-1] == pytest.approx(score.item(), abs=1e-4)


def test_no_completion_has_no_score():
    assert value_scores(value_model("v"), [], build_model("llama")).shape == (0,)


@pytest.mark.parametrize("head", ["v", "q", "shared"])
def test_an_empty_completion_has_the_value_after_its_prompt(head):
    policy, value = build_model("llama"), value_model(head)
    rows = [((5, 9, 33), ()), ((5, 9), (33, 7)), ((5, 9), (33,))]
    empty, other, same = value_scores(value, rows, policy)
    torch.testing.assert_close(empty, same, atol=1e-5, rtol=1e-5)
    assert abs(empty - other) > 1e-4
    assert token_values(value, rows[:1], policy) == [[]]

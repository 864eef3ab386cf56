"""Policy and value model in one forward."""

import copy

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.actor_critic import ActorCritic, new_critic, prefix_values
from posttrain.models.features import FeatureSpec, hidden_features
from posttrain.models.probe import Probe, ProbeCard
from tests.small_models import build_model


def batch():
    ids = torch.randint(2, 101, (3, 10), generator=torch.Generator().manual_seed(0))
    actions = torch.zeros(3, 10, dtype=torch.bool)
    actions[0, 4:9] = actions[1, 1:4] = actions[2, 9:] = True
    return ids, actions


def test_a_token_s_state_is_the_one_before_it():
    policy = build_model("llama")
    critic = new_critic(policy, "reference")
    torch.nn.init.normal_(critic.head.weight)
    ids, actions = batch()
    logprobs, values = ActorCritic(policy, critic)(ids, actions)
    assert logprobs.shape == values.shape == (9,)
    number = 0
    for row in range(3):
        for time in actions[row].nonzero()[:, 0].tolist():
            alone = policy(input_ids=ids[row : row + 1, :time]).logits[0, -1]
            expected = torch.log_softmax(alone, -1)[ids[row, time]]
            torch.testing.assert_close(logprobs[number], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[number], critic(ids[row : row + 1, :time])[0, -1])
            number += 1


def test_the_values_of_prefixes_are_those_that_training_reads():
    policy = build_model("llama")
    critic = new_critic(policy, "reference").eval()
    torch.nn.init.normal_(critic.head.weight)
    ids, actions = batch()
    _, values = ActorCritic(policy, critic)(ids, actions)
    spans = [(4, 9), (1, 4), (9, 10)]
    rows = [(ids[row, :first].tolist(), ids[row, first:end].tolist()) for row, (first, end) in enumerate(spans)]
    found = prefix_values(critic, rows, batch_tokens=15)
    assert [len(row) for row in found] == [6, 4, 2]
    torch.testing.assert_close(torch.cat([row[:-1] for row in found]), values.detach(), atol=1e-5, rtol=1e-5)


def test_a_new_critic_says_zero_and_is_not_the_policy():
    policy = build_model("qwen2")
    critic = new_critic(policy, "reference")
    ids, actions = batch()
    _, values = ActorCritic(policy, critic)(ids, actions)
    assert (values == 0).all()
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}
    assert not shared


def test_losses_of_one_do_not_reach_the_other():
    policy = build_model("llama")
    model = ActorCritic(policy, new_critic(policy, "reference"))
    ids, actions = batch()
    logprobs, values = model(ids, actions)
    gradients = torch.autograd.grad(
        logprobs.sum(), list(model.critic.parameters()), allow_unused=True, retain_graph=True
    )
    assert all(gradient is None for gradient in gradients)
    gradients = torch.autograd.grad(values.sum(), list(policy.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_the_heads_are_taken_in_float32_whatever_the_precision():
    """What bfloat16 rounds is the states, and the weights where they are bfloat16; never a logit or a value."""
    policy = copy.deepcopy(build_model("llama"))
    critic = new_critic(policy, "reference")
    torch.nn.init.normal_(critic.head.weight)
    model, (ids, actions) = ActorCritic(policy, critic), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expect_float32(*model(ids, actions))
    expect_float32(*model.bfloat16()(ids, actions))
    sum(map(torch.sum, model(ids, actions))).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in (policy.lm_head, critic.head))


def expect_float32(*found):
    for tensor in found:
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())


def probe_of(card):
    probe = Probe(ProbeCard(**{"dim": 64, "feature": FeatureSpec(3), "policy": "reference", "loss": "mse", **card}))
    torch.manual_seed(2)
    for tensor in (probe.first.weight, probe.first.bias, probe.mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(probe.std, 0.5, 2.0)
    return probe


def test_a_critic_may_start_from_what_a_probe_says():
    policy, probe = build_model("llama"), probe_of({})
    critic = new_critic(policy, "reference", probe=probe).eval()
    ids, _ = batch()
    rows = [(row[:3].tolist(), row[3:].tolist()) for row in ids]
    expected = probe(hidden_features(policy, rows, [FeatureSpec(3)])[:, 0].float())
    torch.testing.assert_close(critic(ids)[:, -1], expected, atol=1e-2, rtol=1e-3)  # features are kept in float16


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            {"feature": FeatureSpec(2)},
            "probe: .* a linear probe of layer 3, last, of loss mse; this one is linear, of layer 2",
        ),
        ({"hidden": 4}, "this one is not linear"),
        ({"loss": "policy"}, "of loss policy"),
        ({"policy": "other"}, "probe: it reads the policy other"),
    ],
)
def test_a_probe_whose_scores_are_no_values_is_refused(card, message):
    with pytest.raises(UserError, match=message):
        new_critic(build_model("llama"), "reference", probe=probe_of(card))

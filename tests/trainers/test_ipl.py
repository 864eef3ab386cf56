"""The trainer of preferences on the embedded model, with pairs made by hand."""

from functools import partial

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.models.value import load_value_model, new_value_model
from posttrain.objectives.ipl import expectile_loss, implied_rewards, preference_loss, reward_penalty
from posttrain.trainers.ipl import IPLTrainer
from posttrain.trainers.value_examples import collate_pairs
from tests.trainers.test_value import add_up, assert_close, config, examples, losses_of, weights_of


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu")


def pairs(count, seed=0):
    every = examples(2 * count, seed)
    return [{**one, "rejected": other} for one, other in zip(every[1::2], every[::2], strict=True)]


def trainer_of(policy, folder, head="q", held_out=None, data=None, **changes):
    value = new_value_model(policy, head, zero_init=False, width=32, preferences=True)
    trunk = policy.model if head == "shared" else None
    return IPLTrainer(value, config(folder, **changes), data or pairs(16), held_out, trunk=trunk)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["q", "shared"])
def test_the_first_loss_is_the_objective(policy, tmp_path, head):
    """And V is what the head says of no candidate, of the state before a token."""
    trainer = trainer_of(policy, tmp_path, head, max_steps=1)
    batch, value = collate_pairs(pairs(8)), trainer.model
    assert batch["returns"].tolist() == [1.0] * 8 + [0.0] * 8
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    decoder = policy.model.get_decoder() if head == "shared" else value.backbone
    with torch.no_grad():
        logits = value(**inputs, trunk=policy.model.get_decoder() if head == "shared" else None)
        states = decoder(**inputs).last_hidden_state[:, :-1]
        embeddings = decoder.get_input_embeddings()(batch["input_ids"][:, 1:])
        for place, candidates in ((0, embeddings), (1, torch.zeros_like(embeddings))):
            expected = value.head(states, value.head.project(candidates)).squeeze(-1)
            torch.testing.assert_close(logits[:, 1:, place], expected, atol=1e-5, rtol=1e-5)
    q, values, mask = *logits.unbind(-1), batch["mask"]
    rewards = implied_rewards(q, values, mask)
    expected = preference_loss(rewards[:8], rewards[8:]) + reward_penalty(rewards, mask, 0.5)
    expected += expectile_loss(q, values, mask, 0.7)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(policy, tmp_path):
    add_up(partial(trainer_of, policy, tmp_path, optim="sgd", learning_rate=1e-2))


@pytest.mark.slow
def test_packing_equals_padding(policy, tmp_path):
    common = {"adam_epsilon": 1e-3, "held_out": pairs(5, seed=1)}
    padded, packed = (trainer_of(policy, tmp_path, packing=packing, **common) for packing in (False, True))
    padded.train(), packed.train()
    assert_close(weights_of(packed), weights_of(padded), 1e-6)
    assert packed.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], abs=1e-5)


def test_values_receive_no_gradient_of_the_preferences(policy, tmp_path):
    """They follow Q: with the expectile loss alone would they move, and Q without it."""
    trainer = trainer_of(policy, tmp_path)
    batch = collate_pairs(pairs(4))
    logits = torch.randn(8, batch["mask"].shape[1], 2, requires_grad=True)
    trainer._loss(logits, batch, None).backward()
    found = logits.grad[..., 1]
    values = logits.detach()[..., 1].clone().requires_grad_()
    expectile_loss(logits.detach()[..., 0], values, batch["mask"]).backward()
    torch.testing.assert_close(found, values.grad)


@pytest.mark.slow
def test_it_learns_which_of_a_pair_is_preferred(policy, tmp_path):
    """Of 100 held-out pairs, half of which are right by chance."""
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-4}
    trainer = trainer_of(policy, tmp_path / "run", "q", pairs(100, seed=1), pairs(128, seed=2), **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_pairs_right"] < 0.65 and after["eval_pairs_right"] > 0.8
    assert after["eval_loss"] < before["eval_loss"]
    trainer.save(tmp_path / "guide")
    again = load_value_model(tmp_path / "guide", policy)
    assert again.config.preferences
    assert_close(dict(again.named_parameters()), weights_of(trainer), 0)


def test_settings_are_checked(policy, tmp_path):
    with pytest.raises(UserError, match="preferences: the value model is of returns"):
        IPLTrainer(new_value_model(policy, "q"), config(tmp_path), pairs(2))
    with pytest.raises(UserError, match="reduction: must be row for preferences"):
        trainer_of(policy, tmp_path, reduction="token")
    for head, atoms in (("v", None), ("q", [0.0, 1.0])):
        with pytest.raises(UserError, match="preferences: need a q or shared head without atoms"):
            new_value_model(policy, head, atoms=atoms, preferences=True)

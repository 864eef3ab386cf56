"""The schedule's vector, and that the masks are where and when it says, and nowhere else."""

import pytest
import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.models.value import load_value_model
from posttrain.trainers.head_dropout import HeadDropout, dropout_rate
from posttrain.trainers.value_examples import collate
from tests.trainers.test_value import HEADS, assert_close, config, examples, losses_of, trainer_of, weights_of

EARLY = {"head_dropout": 0.5, "dropout_schedule": "early", "dropout_cutoff": 5}


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu")


def rates(schedule, cutoff=5, steps=12):
    return [dropout_rate(0.1, schedule, cutoff, step) for step in range(steps)]


def test_the_vector():
    assert rates("early") == pytest.approx([0.1, 0.075, 0.05, 0.025, *[0] * 8], abs=1e-12)
    assert rates("late") == [0] * 5 + [0.1] * 7
    assert rates("constant") == [0.1] * 12
    assert rates("early", cutoff=1, steps=3) == [0.1, 0, 0]


def test_masks_fall_on_what_the_layer_reads_in_training_only():
    layer = nn.Linear(10_000, 1, bias=False)
    nn.init.ones_(layer.weight)
    dropout = HeadDropout(layer, 0.3, "constant", 0)
    dropout.now = 0.3
    inputs = torch.ones(1, 10_000)
    kept = layer.train()(inputs).item() * 0.7 / 10_000  # kept inputs are scaled up
    assert kept == pytest.approx(0.7, abs=0.03) and kept != 0.7
    assert layer.eval()(inputs).item() == 10_000


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_rates_follow_the_trainers_steps(policy, tmp_path, head):
    """And in evaluation there is none: with the same weights it says what it says without."""
    held_out = examples(6, seed=1)
    trainer = trainer_of(policy, tmp_path, head, held_out=held_out, max_steps=6, **EARLY)
    plain = trainer_of(policy, tmp_path, head, held_out=held_out, max_steps=6)
    (dropout,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, HeadDropout))
    seen = []
    layer = trainer.model.head if head == "v" else trainer.model.head.prefix
    layer.register_forward_hook(lambda *_: seen.append(dropout.now))
    trainer.train(), plain.train()
    assert seen == pytest.approx([0.5, 0.375, 0.25, 0.125, 0, 0])
    assert losses_of(trainer)[0] != losses_of(plain)[0]
    dropout.now = 0.5
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    trainer.save(tmp_path / "guide")
    batch = collate(examples(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trunk = policy.model.get_decoder() if head == "shared" else None
    with torch.no_grad():
        found = load_value_model(tmp_path / "guide", policy).train()(**inputs, trunk=trunk)
        assert torch.equal(found, plain.model.eval()(**inputs, trunk=trunk))


@pytest.mark.slow
def test_a_resumed_training_has_the_same_schedule(policy, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 5, **EARLY}
    whole, resumed = (trainer_of(policy, tmp_path, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_close(weights_of(resumed), weights_of(whole), 0)
    assert losses_of(resumed) == losses_of(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dropout": 1.0}, r"^head_dropout: must be at least 0 and below 1, got 1\.0"),
        ({"dropout_schedule": "never"}, "^dropout_schedule: must be one of constant, early, late, got 'never'"),
        ({"dropout_schedule": "late"}, "^dropout_cutoff: an early or late dropout_schedule needs it"),
        ({"dropout_cutoff": 5}, "^dropout_cutoff: an early or late dropout_schedule needs it"),
        ({**EARLY, "dropout_cutoff": 0}, "^dropout_cutoff: must be at least 1 step, got 0"),
    ],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **changes)

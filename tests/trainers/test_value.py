"""The value trainer on the embedded model, with examples made by hand."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.models.value import load_value_model, new_value_model
from posttrain.objectives.qsharp import bernoulli_loss, categorical_loss
from posttrain.trainers.value import ValueConfig, ValueTrainer
from posttrain.trainers.value_examples import collate

HEADS = ("v", "q", "shared")
ATOMS = [0.0, 0.5, 1.0]
SIGNAL = 42


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu")


def examples(count, seed=0, longest=14, early=3):
    """Ragged; the return is 1 where SIGNAL is among the first `early` tokens of the completion."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator).tolist()

    made = []
    for i in range(count):
        prompt, completion = draw(43, 100, (draw(1, 5),)), draw(43, 100, (draw(4, longest),))
        if i % 2:
            completion[draw(0, early)] = SIGNAL
        made.append(
            {
                "input_ids": prompt + completion,
                "first": len(prompt) + (draw(0, 3) if i % 3 == 0 else 0),
                "return_": float(i % 2),
                "prompt_id": f"p{i}",
            }
        )
    return made


def config(folder, **changes):
    return ValueConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 1e-3,
            **changes,
        }
    )


def trainer_of(policy, folder, head="v", atoms=None, data=None, held_out=None, peft_config=None, **changes):
    value = new_value_model(policy, head, atoms=atoms, zero_init=False, width=32)
    trunk = policy.model if head == "shared" else None
    data = examples(16) if data is None else data
    return ValueTrainer(value, config(folder, **changes), data, held_out, trunk=trunk, peft_config=peft_config)


def weights_of(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# -- the loss


def add_up(make):
    """Micro-batches of the trainer that `make` makes are worth the batch: the same weights, other than at the start."""
    whole = make()
    parts = make(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    start = weights_of(whole)
    whole.train(), parts.train()
    assert_close(weights_of(parts), weights_of(whole), 1e-6)
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=1e-5)
    assert max(float((weight - start[name]).abs().max()) for name, weight in weights_of(whole).items()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["row", "token"])
@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", HEADS)
def test_the_first_loss_is_the_objective(policy, tmp_path, head, atoms, reduction):
    trainer = trainer_of(policy, tmp_path, head, atoms, reduction=reduction, max_steps=1)
    batch = collate(examples(8))
    trunk = policy.model.get_decoder() if head == "shared" else None
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"], trunk=trunk)
    if atoms is None:
        expected = bernoulli_loss(logits, batch["returns"], batch["mask"], reduction)
    else:
        expected = categorical_loss(logits, batch["returns"], torch.tensor(atoms), batch["mask"], reduction)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["row", "token"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw_torch"])
def test_micro_batches_add_up_to_the_batch(policy, tmp_path, optimiser, reduction):
    """Rows of unequal length: a mean of the micro-batches' means would be another loss."""
    common = {"reduction": reduction, "optim": optimiser, "adam_epsilon": 1e-3}
    add_up(partial(trainer_of, policy, tmp_path, **common))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "atoms"), [("v", None), ("q", ATOMS), ("shared", None)])
def test_packing_equals_padding(policy, tmp_path, head, atoms):
    common = {"head": head, "atoms": atoms, "adam_epsilon": 1e-3, "held_out": examples(9, seed=1)}
    padded, packed = (trainer_of(policy, tmp_path, packing=packing, **common) for packing in (False, True))
    padded.train(), packed.train()
    assert_close(weights_of(packed), weights_of(padded), 1e-6)
    found, expected = packed.evaluate(), padded.evaluate()
    for name in ("eval_loss", "eval_auc", "eval_calibration_error", "eval_explained_variance"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(policy, tmp_path):
    plain, checkpointed = (trainer_of(policy, tmp_path, gradient_checkpointing=on) for on in (False, True))
    plain.train(), checkpointed.train()
    assert checkpointed.model.backbone.is_gradient_checkpointing
    assert losses_of(checkpointed) == losses_of(plain)
    assert_close(weights_of(checkpointed), weights_of(plain), 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_bf16_keeps_float32_weights(policy, tmp_path, head):
    """Steps far below bfloat16's resolution still move them."""
    trainer = trainer_of(policy, tmp_path, head, bf16=True, learning_rate=1e-6, weight_decay=0)
    before = weights_of(trainer)
    plain = trainer_of(policy, tmp_path, head)
    trainer.train(), plain.train()
    assert losses_of(trainer)[0] == pytest.approx(losses_of(plain)[0], abs=0.02)
    for name, weight in weights_of(trainer).items():
        assert weight.dtype == torch.float32
        moved = (weight - before[name]).abs().max()
        assert 0 < moved < 3e-6, name


# -- what is trained


@pytest.mark.slow
def test_a_shared_head_leaves_the_policy_as_it_is(policy, tmp_path):
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    trainer = trainer_of(policy, tmp_path, "shared")
    start = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.state_dict().items())
    assert all(weight.grad is None for weight in policy.model.parameters())
    assert start.keys() == {
        f"head.{name}" for name in ("prefix.weight", "prefix.bias", "candidate.weight", "out.weight", "out.bias")
    }
    assert all(not torch.equal(weight, start[name]) for name, weight in weights_of(trainer).items())


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["v", "q"])
def test_adapters_and_head_are_all_that_lora_trains(policy, tmp_path, head):
    trainer = trainer_of(policy, tmp_path, head, peft_config=lora())
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.startswith("head.") or "lora_" in name}
    assert any("lora_B" in name for name in moved)


@pytest.mark.slow
def test_saving_merges_adapters(policy, tmp_path):
    trainer = trainer_of(policy, tmp_path, peft_config=lora(), learning_rate=1e-2, max_steps=4)
    untrained = new_value_model(policy, zero_init=False)
    trainer.train()
    batch = collate(examples(8))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        expected = trainer.model(**inputs)
    trainer.save(tmp_path / "guide")
    again = load_value_model(tmp_path / "guide", policy)
    assert again.state_dict().keys() == untrained.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(
        again.backbone.layers[0].self_attn.q_proj.weight, untrained.backbone.layers[0].self_attn.q_proj.weight
    )


def test_the_seed_decides_the_adapters(policy, tmp_path):
    first = trainer_of(policy, tmp_path, peft_config=lora())
    torch.rand(5)
    assert_close(weights_of(trainer_of(policy, tmp_path, peft_config=lora())), weights_of(first), 0)


# -- saving and going on


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_is_what_was_trained(policy, tmp_path, head):
    trainer = trainer_of(policy, tmp_path / "run", head, held_out=examples(6, seed=1))
    trainer.train()
    trainer.evaluate()
    trainer.save(tmp_path / "guide")
    again = load_value_model(tmp_path / "guide", policy)
    assert_close(dict(again.named_parameters()), weights_of(trainer), 0)
    assert {path.name for path in (tmp_path / "guide").iterdir()} == {
        "config.json",
        "model.safetensors",
        "training.json",
    }
    record = json.loads((tmp_path / "guide" / "training.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-3 and "torch" in record["versions"]
    assert record["log"][0]["loss"] == losses_of(trainer)[0] and record["by_position"][0]["tokens"] > 0


@pytest.mark.slow
def test_what_is_not_defined_does_not_lose_the_model(policy, tmp_path):
    """No AUC where all held-out returns are equal."""
    trainer = trainer_of(policy, tmp_path / "run", held_out=examples(6)[1::2])
    trainer.train()
    assert np.isnan(trainer.evaluate()["eval_auc"])
    trainer.save(tmp_path / "guide")
    log = json.loads((tmp_path / "guide" / "training.json").read_text())["log"][-1]
    assert "eval_loss" in log and "eval_auc" not in log


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_run_ends_with_the_same_weights(policy, tmp_path, adapted):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    settings["train_sampling_strategy"] = "random"
    settings["save_total_limit"] = 5

    def fresh(folder):
        return trainer_of(policy, folder, peft_config=lora() if adapted else None, **settings)

    whole = fresh(tmp_path)
    whole.train()
    resumed = fresh(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_close(weights_of(resumed), weights_of(whole), 0)
    assert losses_of(resumed) == losses_of(whole)


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_takes_no_further_one(policy, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 4, "save_strategy": "epoch"}
    whole = trainer_of(policy, tmp_path, **settings)
    whole.train()
    assert whole.state.global_step == 6
    resumed = trainer_of(policy, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 6
    assert_close(weights_of(resumed), weights_of(whole), 0)


# -- learning


@pytest.mark.slow
@pytest.mark.parametrize(("head", "atoms"), [("v", None), ("v", ATOMS), ("q", None), ("shared", None)])
def test_it_learns_which_prefixes_succeed(policy, tmp_path, head, atoms):
    data, held_out = (examples(n, seed=n, longest=8, early=1) for n in (256, 96))
    fixed = head == "shared"  # what its states remember of an early token is not trained
    settings = {"max_steps": 100, "per_device_train_batch_size": 32, "learning_rate": 1e-2 if fixed else 1e-3}
    settings["train_sampling_strategy"] = "group_by_length"
    trainer = trainer_of(policy, tmp_path, head, atoms, data, held_out, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert 0.3 < before["eval_auc"] < 0.7
    assert trainer.by_position[0]["auc"] > (0.8 if fixed else 0.95)
    assert fixed or after["eval_auc"] > 0.95
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_explained_variance"] > before["eval_explained_variance"]


def test_held_out_metrics_are_over_labelled_tokens_of_all_batches(policy, tmp_path):
    held_out = examples(7, seed=1)
    trainer = trainer_of(policy, tmp_path, held_out=held_out, per_device_eval_batch_size=2, reduction="token")
    found = trainer.evaluate()
    batch = collate(held_out)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["mask"]
    spread = batch["returns"][:, None].expand(mask.shape)[mask]
    predicted = torch.sigmoid(logits)[mask]
    variance = 1 - (spread - predicted).var(correction=0) / spread.var(correction=0)
    assert found["eval_explained_variance"] == pytest.approx(variance.item(), abs=1e-4)
    pairs = (predicted[spread == 1][:, None] > predicted[spread == 0]).float().mean()
    assert found["eval_auc"] == pytest.approx(pairs.item(), abs=1e-6)
    assert found["eval_loss"] == pytest.approx(bernoulli_loss(logits, batch["returns"], mask, "token").item(), abs=1e-5)
    assert sum(part["tokens"] for part in trainer.by_position) == mask.sum()


# -- mistakes


def test_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="reduction: must be row or token, got 'mean'"):
        config(tmp_path, reduction="mean")


def test_a_trunk_is_a_shared_heads(policy, tmp_path):
    for head, trunk in (("shared", None), ("v", policy.model)):
        with pytest.raises(UserError, match="trunk: "):
            ValueTrainer(new_value_model(policy, head), config(tmp_path), examples(4), trunk=trunk)


def test_a_shared_head_has_no_backbone(policy, tmp_path):
    with pytest.raises(UserError, match="gradient_checkpointing: a shared head has nothing to compute again"):
        trainer_of(policy, tmp_path, "shared", gradient_checkpointing=True)
    with pytest.raises(UserError, match="peft_config: a shared head has no backbone"):
        trainer_of(policy, tmp_path, "shared", peft_config=lora())


@pytest.mark.parametrize("return_", [-0.1, 1.5, -1.0])
def test_returns_of_a_bernoulli_model_are_within_0_and_1(policy, tmp_path, return_):
    """Beyond, the likelihood has no bound and training would run away."""
    bad = examples(4)
    bad[2]["return_"] = return_
    for data, held_out in ((bad, None), (examples(4), bad)):
        with pytest.raises(UserError, match=r"reward: returns must be within \[0, 1\] without atoms"):
            trainer_of(policy, tmp_path, data=data, held_out=held_out)
    trainer_of(policy, tmp_path, data=bad, atoms=ATOMS)

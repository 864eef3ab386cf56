"""DQO with adapters on the policy, and on the value model, against the objective by hand."""

import copy

import pytest
import torch
import transformers

from posttrain.errors import UserError
from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.models.value import ValueModel
from posttrain.trainers.dqo import DQOTrainer, collate, labelled
from tests.small_models import build_model
from tests.trainers.test_dqo import _StopAt, arguments, by_hand, examples

BOTH = ["both on one base", "policy", "critic"]


def lora(**changes):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes})


def trainer_of(folder, adapted="both on one base", count=8, **changes):
    policy = copy.deepcopy(build_model("llama"))
    critic = new_critic(policy, "reference", shared=adapted == BOTH[0])
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.head.weight, std=0.05)
    model = ActorCritic(policy, critic)
    data = labelled(model, examples(count), "reference", folder / "cache")
    configs = {
        "peft_config": None if adapted == "critic" else lora(),
        "value_peft_config": None if adapted == "policy" else lora(),
    }
    return DQOTrainer(model, arguments(folder / "run", **changes), data, **configs)


def weights_of(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapted", BOTH)
def test_the_first_step_is_the_objective_s(tmp_path, adapted, checkpointing, packing):
    """Padded or packed rows, two micro-batches, one count."""
    trainer = trainer_of(tmp_path, adapted, lam=0.9, packing=packing)
    model, data = trainer.model.train(), trainer.train_dataset
    expected = by_hand(model, collate(data), trainer.args)
    if checkpointing:
        model.gradient_checkpointing_enable()
    count = collate(data)["actions"].sum()
    losses = [trainer.compute_loss(model, collate(data[i : i + 4]), num_items_in_batch=count) for i in (0, 4)]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), expected, atol=1e-6, rtol=1e-5)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("lora_B" in name for name in trained)
    theirs = torch.autograd.grad(expected, list(trained.values()))
    for (name, mine), other in zip(trained.items(), theirs, strict=True):
        torch.testing.assert_close(mine.grad, other, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_policy_and_value_model_stand_on_one_base(tmp_path):
    model = trainer_of(tmp_path).model
    parameters = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert parameters == trained + sum(weight.numel() for weight in build_model("llama").parameters())


def test_adapters_and_head_are_all_that_is_trained(tmp_path):
    trainer = trainer_of(tmp_path)
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name or name.startswith("critic.head") for name in moved)
    assert {name.partition(".")[0] for name in moved} == {"policy", "critic"}


@pytest.mark.parametrize("adapted", [BOTH[0], "policy"])
def test_only_the_value_model_s_last_layers_are_trained(tmp_path, adapted):
    """With adapters on them, or whole; below, autograd has nothing to do, and a step is the objective's."""
    trainer = trainer_of(tmp_path, adapted, value_layers=1)
    model, data = trainer.model.train(), trainer.train_dataset
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    of_critic = [name for name in trained if name.startswith("critic.")]
    assert any("layers.2." in name for name in of_critic)
    assert all("layers.2." in name or "head." in name or name == "critic.backbone.norm.weight" for name in of_critic)
    assert any("layers.0." in name for name in trained)  # of the policy
    states = []
    lower = next(layer for name, layer in model.critic.backbone.named_modules() if name.endswith("layers.1"))
    lower.register_forward_hook(lambda layer, inputs, output: states.append(output))
    loss = trainer.compute_loss(model, collate(data))
    assert states and not states[0].requires_grad
    expected = by_hand(model, collate(data), trainer.args)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(each, list(trained.values())) for each in (loss, expected))
    for name, mine, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("adapted", [BOTH[0], "policy"])
def test_last_layers_alone_are_resumed(tmp_path, adapted):
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "value_layers": 1}
    ends = []
    for stops in ((), (2,)):
        folder = tmp_path / str(len(stops))
        for step in stops:
            stopped = trainer_of(folder, adapted, count=16, **settings)
            stopped.add_callback(_StopAt(step))
            stopped.train()
        trainer = trainer_of(folder, adapted, count=16, **settings)
        trainer.train(resume_from_checkpoint=True if stops else None)
        ends.append(weights_of(trainer))
    assert all(torch.equal(weight, ends[0][name]) for name, weight in ends[1].items())


@pytest.mark.parametrize("adapted", BOTH)
def test_saving_merges_and_leaves_the_models_as_they_are(tmp_path, adapted):
    trainer = trainer_of(tmp_path, adapted, max_steps=2, learning_rate=1e-2, value_learning_rate=1e-2)
    trainer.train()
    before = weights_of(trainer)
    trainer.save(tmp_path / "policy")
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    model, ids = trainer.model.eval(), torch.randint(2, 101, (1, 7), generator=torch.Generator().manual_seed(0))
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert not any("lora" in name for name in policy.state_dict())
    torch.testing.assert_close(policy(ids).logits, model.policy(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    critic = ValueModel.from_pretrained(tmp_path / "policy" / "critic")
    torch.testing.assert_close(critic(ids), model.critic(ids), atol=1e-5, rtol=1e-5)


def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", count=16, **settings)
    whole.train()
    stopped = trainer_of(tmp_path / "parts", count=16, **settings)
    stopped.add_callback(_StopAt(3))
    stopped.train()
    resumed = trainer_of(tmp_path / "parts", count=16, seed=5, **settings)  # adapters that start elsewhere
    resumed.args.seed = 42
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    expected = weights_of(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())
    assert not (tmp_path / "parts" / "run" / "checkpoint-8" / "model.safetensors").exists()  # the base is not copied


def test_what_cannot_be_adapted_is_refused(tmp_path):
    policy = copy.deepcopy(build_model("llama"))
    model = ActorCritic(policy, new_critic(policy, "reference", shared=True))
    with pytest.raises(UserError, match="value_peft_config: policy and value model have the same weights"):
        DQOTrainer(model, arguments(tmp_path), [], peft_config=lora())
    with pytest.raises(UserError, match="peft_config: lora_dropout must be 0, got 0.1"):
        DQOTrainer(model, arguments(tmp_path), [], peft_config=lora(lora_dropout=0.1), value_peft_config=lora())
    with pytest.raises(UserError, match="value_layers: the value model has 3 layers, got 4"):
        DQOTrainer(model, arguments(tmp_path, value_layers=4), [], peft_config=lora(), value_peft_config=lora())
    with pytest.raises(UserError, match="value_layers: value_peft_config names exclude_modules already"):
        excluding = lora(exclude_modules=["q_proj"])
        DQOTrainer(model, arguments(tmp_path, value_layers=1), [], peft_config=lora(), value_peft_config=excluding)

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


@pytest.mark.parametrize(("checkpointing", "packing"), [(False, False), (True, False), (False, True), (True, True)])
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
        torch.testing.assert_close(mine.grad, other, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_policy_and_value_model_stand_on_one_base(tmp_path):
    model = trainer_of(tmp_path).model
    parameters = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert parameters == trained + sum(weight.numel() for weight in build_model("llama").parameters())


@pytest.mark.slow
def test_adapters_and_head_are_all_that_is_trained(tmp_path):
    trainer = trainer_of(tmp_path)
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name or name.startswith("critic.head") for name in moved)
    assert {name.partition(".")[0] for name in moved} == {"policy", "critic"}


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_one_configuration_serves_both_models(tmp_path):
    policy = copy.deepcopy(build_model("llama"))
    policy.model.layers = policy.model.layers[:2]  # so few modules that peft names each in full
    policy.config.num_hidden_layers = 2
    model, config = ActorCritic(policy, new_critic(policy, "reference")), lora()
    DQOTrainer(model, arguments(tmp_path), examples(), peft_config=config, value_peft_config=config)
    assert all(any("lora_A" in name for name, _ in part.named_parameters()) for part in (model.policy, model.critic))
    assert config.target_modules == "all-linear"


@pytest.mark.slow
def test_adapters_below_the_layers_that_learn_stay_as_they_are(tmp_path):
    trainer = trainer_of(tmp_path, value_layers=1)
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])}
    of_layers = [name for name in moved if name.startswith("critic") and "layers." in name]
    assert of_layers and all("layers.2." in name for name in of_layers)
    assert any(name.startswith("policy") and "layers.0." in name for name in moved)


def test_what_cannot_be_adapted_is_refused(tmp_path):
    policy = copy.deepcopy(build_model("llama"))
    model = ActorCritic(policy, new_critic(policy, "reference", shared=True))
    with pytest.raises(UserError, match="value_peft_config: policy and value model have the same weights"):
        DQOTrainer(model, arguments(tmp_path), [], peft_config=lora())
    with pytest.raises(UserError, match="peft_config: lora_dropout must be 0, got 0.1"):
        DQOTrainer(model, arguments(tmp_path), [], peft_config=lora(lora_dropout=0.1), value_peft_config=lora())

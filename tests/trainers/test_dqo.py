"""The DQO trainer against its objective, by hand, on a small random model; and, slow, what it must reach."""

import copy
import math

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.objectives.dqo import importance_weights, kl_rewards, lambda_returns, policy_loss, value_loss
from posttrain.trainers.dqo import DQOConfig, DQOTrainer, collate, labelled
from tests.small_models import build_model


def examples(count=8):
    generator = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for i in range(count):
        first, length = draw(1, 6), draw(1, 9)
        ids = torch.randint(2, 101, (first + length,), generator=generator).tolist()
        made.append(
            {
                "input_ids": ids,
                "first": first,
                "reward": float(i % 2),
                "process_rewards": None,
                "behaviour_logprobs": None if i % 3 else [-3.0] * length,
                "truncated": False,
                "prompt_id": str(i),
            }
        )
    return made


def actor_critic(family="llama"):
    policy = copy.deepcopy(build_model(family))
    critic = new_critic(policy, "reference")
    torch.manual_seed(1)
    torch.nn.init.normal_(critic.head.weight, std=0.05)
    return ActorCritic(policy, critic)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "value_learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "beta": 0.1,
        "logging_steps": 1,
    }
    return DQOConfig(**{**settings, **changes})


def by_hand(model, batch, args):
    """The losses by a full softmax, each row alone."""
    ids, mask = batch["input_ids"], batch["actions"]
    logprobs = torch.zeros(mask.shape)
    values = torch.zeros(mask.shape)
    for row in range(len(ids)):
        length = int(batch["attention_mask"][row].sum())
        alone = ids[row : row + 1, :length]
        law = torch.log_softmax(model.policy(input_ids=alone).logits[0, :-1], -1)
        logprobs[row, 1:length] = law.gather(-1, alone[0, 1:, None])[:, 0]
        values[row, 1:length] = model.critic(alone)[0, :-1]
    rewards, ref = batch["rewards"], batch["ref_logprobs"]
    paid = kl_rewards(logprobs.detach(), ref, rewards, mask, args.beta)
    returns = lambda_returns(paid, values, mask, args.lam)
    weights = importance_weights(logprobs, batch["logprobs"], mask)
    shared = (weights, args.normalisation)
    return value_loss(values, returns, mask, *shared) + policy_loss(
        logprobs, ref, values, rewards, returns, mask, args.beta, *shared
    )


@pytest.mark.parametrize("normalisation", ["token", "seq"])
@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_the_first_step_is_the_objective_s(tmp_path, normalisation, lam):
    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    args = arguments(tmp_path / "run", normalisation=normalisation, lam=lam)
    trainer = DQOTrainer(model, args, data)
    batch = collate(data)
    model.train()
    loss = trainer.compute_loss(model, batch)
    expected = by_hand(model, batch, args)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Whole trainings, as transformers' Trainer switches it on."""
    ends = []
    for on in (False, True):
        model = actor_critic()
        data = labelled(model, examples(), "reference", tmp_path)
        DQOTrainer(model, arguments(tmp_path / "run", gradient_checkpointing=on), data).train()
        assert model.policy.is_gradient_checkpointing == model.critic.backbone.is_gradient_checkpointing == on
        ends.append(model.state_dict())
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "lam"), [("llama", 1.0), ("qwen2", 0.9), ("gemma3", 0.9)])
def test_packed_rows_learn_what_padded_ones_do(tmp_path, family, lam):
    """Whole trainings, with accumulation; gemma3 has layers that see a window only."""
    ends, read = [], []
    for packing in (False, True):
        model = actor_critic(family)
        data = labelled(model, examples(16), "reference", tmp_path / family)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lam": lam, "packing": packing}
        settings |= {"optim": "sgd", "learning_rate": 0.03}  # Adam makes a large step of a gradient that is rounding
        trainer = DQOTrainer(model, arguments(tmp_path / "run", **settings), data)
        model.policy.get_decoder().layers[0].register_forward_hook(
            lambda _, inputs, __, packing=packing: read.append((packing, *inputs[0].shape[:2]))
        )
        trainer.train()
        ends.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    tokens = {packing: sum(rows * time for one, rows, time in read if one is packing) for packing in (False, True)}
    assert tokens[True] == sum(len(example["input_ids"]) for example in examples(16)) < tokens[False]


@pytest.mark.slow
def test_what_does_not_know_packed_rows_is_refused_before_the_first_step(tmp_path):
    """A model that ignores positions, as recurrent ones do, sees the rows before its own."""
    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    trainer = DQOTrainer(model, arguments(tmp_path / "run", packing=True), data)
    model.policy.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(UserError, match="or leave out packing"):
        trainer.train()


@pytest.mark.parametrize("layers", [0, 2])
def test_only_the_value_model_s_last_layers_learn(tmp_path, layers):
    """And its head; what they learn in the first step is what they learn beside the others."""
    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    trainer = DQOTrainer(model, arguments(tmp_path / "run", value_layers=layers), data)
    trainer.compute_loss(model.train(), collate(data)).backward()
    whole = actor_critic()
    DQOTrainer(whole, arguments(tmp_path / "run"), data).compute_loss(whole.train(), collate(data)).backward()
    expected = dict(whole.named_parameters())
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    below = [f"critic.backbone.layers.{i}." for i in range(3 - layers)] + ["critic.backbone.embed_tokens"]
    assert learning == {name for name in expected if not name.startswith(tuple(below))}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected[name].grad)
    with pytest.raises(UserError, match="value_layers: the value model has 3 layers, fewer than 4"):
        DQOTrainer(actor_critic(), arguments(tmp_path / "run", value_layers=4), data)


@pytest.mark.slow
@pytest.mark.parametrize("normalisation", ["token", "seq"])
def test_accumulation_is_one_batch(tmp_path, normalisation):
    ends = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = actor_critic()
        data = labelled(model, examples(), "reference", tmp_path)
        args = arguments(
            tmp_path / f"run-{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=3,
            normalisation=normalisation,
            optim="sgd",  # Adam's first steps are signs, which rounding can turn
        )
        DQOTrainer(model, args, data).train()
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    for one, many in zip(*ends, strict=True):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_only_the_value_model_learns_while_it_warms_up(tmp_path):
    model = actor_critic()
    before = copy.deepcopy(model)
    data = labelled(model, examples(), "reference", tmp_path)
    args = arguments(tmp_path / "run", critic_warmup_steps=2, max_steps=2, weight_decay=0.0)
    DQOTrainer(model, args, data).train()
    for name, parameter in model.policy.named_parameters():
        assert torch.equal(parameter, dict(before.policy.named_parameters())[name]), name
    assert not torch.equal(model.critic.head.weight, before.critic.head.weight)


@pytest.mark.slow
def test_a_reference_of_another_model_is_refused_before_the_first_step(tmp_path):
    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    data[0]["ref_logprobs"][0] += 0.01
    with pytest.raises(UserError, match="ref_logprobs: a token's differs by 0.01"):
        DQOTrainer(model, arguments(tmp_path / "run"), data).train()


def test_process_rewards_are_added_to_the_outcome(tmp_path):
    made = examples(2)
    made[1]["process_rewards"] = [0.25] * (len(made[1]["input_ids"]) - made[1]["first"])
    plain, scored = labelled(actor_critic(), made, "reference", tmp_path)
    assert not any(plain["rewards"])
    assert scored["rewards"] == [*made[1]["process_rewards"][:-1], 1.25]


def test_reference_log_probabilities_are_kept(tmp_path, monkeypatch):
    model = actor_critic()
    first = labelled(model, examples(), "reference", tmp_path)
    monkeypatch.setattr("posttrain.trainers.dqo.reference_logprobs", None)
    assert labelled(model, examples(), "reference", tmp_path) == first
    with pytest.raises(TypeError):  # another reference is computed anew
        labelled(model, examples(), "another", tmp_path)


@pytest.mark.slow
def test_a_resumed_training_ends_in_the_same_weights(tmp_path):
    ends = []
    for interrupted in (False, True):
        model = actor_critic()
        data = labelled(model, examples(16), "reference", tmp_path)
        settings = {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 3,
            "train_sampling_strategy": "random",
            "lr_scheduler_type": "cosine",
        }
        args = arguments(tmp_path / f"run-{interrupted}", **settings)
        if interrupted:
            stopped = DQOTrainer(actor_critic(), args, data)
            stopped.add_callback(_StopAt(3))
            stopped.train()
        trainer = DQOTrainer(model, args, data)
        trainer.train(resume_from_checkpoint=interrupted or None)
        assert trainer.state.global_step == 8
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(whole, resumed) for whole, resumed in zip(*ends, strict=True))


@pytest.mark.slow
def test_the_saved_policy_is_an_ordinary_folder(tmp_path):
    import transformers

    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    trainer = DQOTrainer(model, arguments(tmp_path / "run", max_steps=1), data)
    trainer.train()
    trainer.save(tmp_path / "policy")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.randint(2, 101, (1, 7))
    torch.testing.assert_close(loaded(ids).logits, model.policy(ids).logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "policy" / "critic" / "model.safetensors").is_file()
    assert not list((tmp_path / "policy").rglob("*.bin"))


@pytest.mark.slow
def test_what_is_logged(tmp_path):
    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    trainer = DQOTrainer(model, arguments(tmp_path / "run", max_steps=2), data)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"log_ratio_right", "log_ratio_wrong", "value_first", "return", "weight", "weight_capped", "ess"} <= set(
        entry
    )
    assert abs(float(entry["log_ratio_right"])) < 1e-3  # at the first step policy and reference are one
    assert 0 < float(entry["ess"]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta: must be positive and finite, got 0.0"),
        ({"beta": math.inf}, "beta: must be positive and finite"),
        ({"lam": 1.5}, "lam: must be between 0 and 1, got 1.5"),
        ({"importance_cap": 0.0}, "importance_cap: must be positive"),
        ({"normalisation": "batch"}, "normalisation: must be token or seq, got 'batch'"),
        ({"value_layers": -1}, "value_layers: must not be negative, got -1"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps: must not be negative"),
    ],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, **changes)


def _StopAt(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


@pytest.mark.slow
def test_the_progress_bar_shows_three_numbers(tmp_path, capsys):
    model = actor_critic()
    data = labelled(model, examples(), "reference", tmp_path)
    settings = arguments(tmp_path / "run", max_steps=2, disable_tqdm=False, logging_steps=1)
    DQOTrainer(model, settings, data).train()
    shown = capsys.readouterr().err
    assert "explained=" in shown and "KL=" in shown and "effective=" in shown and "residual_1" not in shown

"""A rollout service as TRL's rollout function, against a stand-in: who pushes what, and whose completion is whose."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from posttrain.data import arithmetic
from posttrain.data.prompts import messages_for, render
from posttrain.models.load import load_model, model_fingerprint
from posttrain.trainers.service_rollouts import ServiceRollouts
from tests.rollouts.fake_replica import drawn
from tests.rollouts.fakes import Fake


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", "cpu")


@pytest.fixture
def replica():
    one = Fake()
    yield one
    one.kill()


def trainer(policy, model, folder):
    return SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        model_wrapped=model,
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(output_dir=str(folder), gradient_checkpointing_kwargs=None),
        processing_class=policy.tokenizer,
        eos_token_ids=[policy.tokenizer.eos_token_id],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=8,
    )


def test_the_weights_are_pushed_once_a_step_and_completions_are_in_order(policy, replica, tmp_path):
    model = copy.deepcopy(policy.model)
    made = trainer(policy, model, tmp_path / "run")
    prompts = [messages_for(row, "{problem}") for row in arithmetic.rows(6, "train", 0)]
    rollouts = ServiceRollouts([replica.url], slots=3)
    for step in (0, 0, 1):
        made.state.global_step = step
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + step)
        torch.manual_seed(5)
        found = rollouts(prompts, made)
        torch.manual_seed(5)
        seeds = torch.randint(2**62, (6,)).tolist()
        assert found["prompt_ids"] == [render(policy.tokenizer, prompt) for prompt in prompts]
        expected = [drawn(ids, seed, 8) for ids, seed in zip(found["prompt_ids"], seeds, strict=True)]
        assert found["completion_ids"] == [ids for ids, _, _ in expected]
        assert found["logprobs"] == [logprobs for _, logprobs, _ in expected]
        model.save_pretrained(tmp_path / f"step{step}")
        assert replica.state["fingerprint"] == model_fingerprint(tmp_path / f"step{step}")
    assert replica.state["pushes"] == 2
    assert not list((tmp_path / "run").iterdir())
    rollouts.close()


def test_an_adapter_is_pushed_merged_and_stays_what_it_is(policy, replica, tmp_path):
    adapted = get_peft_model(copy.deepcopy(policy.model), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    rollouts = ServiceRollouts([replica.url])
    rollouts.push(trainer(policy, adapted, tmp_path / "run"))
    rollouts.close()
    for name, weight in adapted.state_dict().items():
        assert torch.equal(weight, before[name])
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert replica.state["fingerprint"] == model_fingerprint(tmp_path / "merged")

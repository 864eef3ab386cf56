"""Our engine as TRL's rollout function: the same prompts, ends and laws as TRL's own generation."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from posttrain.data import arithmetic
from posttrain.data.prompts import messages_for, render
from posttrain.models.load import load_model
from posttrain.trainers.engine_rollouts import engine_rollouts


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", "cpu")


def trainer(policy, **changes):
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_completion_length": 60}
    return SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        model_wrapped=policy.model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        processing_class=policy.tokenizer,
        eos_token_ids=[policy.tokenizer.eos_token_id],
        **{**settings, **changes},
    )


def prompts(count):
    return [messages_for(row, "{problem}") for row in arithmetic.rows(count, "train", 0)]


def test_every_prompt_gets_its_completion(policy):
    found = engine_rollouts(slots=3)(prompts(8), trainer(policy))
    assert found["prompt_ids"] == [render(policy.tokenizer, prompt) for prompt in prompts(8)]
    end = policy.tokenizer.eos_token_id
    for ids in found["completion_ids"]:
        assert end not in ids[:-1] and (ids[-1] == end or len(ids) == 60)


def test_greedy_completions_are_those_of_generate(policy):
    (prompt,) = prompts(1)
    found = engine_rollouts()([prompt], trainer(policy, temperature=0.0))
    ids = torch.tensor(found["prompt_ids"])
    expected = policy.model.generate(ids, do_sample=False, max_new_tokens=60, pad_token_id=0)[0, ids.shape[1] :]
    assert found["completion_ids"] == [expected.tolist()]


@pytest.mark.slow
def test_the_same_generator_state_gives_the_same_completions(policy):
    def sampled(seed):
        torch.manual_seed(seed)
        return engine_rollouts()(prompts(4), trainer(policy))["completion_ids"]

    assert sampled(0) == sampled(0) != sampled(1)


def test_samples_of_one_prompt_differ(policy):
    found = engine_rollouts()(prompts(1) * 8, trainer(policy))
    assert len(set(map(tuple, found["completion_ids"]))) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(policy, training):
    policy.model.train(training)
    engine_rollouts()(prompts(1), trainer(policy))
    assert policy.model.training is training

"""What a guided request tells of its steps, against the model and the value model re-read from nothing."""

from dataclasses import replace

import pytest
import torch

from posttrain.decoding.guidance import Candidates, Guidance
from posttrain.decoding.guide import ValueGuide
from posttrain.decoding.guides import Guides
from posttrain.decoding.reward_model import value_scores
from posttrain.rollouts.transformers import TransformersEngine
from tests.decoding.test_guide import ATOMS, requests, value_model
from tests.small_models import build_model


@torch.inference_mode()
def check(policy, value, guidance, request, done):
    """Everything that a completion's steps say."""
    assert len(done.steps) == len(done.ids)
    kl = 0.0
    for number, (token, logprob, step) in enumerate(zip(done.ids, done.logprobs, done.steps, strict=True)):
        prefix = [*request.prompt_ids, *done.ids[:number]]
        scores = policy(input_ids=torch.tensor([prefix])).logits[:, -1] / request.sampling.temperature
        references = scores.log_softmax(-1)[0]
        expected = Candidates.of(scores, guidance)
        ids = expected.ids[0][expected.valid[0]].tolist()
        assert [one.id for one in step.candidates] == ids
        assert step.reference == pytest.approx(references[token].item(), abs=1e-4)
        assert [one.reference for one in step.candidates] == pytest.approx(references[ids].tolist(), abs=1e-4)
        laws = {one.id: one.logprob for one in step.candidates}
        assert laws[token] == pytest.approx(logprob, abs=1e-4)
        assert torch.tensor(list(laws.values())).exp().sum().item() == pytest.approx(1, abs=1e-5)
        kl += sum(torch.tensor(one.logprob).exp().item() * (one.logprob - one.reference) for one in step.candidates)
        if len(ids) > 1:
            values = value_scores(value, [(prefix, [id]) for id in ids], policy)
            # The backbone's large weights magnify rounding: 1e-6 at most steps, once 2e-4.
            assert [one.value for one in step.candidates] == pytest.approx(values.tolist(), abs=1e-3)
        else:
            assert step.candidates[0].value is None
    assert kl == pytest.approx(done.kl, abs=1e-3)


@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", ["v", "q", "shared"])
def test_every_step_is_told_as_it_was(head, atoms):
    policy, value, guidance = build_model("llama"), value_model(head, atoms=atoms), Guidance(candidates=6, delta=0.05)
    engine = TransformersEngine(
        policy, fingerprint="random", slots=3, guide=ValueGuide(value, policy, "a fingerprint", guidance)
    )
    asked = [
        replace(request, explain=number % 3 != 1)
        for number, request in enumerate(requests(8, (0.1, 0.5, None), temperature=0.5))
    ]
    told = 0
    for done in engine.generate(asked):
        request = asked[done.request_id]
        if request.explain and request.beta is not None:
            check(policy, value, guidance, request, done)
            told += 1
        else:
            assert done.steps == ()
    assert told == 3


def test_of_several_guides_the_one_that_guided_tells():
    policy, guidance = build_model("llama"), Guidance(candidates=4, delta=0.0)
    values = {head: value_model(head) for head in ("q", "shared")}
    guides = Guides({head: ValueGuide(value, policy, head, guidance) for head, value in values.items()})
    engine = TransformersEngine(policy, fingerprint="random", slots=4, guide=guides)
    asked = [
        replace(request, guide="shared" if number % 2 else "q", explain=True)
        for number, request in enumerate(requests(5, (0.1, 1.0), temperature=0.8))
    ]
    for done in engine.generate(asked):
        request = asked[done.request_id]
        check(policy, values[request.guide], guidance, request, done)

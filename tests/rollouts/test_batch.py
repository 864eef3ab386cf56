"""The running batch, which requests join and leave; what they may ask to know beside their tokens."""

import pytest
import torch

from posttrain.errors import UserError
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import Batch, TransformersEngine


@pytest.mark.parametrize("dropped", [{0}, {1, 3}, {4}, {0, 1, 2, 3, 4}, {99}, set()])
def test_dropping_requests_changes_nothing_for_the_others(llama, ragged_requests, dropped):
    engine = TransformersEngine(llama, fingerprint="x", slots=8)
    requests = ragged_requests(5)
    expected = {done.request_id: done for done in engine.generate(requests)}
    batch, found = Batch(engine), {}
    batch.add(requests)
    for step in range(60):
        if step == 3:
            batch.drop(dropped)
        found |= {done.request_id: done for done in batch.step()} if batch.rows else {}
    assert batch.room == 8
    assert set(expected) - set(found) <= dropped
    for id, done in found.items():
        assert done.ids == expected[id].ids
        assert done.logprobs == pytest.approx(expected[id].logprobs, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, 5), ({"temperature": 0.5}, 5), ({"top_k": 3}, 3), ({"temperature": 0}, 5)]
)
def test_the_likeliest_tokens_are_those_of_the_law_that_is_sampled(llama, settings, kept):
    engine = TransformersEngine(llama, fingerprint="x")
    asked = Request(0, (5, 6), Sampling(max_tokens=8, **settings), top_logprobs=5)
    other = Request(1, (5, 6), Sampling(max_tokens=8))
    done, plain = sorted(engine.generate([asked, other]), key=lambda done: done.request_id)
    assert plain.top_logprobs == () and len(done.top_logprobs) == len(done.ids)
    with torch.inference_mode():
        logits = llama(torch.tensor([asked.prompt_ids + done.ids])).logits[0, 1:-1] / (settings.get("temperature") or 1)
    if "top_k" in settings:
        logits = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)
    best = logits.log_softmax(-1).topk(kept)
    for top, ids, logprobs in zip(done.top_logprobs, best.indices.tolist(), best.values.tolist(), strict=True):
        assert [id for id, _ in top] == ids
        assert [logprob for _, logprob in top] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("field", [{"candidates": 0}, {"top_logprobs": -1}])
def test_a_request_refuses_what_makes_no_sense(field):
    with pytest.raises(UserError, match=f"^{next(iter(field))}: "):
        Request(0, (1,), Sampling(), **field)

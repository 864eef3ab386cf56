"""What re-ranking goes by: scores of one prompt's completions, from a probe or from a guide's value model."""

import asyncio
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from posttrain.decoding.guide import ValueGuide
from posttrain.decoding.reward_model import value_scores
from posttrain.rollouts.vllm import ValueRequest
from posttrain.serving.catalogue import Catalogue
from posttrain.serving.exchange import Exchange
from posttrain.serving.plan import Rerank
from posttrain.serving.worker import Worker


async def scores(
    catalogue: Catalogue,
    worker: Worker,
    rerank: Rerank,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    ids: Iterator[int],
) -> Tensor:
    """[completions]: a probe's, or the returns that a guide's value model expects. ids: for what the engine is asked besides."""
    if rerank.by == "probe":
        reranker = catalogue.rerankers[rerank.name]
        return await asyncio.wrap_future(worker.call(lambda: reranker.score(prompt, completions)))
    guide = catalogue.guides[rerank.name]
    if isinstance(guide, ValueGuide):
        rows, value, policy = [(prompt, one) for one in completions], guide.value, catalogue.policy.model
        return await asyncio.wrap_future(worker.call(lambda: value_scores(value, rows, policy)))
    exchange = Exchange(worker, [ValueRequest.of(next(ids), prompt, completion) for completion in completions])
    exchange.start(stream=False)
    try:
        return torch.tensor([done.steps[0].candidates[0].value for done in await exchange.completions()])
    finally:
        exchange.close()

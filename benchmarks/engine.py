"""Tokens per second of the transformers engine against `model.generate` in static batches of the same size.

    python benchmarks/engine.py [--model tiny] [--slots 16 64] [--threads 2] [--repeats 5]

The same 64 ragged requests on both sides: prompt and completion lengths of lengths.json (recorded; each ends at its
length, at most 256 tokens, end-of-text ignored), sampled at temperature 1 in float32. `generate` takes them in batches
of `slots`, in order, and runs each batch to its longest; the engine has `slots` slots. Only tokens that were asked for
count. The repeats are interleaved; the ratio is the median over repeats, with its range.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from posttrain.models.load import load_model
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

LENGTHS = Path(__file__).with_name("lengths.json")


def read_requests(vocab: int) -> list[Request]:
    """Random prompts of the recorded lengths: what is computed does not depend on which tokens they are."""
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            i,
            tuple(torch.randint(vocab, (lengths["prompt"],), generator=generator).tolist()),
            Sampling(max_tokens=lengths["completion"], seed=i),
        )
        for i, lengths in enumerate(json.loads(LENGTHS.read_text())["requests"])
    ]


def run_engine(model: Any, requests: Sequence[Request], slots: int) -> None:
    engine = TransformersEngine(model, fingerprint="benchmark", slots=slots, eos_ids=())
    for completion in engine.generate(requests):
        assert len(completion.ids) == requests[completion.request_id].sampling.max_tokens


def run_generate(model: Any, requests: Sequence[Request], size: int) -> None:
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        width = max(len(request.prompt_ids) for request in batch)
        longest = max(request.sampling.max_tokens for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = [[0] * pad + list(request.prompt_ids) for pad, request in zip(padding, batch, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=longest,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
        assert output.shape[1] == width + longest


def seconds(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, args.device, "float32").model
    model.generation_config.eos_token_id = None
    requests = read_requests(model.config.vocab_size)
    tokens = sum(request.sampling.max_tokens for request in requests)
    conditions = f"{args.model}, {model.device.type}, float32, {args.threads} threads"
    table = Table(title=f"{conditions}; {len(requests)} requests, {tokens} tokens; {args.repeats} repeats")
    for column in ("slots", "generate, tokens/s", "engine, tokens/s", "ratio: median", "range"):
        table.add_column(column, justify="right")
    for slots in args.slots:
        run_generate(model, requests[:slots], slots)
        run_engine(model, requests[:slots], slots)
        pairs = [
            (seconds(run_generate, model, requests, slots), seconds(run_engine, model, requests, slots))
            for _ in range(args.repeats)
        ]
        ratios = [static / continuous for static, continuous in pairs]
        static, continuous = (statistics.median(column) for column in zip(*pairs, strict=True))
        table.add_row(
            str(slots),
            f"{tokens / static:.0f}",
            f"{tokens / continuous:.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

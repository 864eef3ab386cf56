"""The embedded model runs in the real vLLM, on CPU."""

import json
import os
import subprocess
import sys

import pytest

from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.models.load import TINY, load_model
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# A process of its own: vLLM leaves threads and a distributed group behind.
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
prompts = json.load(sys.stdin)
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512)
law = SamplingParams(temperature=0, max_tokens=192)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], law, use_tqdm=False)
print("IDS" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_greedy_ids_equal_those_of_the_transformers_engine():
    policy = load_model("tiny", device="cpu", dtype="float32")
    problems = arithmetic.problems(16, "test", seed=5, levels=(1, 2, 3))
    prompts = [render(policy.tokenizer, [{"role": "user", "content": problem.text}]) for problem in problems]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(TINY)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("IDS"))[3:])

    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint=policy.fingerprint)
    greedy = Sampling(temperature=0, max_tokens=192)
    ours = {
        done.request_id: list(done.ids)
        for done in engine.generate(Request(i, tuple(p), greedy) for i, p in enumerate(prompts))
    }
    assert theirs == [ours[i] for i in range(len(prompts))]

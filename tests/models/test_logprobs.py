"""Token log-probabilities by chunks against the whole softmax."""

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.models import logprobs as module
from posttrain.models.logprobs import token_logprobs
from tests.small_models import build_model


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def model(request):
    return build_model(request.param)


def states_of(model, ids):
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_values_and_gradients_are_those_of_the_whole_softmax(model, chunk, frozen, monkeypatch):
    model = copy.deepcopy(model)
    model.get_output_embeddings().requires_grad_(not frozen)
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk * 101)
    ids = torch.randint(2, 101, (2, 9), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(16, generator=torch.Generator().manual_seed(1))
    parameters = [weight for weight in model.parameters() if weight.requires_grad]

    found = token_logprobs(model, states_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradient = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    whole = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1)
    expected = whole.gather(-1, ids[:, 1:, None]).flatten()
    reference = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for ours, theirs in zip(gradient, reference, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_no_tokens(model):
    assert token_logprobs(model, torch.zeros(0, 64), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_bfloat16_weights_are_multiplied_in_float32():
    """The head's own rounding is all that is left: rounding its logits too would cost a hundred times as much."""
    model = build_model("llama")
    states = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(64)
    head = model.get_output_embeddings().weight.data
    exact = torch.log_softmax(states.bfloat16().double() @ head.bfloat16().double().T, -1).gather(1, tokens[:, None])[
        :, 0
    ]
    low = copy.deepcopy(model).to(torch.bfloat16)
    found = token_logprobs(low, states.bfloat16(), tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_final_soft_caps_are_applied():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    ids = torch.randint(2, 50, (1, 8))
    found = token_logprobs(model, states_of(model, ids)[0, :-1], ids[0, 1:])
    expected = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return found


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_no_tensor_of_tokens_times_a_large_vocabulary(frozen, monkeypatch):
    """In forward and backward, of 512 tokens and 150 000 words, none is larger than a chunk, or than the head."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1 << 21)
    vocab, hidden = 150_000, 8
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    model.get_output_embeddings().requires_grad_(not frozen)
    ids = torch.randint(vocab, (4, 129), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        logprobs = token_logprobs(model, states_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        logprobs.sum().backward()
    assert logprobs.shape == (512,)
    assert vocab * hidden <= largest.elements <= 1 << 21 < 512 * vocab

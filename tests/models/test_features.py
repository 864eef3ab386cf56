"""Hidden-state features equal what transformers returns for each row alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import posttrain.models.features
from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec, all_specs, cached_features, hidden_features

EOS = 1
ROWS = [
    ((5, 6, 7), (8, 9, 10, 11)),
    ((5,), (9, 8, 7, 6, 5, 4, 3)),
    ((2, 3, 4, 5, 6), ()),
    ((12, 13), (14,)),
]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, max_position_embeddings=32, eos_token_id=EOS, bos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, n_positions=32, eos_token_id=EOS, bos_token_id=1)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def expected(model, prompt, completion, spec):
    """One row, unpadded, by transformers' own means."""
    states = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[spec.layer][0]
    return states[-1] if spec.pooling == "last" or not completion else states[len(prompt) :].mean(0)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch_tokens", [1, 16, 8192])
def test_every_layer_and_pooling_equals_the_row_alone(make, batch_tokens):
    model = make()
    specs = all_specs(model)
    features = hidden_features(model, ROWS, specs, batch_tokens=batch_tokens)
    assert features.dtype == torch.float16
    assert features.shape == (4, 8, 16)
    for row, (prompt, completion) in enumerate(ROWS):
        for i, spec in enumerate(specs):
            torch.testing.assert_close(
                features[row, i].float(), expected(model, prompt, completion, spec), atol=1e-3, rtol=1e-3
            )


def test_specs_come_in_the_order_asked_for():
    model = llama()
    specs = [FeatureSpec(3, "mean"), FeatureSpec(0, "last"), FeatureSpec(2, "mean")]
    every = all_specs(model)
    both = hidden_features(model, ROWS, every)
    assert torch.equal(hidden_features(model, ROWS, specs), both[:, [every.index(spec) for spec in specs]])


def test_some_layers_only():
    assert all_specs(llama(), layers=[2], poolings=["mean"]) == [FeatureSpec(2, "mean")]


def test_a_final_stop_token_is_not_read():
    model, specs = llama(), [FeatureSpec(3, "last"), FeatureSpec(2, "mean")]
    stopped = hidden_features(model, [((5, 6), (7, 8, EOS)), ((5, 6), (EOS,))], specs)
    assert torch.equal(stopped, hidden_features(model, [((5, 6), (7, 8)), ((5, 6), ())], specs))


def test_stop_tokens_of_the_request():
    model, specs = llama(), [FeatureSpec(3)]
    rows = [((5, 6), (7, 8))]
    assert torch.equal(
        hidden_features(model, rows, specs, stop_ids=[8]), hidden_features(model, [((5, 6), (7,))], specs)
    )
    assert not torch.equal(
        hidden_features(model, [((5, 6), (7, EOS))], specs, stop_ids=[]),
        hidden_features(model, [((5, 6), (7,))], specs),
    )


def test_the_head_never_runs_and_no_hook_stays():
    model = llama()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    hidden_features(model, ROWS, all_specs(model))
    assert all(not block._forward_pre_hooks for block in model.model.layers)


def test_dropout_is_off_and_the_mode_comes_back():
    model = gpt2().train()
    first, second = (hidden_features(model, ROWS, [FeatureSpec(3)]) for _ in range(2))
    assert torch.equal(first, second)
    assert model.transformer.training


def test_adapters_are_in_place():
    peft = pytest.importorskip("peft")
    model = llama()
    plain = hidden_features(model, ROWS, [FeatureSpec(3)])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    features = hidden_features(adapted, ROWS, [FeatureSpec(3)])
    assert not torch.allclose(features, plain)
    torch.testing.assert_close(
        features[0, 0].float(), expected(adapted, *ROWS[0], FeatureSpec(3)), atol=1e-3, rtol=1e-3
    )


def test_values_beyond_float16_are_clamped():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e9)
    features = hidden_features(model, ROWS, [FeatureSpec(0)])
    assert features.abs().max().item() == torch.finfo(torch.float16).max


def test_states_that_are_not_finite_are_an_error():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")
    with pytest.raises(UserError, match="^model: .*finite"):
        hidden_features(model, ROWS, [FeatureSpec(3)])


def test_no_rows():
    assert hidden_features(llama(), [], [FeatureSpec(1)]).shape == (0, 1, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: hidden_features(model, ROWS, [FeatureSpec(4)]), "layer: 4 is out of range.*0 to 3"),
        (lambda model: hidden_features(model, ROWS, []), "specs: "),
        (lambda model: hidden_features(model, [((), ())], [FeatureSpec(1)]), r"rows\[0\]: neither"),
        (lambda model: hidden_features(model, [((), (EOS,))], [FeatureSpec(1)]), r"rows\[0\]: neither"),
        (lambda model: hidden_features(model, [((2,) * 30, (3,) * 3)], [FeatureSpec(1)]), r"rows\[0\]: 33 tokens.*32"),
        (lambda model: FeatureSpec(-1), "layer: "),
        (lambda model: FeatureSpec(1, "meen"), r"pooling: .*did you mean mean\?"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(llama())
    assert "\n" not in str(caught.value)


def test_cache_computes_once(tmp_path, monkeypatch):
    model, specs = llama(), [FeatureSpec(1), FeatureSpec(2, "mean")]
    first = cached_features(tmp_path, "policy-a", model, ROWS, specs)
    monkeypatch.setattr(posttrain.models.features, "hidden_features", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(cached_features(tmp_path, "policy-a", model, ROWS, specs), first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("change", ["policy", "rows", "boundary", "specs", "options"])
def test_cache_knows_what_it_is_for(tmp_path, change):
    model, specs = llama(), [FeatureSpec(1)]
    arguments = {"fingerprint": "a", "model": model, "rows": ROWS, "specs": specs}
    cached_features(tmp_path, **arguments)
    arguments |= {
        "policy": {"fingerprint": "b"},
        "rows": {"rows": ROWS[:-1]},
        "boundary": {"rows": [((5, 6, 7, 8), (9, 10, 11)), *ROWS[1:]]},
        "specs": {"specs": [FeatureSpec(1, "mean")]},
        "options": {"stop_ids": {8}},
    }[change]
    cached_features(tmp_path, **arguments)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_cache_file_is_computed_again(tmp_path):
    model, specs = llama(), [FeatureSpec(1)]
    first = cached_features(tmp_path, "a", model, ROWS, specs)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(cached_features(tmp_path, "a", model, ROWS, specs), first)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^features: cannot write"):
        cached_features(tmp_path / "file" / "cache", "a", llama(), ROWS, [FeatureSpec(1)])

"""The value model: its three heads, and the folder that it comes back from."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from posttrain.errors import UserError
from posttrain.models.load import TINY, load_model
from posttrain.models.value import (
    CandidateHead,
    ValueModelConfig,
    average_heads,
    load_value_model,
    new_value_model,
    value_fingerprint,
    vocabulary_hash,
)

HEADS = ("v", "q", "shared")
ATOMS = [-1.0, 0.0, 0.25, 2.0]
IDS = torch.tensor([[5, 17, 33, 8, 61, 90, 2], [9, 9, 4, 70, 71, 3, 6]])


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu")


def trunk_of(value, policy):
    return policy.model.get_decoder() if value.config.head == "shared" else None


@torch.no_grad()
def logits_of(value, policy, ids=IDS, mask=None):
    return value(ids, attention_mask=mask, trunk=trunk_of(value, policy))


def same(found, expected):
    """Weights bit for bit; outputs but for the order of additions, which depends on where in memory weights lie."""
    weights = expected.state_dict()
    return found.state_dict().keys() == weights.keys() and all(
        torch.equal(weight, weights[name]) for name, weight in found.state_dict().items()
    )


# -- values


@pytest.mark.parametrize("head", HEADS)
def test_one_logit_of_a_bernoulli_return_and_one_for_each_atom(policy, head):
    assert logits_of(new_value_model(policy, head), policy).shape == (2, 7)
    assert logits_of(new_value_model(policy, head, atoms=ATOMS), policy).shape == (2, 7, 4)


@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", HEADS)
def test_a_zero_head_leaves_the_reference_alone(policy, head, atoms):
    logits = logits_of(new_value_model(policy, head, atoms=atoms), policy)
    assert torch.equal(logits, torch.zeros_like(logits))


@pytest.mark.parametrize("head", HEADS)
def test_the_seed_decides_a_random_head(policy, head):
    state = torch.get_rng_state()
    first, again, other = (logits_of(new_value_model(policy, head, zero_init=False, seed=s), policy) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("head", HEADS)
def test_a_value_sees_nothing_that_comes_after_its_token(policy, head):
    value = new_value_model(policy, head, atoms=ATOMS, zero_init=False)
    whole = logits_of(value, policy)
    for end in range(2, 7):
        cut = logits_of(value, policy, IDS[:, :end])
        torch.testing.assert_close(cut[:, -1], whole[:, end - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_value_sees_its_token_and_what_comes_before(policy, head):
    value = new_value_model(policy, head, zero_init=False)
    whole = logits_of(value, policy)
    for place in (0, 3, 4):
        changed = IDS.clone()
        changed[:, place] = 50
        assert (logits_of(value, policy, changed)[:, 4] != whole[:, 4]).all()


@pytest.mark.parametrize("head", HEADS)
def test_padding_on_the_right_has_no_say(policy, head):
    value = new_value_model(policy, head, zero_init=False)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    padded = logits_of(value, policy, IDS.masked_fill(mask == 0, 0), mask)
    torch.testing.assert_close(padded[0, :4], logits_of(value, policy, IDS[:1, :4])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", ["q", "shared"])
def test_a_candidates_value_is_that_of_the_token_once_it_stands_there(policy, head, atoms):
    value = new_value_model(policy, head, atoms=atoms, zero_init=False)
    decoder = trunk_of(value, policy) or value.backbone
    whole = logits_of(value, policy)
    with torch.no_grad():
        states = decoder(input_ids=IDS).last_hidden_state
        projected = value.head.project(decoder.get_input_embeddings().weight)
        for t in range(1, 7):
            every = value.of_candidates(states[:, t - 1], projected.expand(2, -1, -1))
            assert every.shape[:2] == (2, policy.model.config.vocab_size)
            torch.testing.assert_close(every[torch.arange(2), IDS[:, t]], whole[:, t], atol=1e-5, rtol=1e-5)


def test_a_shared_head_trains_no_trunk(policy):
    value = new_value_model(policy, "shared", zero_init=False)
    value(IDS, trunk=policy.model.get_decoder()).sum().backward()
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert all(parameter.grad is not None for parameter in value.parameters())


@pytest.mark.parametrize("atoms", [None, ATOMS])
def test_the_mean_of_shared_heads_is_one_head(tmp_path, policy, atoms):
    """Its logits are the weighted mean of theirs, also once saved."""
    values = [new_value_model(policy, "shared", atoms=atoms, zero_init=False, width=8, seed=seed) for seed in (1, 2, 3)]
    weights = torch.tensor([0.5, 0.3, 0.2])
    average_heads(values, weights).save_pretrained(tmp_path)
    logits = torch.stack([logits_of(value, policy) for value in values], -1)
    averaged = load_value_model(tmp_path, policy)
    torch.testing.assert_close(logits_of(averaged, policy), logits @ weights, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in averaged.head.prefix.parameters()) == 3 * sum(
        p.numel() for p in values[0].head.prefix.parameters()
    )


def test_only_shared_heads_of_the_same_atoms_have_a_mean(policy):
    shared = new_value_model(policy, "shared")
    with pytest.raises(UserError, match="history: only shared heads read the same states"):
        average_heads([shared, new_value_model(policy, "q", layers=1)], torch.tensor([0.5, 0.5]))
    with pytest.raises(UserError, match="history: the value models have different atoms"):
        average_heads([shared, new_value_model(policy, "shared", atoms=ATOMS)], torch.tensor([0.5, 0.5]))


def test_the_log_tilt_is_that_of_the_return_model(policy):
    logits = torch.tensor([[-2.0, 0.0, 3.0]])
    bernoulli = new_value_model(policy)
    expected = torch.log(1 - torch.sigmoid(logits) + torch.sigmoid(logits) * torch.tensor(2.0).exp())
    torch.testing.assert_close(bernoulli.log_tilt(logits, 0.5), expected)
    torch.testing.assert_close(bernoulli.log_tilt(logits, 0.5, "cd"), 2 * torch.sigmoid(logits))
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    categorical, atoms = new_value_model(policy, atoms=ATOMS), torch.tensor(ATOMS)
    law = torch.softmax(logits, -1)
    least = 2 * atoms[0]
    torch.testing.assert_close(categorical.log_tilt(logits, 0.5), (law * (2 * atoms).exp()).sum(-1).log() - least)
    torch.testing.assert_close(categorical.log_tilt(logits, 0.5, "cd"), 2 * (law * atoms).sum(-1) - least)


@pytest.mark.parametrize("law", ["qsharp", "cd"])
def test_a_log_tilt_is_relative_to_the_least_return(policy, law):
    """Where all returns are below 0, a tilt of 0 for what is not valued would lift it above all that is."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    low, high = (new_value_model(policy, atoms=[atom + shift for atom in ATOMS]) for shift in (-8.0, 8.0))
    assert (low.log_tilt(logits, 0.5, law) >= 0).all()
    torch.testing.assert_close(low.log_tilt(logits, 0.5, law), high.log_tilt(logits, 0.5, law))


# -- size and precision


def test_a_candidate_head_of_a_large_vocabulary_has_a_million_parameters():
    """The released code's Q-type head has one row per token and atom: 2.9 billion at these sizes."""
    config = ValueModelConfig(head="q", hidden_size=2048, embedding_size=2048, vocab_size=128_256)
    sizes = [
        sum(parameter.numel() for parameter in CandidateHead(config, outputs).parameters()) for outputs in (1, 11, 101)
    ]
    assert sizes == [(2048 + 2048 + outputs) * 256 + 256 + outputs for outputs in (1, 11, 101)]
    assert 1e6 < sizes[1] < 1.1e6 and sizes[2] < 1.1 * sizes[0]


@pytest.mark.parametrize("head", HEADS)
def test_the_head_stays_in_float32_beside_a_backbone_in_bfloat16(tmp_path, policy, head):
    value = new_value_model(policy, head, atoms=ATOMS, zero_init=False)
    value.save_pretrained(tmp_path)
    half = load_value_model(tmp_path, policy, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    if head != "shared":
        assert {parameter.dtype for parameter in half.backbone.parameters()} == {torch.bfloat16}
    logits = logits_of(half, policy)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 1:], logits_of(value, policy)[:, 1:], atol=0.2, rtol=0.1)


# -- the folder


@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", HEADS)
def test_round_trip(tmp_path, policy, head, atoms):
    value = new_value_model(policy, head, atoms=atoms, zero_init=False, seed=1)
    value.save_pretrained(tmp_path / "a" / "guide")
    again = load_value_model(tmp_path / "a" / "guide", policy)
    assert same(again, value)
    torch.testing.assert_close(logits_of(again, policy), logits_of(value, policy), atol=1e-6, rtol=1e-6)
    assert (again.config.head, again.config.atoms) == (head, atoms)
    assert (again.config.reference, again.config.vocabulary) == (policy.fingerprint, vocabulary_hash(policy.tokenizer))
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_folder_is_an_ordinary_one(tmp_path, policy, head):
    new_value_model(policy, head).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "posttrain_value"
    names = set(load_file(tmp_path / "model.safetensors"))
    assert any(name.startswith("head.") for name in names)
    assert any(name.startswith("backbone.") for name in names) == (head != "shared")


def test_a_backbone_may_be_another_model_of_the_vocabulary(tmp_path, policy):
    half = load_model("tiny", device="cpu").model
    half.model.layers = half.model.layers[:2]
    half.config.num_hidden_layers = 2
    half.config.layer_types = None
    half.save_pretrained(tmp_path / "half")
    policy.tokenizer.save_pretrained(tmp_path / "half")
    value = new_value_model(policy, base=str(tmp_path / "half"), zero_init=False)
    value.save_pretrained(tmp_path / "guide")
    again = load_value_model(tmp_path / "guide", policy)
    assert again.backbone.config.num_hidden_layers == 2
    assert again.config.reference == policy.fingerprint
    assert same(again, value)


@pytest.mark.parametrize("extra", [-1, 27])
def test_a_backbone_whose_embedding_is_padded_otherwise_gets_the_policys_size(tmp_path, policy, extra):
    """Qwen2.5 pads the same 151,665 tokens to 151,936 rows in its small models and to 152,064 in its large ones."""
    tokens = policy.model.config.vocab_size
    other = load_model("tiny", device="cpu").model
    other.resize_token_embeddings(tokens + extra)
    other.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    value = new_value_model(policy, base=str(tmp_path), zero_init=False)
    assert value.config.vocab_size == value.backbone.config.vocab_size == tokens
    assert value.get_input_embeddings().weight.shape[0] == tokens
    known = min(tokens, tokens + extra)
    assert torch.equal(value.get_input_embeddings().weight[:known], policy.model.get_input_embeddings().weight[:known])


def test_the_fingerprint_covers_weights_and_configuration(tmp_path, policy):
    for name, settings in {"a": {}, "b": {}, "c": {"zero_init": False}, "d": {"atoms": [0, 1, 2]}}.items():
        new_value_model(policy, "shared", **settings).save_pretrained(tmp_path / name)
    prints = [value_fingerprint(tmp_path / name) for name in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3


# -- mistakes: a value model that cannot be made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "value"}, "head: must be one of v, q, shared, got 'value'"),
        ({"atoms": []}, "atoms: must be at least two finite increasing numbers"),
        ({"atoms": [1.0]}, "atoms: must be at least two finite increasing numbers"),
        ({"atoms": [0.0, 1.0, 1.0]}, "atoms: must be at least two finite increasing numbers"),
        ({"atoms": [0.0, float("nan")]}, "atoms: must be at least two finite increasing numbers"),
        ({"atoms": [0.0, float("inf")]}, "atoms: must be at least two finite increasing numbers"),
        ({"atoms": ["0", "1"]}, "atoms: must be at least two finite increasing numbers"),
        ({"atoms": 11}, "atoms: must be at least two finite increasing numbers"),
        ({"head": "shared", "base": "tiny"}, "base: a shared head reads the policy's own states"),
        ({"head": "q", "width": 0}, "width: must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(policy, settings, message):
    with pytest.raises(UserError, match=message):
        new_value_model(policy, **settings)


def test_a_base_of_another_vocabulary_is_refused(tmp_path, policy):
    load_model("tiny", device="cpu").model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="base: .* has another vocabulary than the policy tiny"):
        new_value_model(policy, base=str(tmp_path))


# -- mistakes: a folder that cannot guide


@pytest.fixture
def saved(tmp_path, policy):
    new_value_model(policy, "q", atoms=ATOMS, zero_init=False).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, policy, message, **settings):
    with pytest.raises(UserError, match=f"^guide: .*{message}") as error:
        load_value_model(folder, policy, **settings)
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path, policy):
    refused(tmp_path / "nowhere", policy, "has no config.json")


def test_another_kind_of_model(policy):
    refused(TINY, policy, "holds a 'llama', not a value model")


@pytest.mark.slow
def test_a_config_that_is_not_json(saved, policy):
    (saved / "config.json").write_text("{")
    refused(saved, policy, "is damaged")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"head": "w"},
        {"head": "v"},
        {"atoms": None},
        {"atoms": [0.0, 1.0]},
        {"width": 64},
        {"hidden_size": 64},
        {"backbone": None},
        {"backbone": {"model_type": "nothing"}},
        {"width": "wide"},
    ],
)
def test_a_config_that_does_not_fit_its_weights(saved, policy, changes):
    edit(saved, **changes)
    refused(saved, policy, "")


@pytest.mark.parametrize("atoms", [[0.0, 0.5, 0.5, 1.0], [1.0, 0.0, 2.0, 3.0], [0.0], [], "0 1"])
def test_atoms_that_do_not_increase(saved, policy, atoms):
    edit(saved, atoms=atoms)
    refused(saved, policy, "atoms")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(saved, policy, share):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: int(share * len(content))])
    refused(saved, policy, "is damaged")


def test_no_weights(saved, policy):
    (saved / "model.safetensors").unlink()
    refused(saved, policy, "is damaged")


def test_pickled_weights_are_not_read(saved, policy):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    refused(saved, policy, "is damaged")


@pytest.mark.parametrize("name", ["head.out.weight", "backbone.norm.weight"])
def test_lacking_weights(saved, policy, name):
    weights = load_file(saved / "model.safetensors")
    del weights[name]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    refused(saved, policy, f"lacks weights, among them {name}")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["head.prefix.bias", "backbone.layers.2.mlp.up_proj.weight"])
def test_weights_that_are_not_finite(saved, policy, name, poison):
    weights = load_file(saved / "model.safetensors")
    weights[name].view(-1)[3] = poison
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    refused(saved, policy, "has weights that are not finite")


def test_another_vocabulary(saved, policy):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["another"])
    for settings in ({}, {"any_reference": True}):
        refused(saved, replace(policy, tokenizer=tokenizer), "was trained for another vocabulary", **settings)


@pytest.mark.parametrize("head", ["v", "q"])
def test_another_reference_needs_the_override(tmp_path, policy, head):
    value = new_value_model(policy, head, zero_init=False)
    value.save_pretrained(tmp_path)
    other = replace(policy, fingerprint="e" * 64)
    refused(tmp_path, other, f"trained for the policy {policy.fingerprint[:16]}, this one is e{{16}}; --any-reference")
    assert same(load_value_model(tmp_path, other, any_reference=True), value)


def test_a_shared_head_never_reads_another_policy(tmp_path, policy):
    new_value_model(policy, "shared").save_pretrained(tmp_path)
    other = replace(policy, fingerprint="e" * 64)
    for settings in ({}, {"any_reference": True}):
        refused(tmp_path, other, "it reads that policy's hidden states", **settings)

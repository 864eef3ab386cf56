"""Guidance inside the real vLLM (CPU, float32) against the transformers engine and against re-reading everything at every token."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.decoding.guidance import Candidates, Guidance, guide, log_tilts
from posttrain.decoding.guide import load_guide
from posttrain.decoding.vllm import ABOUT, ARCHITECTURE, VALUE, compose, load_vllm_guide
from posttrain.errors import UserError
from posttrain.models.load import TINY, load_model, model_fingerprint
from posttrain.models.value import load_value_model, new_value_model, value_fingerprint
from posttrain.rollouts.engine import Completion, Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

GUIDANCE = {"candidates": 12, "delta": 1e-4}
BETAS = (0.1, None, 0.02, None, 0.5, None, 0.05, None)
DRAWS, HEAT, BETA = 20_000, 0.8, 1.0
REGEX = "[0-9]{1,6}"


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu", dtype="float32")


def opinionated(value, folder):
    """Saved, with values that differ between candidates."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        value.head.out.weight.copy_(2 * torch.randn(value.head.out.weight.shape, generator=generator))
    value.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def q(policy, tmp_path_factory):
    """A Q-type value model of histograms, whose backbone has other depth, head size and key-value heads than the policy."""
    torch.manual_seed(1)
    base = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=320,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    policy.tokenizer.save_pretrained(base)
    value = new_value_model(policy, "q", base=str(base), atoms=[-0.5, 0.0, 0.3, 1.0], zero_init=False)
    return opinionated(value, tmp_path_factory.mktemp("q"))


@pytest.fixture(scope="module")
def shared(policy, tmp_path_factory):
    return opinionated(new_value_model(policy, "shared", zero_init=False), tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def other(policy, tmp_path_factory):
    """Another policy."""
    folder = tmp_path_factory.mktemp("other")
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(policy):
    """32 prompts of 20 to 180 tokens; every other one begins with the same worked examples."""
    problems = arithmetic.problems(40, "test", seed=5, levels=(1, 2, 3))
    rendered = [render(policy.tokenizer, [{"role": "user", "content": problem.text}]) for problem in problems]
    examples = [token for ids in rendered[32:] for token in ids]
    lengths = (0, 100, 0, 100, 17, 130, 60, 100)
    return [[*examples[: lengths[i % 8]], *ids] for i, ids in enumerate(rendered[:32])]


@pytest.fixture(scope="module")
def rows(prompts):
    greedy = [Sampling(temperature=0.0, max_tokens=20 + 37 * i % 110, seed=i) for i in range(len(prompts))]
    counts = (None, None, 5, None)
    return [
        Request(i, tuple(ids), greedy[i], BETAS[i % 8], candidates=counts[i % 4] if BETAS[i % 8] else None)
        for i, ids in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def drawn(policy):
    """One prompt, of a whole block, which vLLM keeps, and one token: of many without sense, that after which most is open."""
    texts = torch.randint(3, 100, (256, 33), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        logprobs = torch.log_softmax(policy.model(texts).logits[:, -1], -1)
    ids = tuple(texts[(logprobs.exp() * logprobs).sum(-1).argmin()].tolist())
    return [Request(i, ids, Sampling(temperature=HEAT, max_tokens=1, seed=i), BETA) for i in range(DRAWS)]


def plain(requests):
    return [
        {
            "id": one.id,
            "prompt_ids": one.prompt_ids,
            "beta": one.beta,
            "candidates": one.candidates,
            "sampling": vars(one.sampling),
        }
        for one in requests
    ]


@pytest.fixture(scope="module")
def theirs(policy, q, shared, other, rows, drawn, tmp_path_factory):
    """What vLLM made of everything below, in a process of its own: vLLM leaves threads and a process group behind."""
    cut = [Request(i, one.prompt_ids, Sampling(HEAT, 0.7, 6, 1, i), BETA) for i, one in enumerate(drawn[:40])]
    unguided = [Request(one.id, one.prompt_ids, one.sampling) for one in rows]
    shuffled = torch.Generator().manual_seed(2)
    tokens = [tuple(torch.randint(3, 100, (200,), generator=shuffled).tolist()) for _ in range(30)]
    long = [Request(i, ids, Sampling(max_tokens=4, seed=i), BETAS[i % 8]) for i, ids in enumerate(tokens)]
    work = {
        "model": str(TINY),
        "other": str(other),
        "q": str(q),
        "shared": str(shared),
        "guidance": GUIDANCE,
        "requests": plain(rows),
        "unguided": plain(unguided),
        "draws": plain(drawn),
        "cut": plain(cut),
        "long": plain(long),
        "allowed": policy.tokenizer.convert_tokens_to_ids(list("0123456789")),
        "regex": REGEX,
        "scratch": str(tmp_path_factory.mktemp("scratch")),
    }
    script = Path(__file__).with_name("run_guided_vllm.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(work), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def completions(found):
    return [Completion(**{**one, "ids": tuple(one["ids"]), "logprobs": tuple(one["logprobs"])}) for one in found]


def ours(policy, folder, requests, any_reference=False):
    value_guide = load_guide(folder, policy, Guidance(**GUIDANCE), any_reference) if folder else None
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint="test", guide=value_guide)
    return sorted(engine.generate(requests), key=lambda done: done.request_id)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.kl == pytest.approx(other.kl, abs=1e-4 * (1 + len(one.ids)))
        assert one.log_ratio == pytest.approx(other.log_ratio, abs=1e-4 * (1 + len(one.ids)))


@torch.inference_mode()
def law(policy, value, prefix, beta, temperature=1.0, count=None):
    """Guided log-probabilities [vocab] of the next token, everything read anew."""
    scores = policy.model(torch.tensor([prefix])).logits[:, -1] / temperature
    guidance = Guidance(**GUIDANCE)
    candidates = Candidates.of(scores, guidance)
    if count:
        candidates = candidates.at_most(torch.tensor([count]))
    if not candidates.contested[0]:
        return guide(scores, candidates, torch.zeros_like(candidates.logprobs), "mask")[0][0]
    children = torch.tensor([[*prefix, token] for token in candidates.ids[0].tolist()])
    logits = value(children, trunk=policy.model.get_decoder())[None, :, -1]
    tilt = log_tilts(value, logits, torch.tensor([[beta]]), candidates.valid, None, guidance)
    return torch.log_softmax(
        scores[0]
        + torch.full_like(scores[0], -torch.inf).scatter(
            0, candidates.ids[0][candidates.valid[0]], tilt[0][candidates.valid[0]].float()
        ),
        -1,
    )


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestInside:
    """One process of vLLM, looked at from many sides."""

    @pytest.mark.parametrize("head", ["q", "shared"])
    def test_equals_the_transformers_engine(self, policy, q, shared, rows, theirs, head):
        """32 ragged requests, half unguided, betas and candidates of their own, in little room."""
        expected = ours(policy, q if head == "q" else shared, rows, any_reference=head == "q")
        assert_equal(completions(theirs[head]), expected)
        assert all((one.kl > 0) == (request.beta is not None) for one, request in zip(expected, rows, strict=True))
        unguided = ours(policy, None, [Request(one.id, one.prompt_ids, one.sampling) for one in rows])
        moved = [one.ids != base.ids for one, base, row in zip(expected, unguided, rows, strict=True) if row.beta]
        assert sum(moved) >= len(moved) / 2

    def test_the_room_was_little(self, theirs):
        seen = theirs["seen"]
        assert seen["preempted"] > 0
        assert seen["parts"] > 0
        assert seen["cached"] >= 96

    def test_equals_rereading_everything(self, policy, q, rows, theirs):
        value = load_value_model(q, policy, any_reference=True)
        for request, one in list(zip(rows, completions(theirs["q"]), strict=True))[:8:2]:
            for t, (token, logprob) in enumerate(zip(one.ids, one.logprobs, strict=True)):
                prefix = [*request.prompt_ids, *one.ids[:t]]
                expected = law(policy, value, prefix, request.beta, count=request.candidates)
                assert int(expected.argmax()) == token
                assert logprob == pytest.approx(float(expected[token]), abs=1e-4)

    def test_without_guidance_it_is_the_base_bit_for_bit(self, theirs):
        assert theirs["unguided"] == theirs["base"]

    def test_draws_follow_the_tilted_law(self, policy, q, drawn, theirs):
        """Chi-square of 20,000 draws against softmax(l / T + log_tilt)."""
        value = load_value_model(q, policy, any_reference=True)
        expected = law(policy, value, drawn[0].prompt_ids, BETA, HEAT).double().exp() * DRAWS
        counts = torch.bincount(torch.tensor(theirs["draws"]), minlength=len(expected)).double()
        assert (counts[expected == 0] == 0).all()
        large = expected >= 5
        cells = torch.stack(
            (
                torch.cat((counts[large], counts[~large].sum()[None])),
                torch.cat((expected[large], expected[~large].sum()[None])),
            )
        )
        cells = cells[:, cells[1] > 0]
        assert cells.shape[1] >= 4
        statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
        chance = torch.special.gammaincc(torch.tensor((cells.shape[1] - 1) / 2).double(), statistic / 2)
        assert chance > 0.001
        untilted = torch.log_softmax(policy.model(torch.tensor([drawn[0].prompt_ids])).logits[0, -1] / HEAT, -1)
        assert (expected / DRAWS - untilted.exp()).abs().max() > 0.05

    def test_cuts_come_after_the_tilt(self, policy, q, drawn, theirs):
        value = load_value_model(q, policy, any_reference=True)
        mass, tokens = law(policy, value, drawn[0].prompt_ids, BETA, HEAT).exp().sort(descending=True)
        mass, tokens = mass[:6] / mass[:6].sum(), tokens[:6]
        kept = mass.masked_fill(mass.cumsum(-1) - mass >= 0.7, 0)
        logprobs = (kept / kept.sum()).log()
        for one in completions(theirs["cut"]):
            (place,) = (tokens == one.ids[0]).nonzero()[0].tolist()
            assert one.logprobs[0] == pytest.approx(float(logprobs[place]), abs=1e-4)

    def test_asking_for_the_prompts_logprobs_disturbs_nothing(self, theirs):
        assert theirs["with the prompt's"]["ids"] == theirs["alone"]["ids"]
        assert theirs["with the prompt's"]["prompt"] == pytest.approx(
            theirs["the prompt's unguided"]["prompt"], abs=1e-5
        )

    def test_what_a_grammar_forbids_stays_forbidden(self, policy, theirs):
        digits = set(policy.tokenizer.convert_tokens_to_ids(list("0123456789")))
        assert set(theirs["allowed"]) <= digits
        assert len(theirs["allowed"]) == 20
        end = policy.tokenizer.eos_token_id
        assert set(theirs["grammar"]) <= digits | {end}
        assert 1 <= len([token for token in theirs["grammar"] if token != end]) <= 6

    def test_bad_arguments_are_refused(self, theirs):
        for line, start in zip(
            theirs["bad"],
            (
                "guidance_beta: must be a number of at least 1e-09, got -1",
                "guidance_beta: must be a number of at least 1e-09, got True",
                "guidance_beta: must be a number of at least 1e-09, got '0.1'",
                "guidance_candidates: it is the guide's; give guidance_beta too",
                "guidance_candidates: must be a whole number of at least 1, got 0",
            ),
            strict=True,
        ):
            assert start in line

    def test_both_interfaces_of_vllm_do_the_same(self, theirs):
        """V2's real classes, and a runner state of our own."""
        found = theirs["two interfaces"]
        assert found["equal"]
        assert found["records"]
        assert found["told"] == [True, True, False, True, False, True, True, True]
        assert found["free rows untouched"]
        assert found["guided rows changed"] == [False, True, False, True, True, True]
        assert found["banned"]
        assert found["candidates"][3] == 3
        assert found["candidates"][5] == 1
        assert "no states of this step" in found["without states"]

    def test_a_push_is_the_policys_alone(self, policy, q, other, rows, theirs):
        pushed = load_model(str(other), device="cpu", dtype="float32")
        assert_equal(completions(theirs["pushed"]), ours(pushed, q, rows[:12], any_reference=True))
        assert theirs["value model left alone"]
        assert_equal(completions(theirs["pushed back"]), completions(theirs["q"]))
        assert "guide: its shared head reads the states of the policy it was trained for" in theirs["shared push"]

    def test_the_manifest_says_how_it_guides(self, policy, q, theirs):
        expected = load_guide(q, policy, Guidance(**GUIDANCE), any_reference=True)
        assert theirs["settings"]["guidance"] == expected.settings
        assert load_vllm_guide(q, policy, Guidance(**GUIDANCE), any_reference=True).name == expected.name

    def test_more_prompt_tokens_than_vllm_reads_at_once(self, theirs):
        """Of which vLLM's CPU runner would draw tokens that it cannot take back."""
        first, again = theirs["long"]
        assert len(first) == 30
        assert [one["ids"] for one in first] == [one["ids"] for one in again]

    def test_an_abandoned_call_leaves_nothing_behind(self, theirs):
        assert theirs["left behind"] == 0

    def test_what_would_not_be_guided_rightly_does_not_start(self, theirs):
        assert "set --max-model-len 320" in theirs["too long"]
        assert "LoRA adapters are not guided in vLLM; merge them into the policy" in theirs["lora"]


def test_the_folder_says_what_it_is_made_of(policy, q, tmp_path):
    compose(TINY, load_vllm_guide(q, policy, any_reference=True), tmp_path / "guided")
    config = json.loads((tmp_path / "guided" / "config.json").read_text())
    about = config[ABOUT]
    assert config["architectures"] == [ARCHITECTURE]
    assert about["policy_architectures"] == ["LlamaForCausalLM"]
    assert (about["policy"], about["value_model"]) == (model_fingerprint(TINY), value_fingerprint(q))
    assert Guidance(**about["guidance"]) == Guidance()
    assert (tmp_path / "guided" / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert (tmp_path / "guided" / VALUE / "config.json").read_bytes() == (q / "config.json").read_bytes()


def test_what_vllm_cannot_guide_is_refused(policy, q, tmp_path):
    new_value_model(policy, "v").save_pretrained(tmp_path / "v")
    with pytest.raises(UserError, match=r"guide: .* V-type head.*value.head q or shared, or use --engine transformers"):
        load_vllm_guide(tmp_path / "v", policy)
    new_value_model(policy, "q", preferences=True).save_pretrained(tmp_path / "ipl")
    with pytest.raises(UserError, match=r"guide: .* learned from preferences.* use --engine transformers"):
        load_vllm_guide(tmp_path / "ipl", policy)
    with pytest.raises(UserError, match=r"guide: .* was trained for the policy"):
        load_vllm_guide(other_reference(policy, tmp_path / "q"), policy)
    with pytest.raises(UserError, match=r"outside: must be mask in vLLM"):
        load_vllm_guide(q, policy, Guidance(outside="zero_tilt"), any_reference=True)
    with pytest.raises(
        UserError, match=r"lazy: a q or shared head, which vLLM runs, values all candidates in one query"
    ):
        load_vllm_guide(q, policy, Guidance(lazy=True), any_reference=True)
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match=r"model: it is quantised.*guide the unquantised policy"):
        compose(quantised, load_vllm_guide(q, policy, any_reference=True), tmp_path / "guided")
    assert not (tmp_path / "guided").exists()


def other_reference(policy, folder):
    value = new_value_model(policy, "q", layers=1)
    value.config.reference = "0" * 64
    value.save_pretrained(folder)
    return folder

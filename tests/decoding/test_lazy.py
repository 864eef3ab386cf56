"""Lazy guided decoding against valuing every candidate, one at a time and re-read from nothing, with the same noise."""

import itertools
from dataclasses import replace

import pytest
import torch

from posttrain.decoding import session
from posttrain.decoding.guidance import Candidates, Guidance, Tilted
from posttrain.decoding.guide import ValueGuide, load_guide
from posttrain.decoding.guided_model import GuidedModel
from posttrain.decoding.guides import Guides
from posttrain.decoding.lazy import LazySession, undecided
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.models.value import new_value_model
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.sampling import Law, gumbel
from posttrain.rollouts.transformers import TransformersEngine
from tests.decoding.test_guide import ATOMS, BETAS, requests, value_model
from tests.rollouts.test_sampling import acceptable
from tests.small_models import build_model


def test_undecided_are_those_that_win_somewhere_within_the_bounds():
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    wide = torch.rand(400, 4, generator=generator, dtype=torch.float64) * torch.tensor([0.0, 0.5, 1.0, 3.0])
    high = low + wide[:, torch.randperm(4, generator=generator)]
    found = undecided(low, high)
    for row in range(400):
        corners = itertools.product(*zip(low[row].tolist(), high[row].tolist(), strict=True))
        winners = {scores.index(max(scores)) for scores in corners}
        assert set(found[row].nonzero().flatten().tolist()) == (winners if len(winners) > 1 else set())
    assert set(found.sum(-1).tolist()) == {0, 2, 3, 4}


def engine_of(policy, value, slots=5, **settings):
    guide = ValueGuide(value, policy, "a fingerprint", Guidance(lazy=True, **settings))
    return TransformersEngine(policy, fingerprint="random", slots=slots, guide=guide)


def tilts(policy, value, guidance, prefix, sampling, beta):
    """Of a step: the candidates, and the log-tilts of all of them [1, k]."""
    scores = Law.of([sampling]).scale(policy(input_ids=torch.tensor([prefix])).logits[:, -1])
    candidates = Candidates.of(scores, guidance)
    logits = [value(torch.tensor([[*prefix, candidate]]))[0, -1] for candidate in candidates.ids[0].tolist()]
    return candidates, value.log_tilt(torch.stack(logits).double(), beta, guidance.law)[None]


@torch.inference_mode()
def eager(policy, value, guidance, request):
    """The ids, all candidates valued, with neither cache nor batch."""
    ids, sampling = [], request.sampling
    while len(ids) < sampling.max_tokens and not (ids and ids[-1] in sampling.stop_ids):
        prefix = [*request.prompt_ids, *ids]
        own = replace(guidance, candidates=request.candidates or guidance.candidates)
        candidates, tilt = tilts(policy, value, own, prefix, sampling, request.beta)
        scores = (candidates.logprobs + tilt).masked_fill(~candidates.valid, -torch.inf)
        if sampling.temperature:
            scores = scores + gumbel(torch.tensor([[sampling.seed]]), torch.tensor([[len(ids)]]), candidates.ids)
        ids.append(int(candidates.ids[0, scores.argmax()]))
    return ids


def check(policy, value, asked, **settings):
    engine = engine_of(policy, value, **settings)
    found = {done.request_id: done for done in engine.generate(asked)}
    plain = TransformersEngine(policy, fingerprint="random", slots=5)
    free = {done.request_id: done for done in plain.generate(request for request in asked if request.beta is None)}
    assert len(found) == len(asked)
    for request in asked:
        done = found[request.id]
        if request.beta is None:
            assert done.ids == free[request.id].ids and done.kl == 0
            assert done.logprobs == pytest.approx(free[request.id].logprobs, abs=1e-4)
            continue
        assert list(done.ids) == eager(policy, value, engine.guide.guidance, request)
        assert done.kl is done.log_ratio is None and done.logprobs == ()


@pytest.mark.slow
@pytest.mark.parametrize("law", ["qsharp", "cd"])
@pytest.mark.parametrize("atoms", [None, ATOMS])
def test_equals_valuing_every_candidate_with_the_same_noise(atoms, law):
    """Ragged requests that join and leave five slots, at every beta and at none."""
    asked = requests(14, BETAS, temperature=0.8)
    check(build_model("llama"), value_model("v", atoms=atoms), asked, candidates=12, delta=0.02, law=law)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "temperature"), [("qwen2", 0.0), ("gemma3", 1.4)])
def test_also_greedily_and_in_other_families(kind, temperature):
    asked = requests(9, (0.05, 0.4, None), temperature=temperature)
    asked = [replace(request, candidates=4) if request.id % 4 == 3 else request for request in asked]
    check(build_model("llama"), value_model("v", kind), asked, candidates=20, delta=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("llama", 2), ("gemma3", session.MOST_WAITING)])
def test_tokens_wait_and_are_read_in_time(kind, most, monkeypatch):
    """What is drawn seldom needs a value, for longer than tokens may wait, and than gemma's sliding window of 8."""
    monkeypatch.setattr(session, "MOST_WAITING", most)
    asked = [  # as long as they may be: no token ends one
        Request(i, tuple(range(3, 6 + i)), Sampling(0.7, max_tokens=40, seed=i, stop_ids=(1000,)), beta)
        for i, beta in enumerate((3.0, None, 1e6, 30.0))
    ]
    value, valued = value_model("v", kind), []
    value.head.register_forward_pre_hook(lambda _, given: valued.append(len(given[0])))
    check(build_model("llama"), value, asked, candidates=8)
    assert 0 in valued, "none was read but beside candidates"


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "atoms"), [(0.3, None), (0.7, ATOMS)])
def test_drawn_tokens_follow_the_guided_law(beta, atoms):
    policy, value, prompt, draws = build_model("llama"), value_model("v", atoms=atoms), (5, 9, 33), 20_000
    engine, sampling = engine_of(policy, value, slots=1000, candidates=12, delta=0.0), Sampling(0.9, max_tokens=1)
    asked = [Request(seed, prompt, replace(sampling, seed=seed), beta) for seed in range(draws)]
    counts = torch.zeros(101, dtype=torch.long)
    for done in engine.generate(asked):
        counts[done.ids[0]] += 1
    with torch.inference_mode():
        candidates, tilt = tilts(policy, value, engine.guide.guidance, list(prompt), sampling, beta)
    law = Tilted.of(candidates, tilt, "mask").logprobs[0].exp()
    assert counts[candidates.ids[0]].sum() == draws and law.max() < 0.9
    assert acceptable(counts[candidates.ids[0]].tolist(), law.tolist())
    # And it is told from what the reference would have drawn.
    assert not acceptable(counts[candidates.ids[0]].tolist(), candidates.logprobs[0].softmax(-1).tolist())


def test_values_a_fraction_of_the_candidates_in_two_forwards_at_most(monkeypatch):
    policy, value = build_model("llama"), value_model("v")
    asked, valued, forwards = requests(14, (1.0, 0.5), temperature=0.8), [0], []
    value.head.register_forward_pre_hook(lambda _, given: valued.append(len(given[0])))
    value.backbone.register_forward_pre_hook(lambda *_: forwards.append(None))
    guide_step, most = LazySession.guide_step, [0]

    def counted(*given):
        before = len(forwards)
        found = guide_step(*given)
        most.append(len(forwards) - before)
        return found

    monkeypatch.setattr(LazySession, "guide_step", counted)
    per_token = {}
    for lazy in (True, False):
        valued.clear()
        guide = ValueGuide(value, policy, "f", Guidance(candidates=20, delta=0.0, lazy=lazy))
        engine = TransformersEngine(policy, fingerprint="random", slots=14, guide=guide)
        tokens = sum(len(done.ids) for done in engine.generate(asked))
        per_token[lazy] = sum(valued) / tokens
    assert per_token[False] == 20 and per_token[True] < 5, per_token
    assert max(most) == 2


def test_beside_another_guide_each_row_stays_what_it_is():
    policy = build_model("llama")
    guides = {
        "lazy": ValueGuide(value_model("v"), policy, "v", Guidance(candidates=6, lazy=True)),
        "q": ValueGuide(value_model("q"), policy, "q", Guidance(candidates=6)),
    }
    asked = [
        replace(request, guide=("lazy", "q")[request.id % 2])
        for request in requests(8, (0.2, 0.2, None), temperature=0.8)
    ]
    together = TransformersEngine(policy, fingerprint="random", slots=4, guide=Guides(guides))
    found = {done.request_id: done for done in together.generate(asked)}
    for request in asked:
        alone = TransformersEngine(policy, fingerprint="random", guide=guides[request.guide])
        [expected] = alone.generate([request])
        assert found[request.id].ids == expected.ids
        assert (found[request.id].kl is None) == (request.beta is not None and request.guide == "lazy")
        assert found[request.id].kl == pytest.approx(expected.kl, abs=1e-4)


def test_a_broken_value_model_is_not_blamed_on_the_policy():
    policy, value = build_model("llama"), value_model("v")
    value.head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^guide: the value model's logits are not numbers \(NaN\)"):
        list(engine_of(policy, value).generate(requests(3, (0.1, None))))


def test_a_guided_model_generates_lazily(tmp_path):
    """Whose settings say so: it gives tokens alone."""
    policy = load_model("tiny", "cpu", "float32")
    new_value_model(policy, "v", layers=1, zero_init=False).save_pretrained(tmp_path / "value")
    guide = load_guide(tmp_path / "value", policy, Guidance(lazy=True))
    prompt = torch.tensor([policy.tokenizer("23+48-17=?").input_ids])
    found = GuidedModel(policy, guide, beta=0.05).generate(prompt, max_new_tokens=12)
    eagerly = GuidedModel(policy, load_guide(tmp_path / "value", policy), beta=0.05).generate(prompt, max_new_tokens=12)
    assert torch.equal(found, eagerly)  # the most likely tokens: no noise
    with pytest.raises(UserError, match="^top_p: needs the whole guided law"):
        GuidedModel(policy, guide).generate(prompt, do_sample=True, top_p=0.9)


# -- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outside": "zero_tilt"}, "outside: must be mask where guidance is lazy"),
        ({"order": "released_code"}, "order: must be exact where guidance is lazy"),
    ],
)
def test_laws_that_need_more_than_the_candidates_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Guidance(lazy=True, **settings)


@pytest.mark.parametrize("head", ["q", "shared"])
def test_other_heads_have_nothing_to_save(head):
    with pytest.raises(UserError, match=f"lazy: a {head} head values all candidates in one query"):
        engine_of(build_model("llama"), value_model(head))


@pytest.mark.parametrize(
    ("name", "sampling", "more"),
    [
        ("top_p", {"top_p": 0.9}, {}),
        ("top_k", {"top_k": 5}, {}),
        ("top_logprobs", {}, {"top_logprobs": 3}),
        ("explain", {}, {"explain": True}),
    ],
)
def test_what_needs_the_whole_law_is_refused(name, sampling, more):
    engine = engine_of(build_model("llama"), value_model("v"))
    request = Request(0, (5, 9), Sampling(max_tokens=4, **sampling), 0.1, **more)
    with pytest.raises(UserError, match=f"^{name}: needs the whole guided law"):
        engine.generate([request])
    assert list(engine.generate([replace(request, beta=None, explain=False)]))


def test_the_law_decides_the_name_and_rows_that_are_not_lazy_keep_theirs():
    policy, value = build_model("llama"), value_model("v")
    guides = [ValueGuide(value, policy, "f", Guidance(lazy=lazy)) for lazy in (False, True)]
    assert "lazy" not in guides[0].settings and guides[1].settings["lazy"] is True
    assert guides[0].name != guides[1].name

"""Guided decoding in the engine against one candidate at a time, re-read from nothing."""

from dataclasses import replace

import pytest
import torch

from posttrain.decoding.guidance import Candidates, Guidance, guide
from posttrain.decoding.guide import ValueGuide
from posttrain.errors import UserError
from posttrain.models.value import ValueModel, ValueModelConfig
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.sampling import Law, noise
from posttrain.rollouts.transformers import TransformersEngine
from tests.small_models import build_model

ATOMS = [-1.0, 0.0, 0.5, 2.0]


def value_model(head, kind="llama", atoms=None, policy="llama"):
    """A random value model with strong opinions; its backbone is not the policy's."""
    decoder = build_model(policy if head == "shared" else kind).get_decoder()
    config = ValueModelConfig(
        backbone=None if head == "shared" else decoder.config,
        head=head,
        atoms=atoms,
        hidden_size=decoder.config.hidden_size,
        embedding_size=decoder.config.hidden_size,
        vocab_size=decoder.config.vocab_size,
        width=32,
    )
    torch.manual_seed(5)
    value = ValueModel(config).eval().requires_grad_(False)
    output = value.head if head == "v" else value.head.out
    output.weight *= 4
    if value.backbone is not None:
        for parameter in value.backbone.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    return value


def requests(count, betas, **settings):
    generator = torch.Generator().manual_seed(11)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for i in range(count):
        prompt = tuple(torch.randint(2, 101, (draw(1, 30),), generator=generator).tolist())
        sampling = Sampling(max_tokens=draw(1, 30), seed=i, stop_ids=(1, 7, 9), **settings)
        made.append(Request(i, prompt, sampling, betas[i % len(betas)]))
    return made


@torch.inference_mode()
def naive(policy, value, guidance, request):
    """ids, log-probabilities, KL, log-ratio and every step's candidates with their log-tilts, with neither cache nor batch."""
    law = Law.of([request.sampling])
    ids, logprobs, steps, kl, log_ratio = [], [], [], 0.0, 0.0
    while len(ids) < request.sampling.max_tokens and not (ids and ids[-1] in request.sampling.stop_ids):
        prefix = [*request.prompt_ids, *ids]
        scores = law.scale(policy(input_ids=torch.tensor([prefix])).logits[:, -1])
        law_scores, step_kl = scores, torch.zeros(1)
        if request.beta is not None:
            candidates = Candidates.of(scores, guidance)
            logits = torch.stack(
                [
                    value(torch.tensor([[*prefix, candidate]]), trunk=policy.get_decoder())[0, -1]
                    for candidate in candidates.ids[0].tolist()
                ]
            )
            logits = logits[..., 0] if value.config.preferences else logits  # V stands beside Q
            tilt = value.log_tilt(logits, request.beta, guidance.law)[None]
            if int(candidates.valid.sum()) == 1:
                tilt = torch.zeros_like(tilt)
            steps.append((candidates.ids[candidates.valid].tolist(), tilt[candidates.valid]))
            law_scores, step_kl = guide(scores, candidates, tilt, guidance.outside)
        uniforms = None if law.all_greedy else noise(torch.tensor([request.sampling.seed]), torch.tensor([len(ids)]))
        token, logprob = law.draw(law_scores, uniforms)
        ids.append(int(token))
        logprobs.append(float(logprob))
        kl += float(step_kl)
        if request.beta is not None:
            log_ratio += float(logprob - torch.log_softmax(scores, -1)[0, token])
    return ids, logprobs, kl, log_ratio, steps


def check(policy, value, guidance, asked, slots=5):
    value_guide = ValueGuide(value, policy, "a fingerprint", guidance)
    engine = TransformersEngine(policy, fingerprint="random", slots=slots, guide=value_guide)
    found = {done.request_id: done for done in engine.generate(replace(request, explain=True) for request in asked)}
    assert len(found) == len(asked)
    for request in asked:
        ids, logprobs, kl, log_ratio, steps = naive(policy, value, guidance, request)
        done = found[request.id]
        assert list(done.ids) == ids
        assert list(done.logprobs) == pytest.approx(logprobs, abs=1e-4)
        assert done.kl == pytest.approx(kl, abs=1e-4 * (1 + len(ids)))
        assert done.log_ratio == pytest.approx(log_ratio, abs=1e-4 * (1 + len(ids)))
        assert done.kl >= 0
        assert len(done.steps) == len(steps)
        for step, (candidates, tilts) in zip(done.steps, steps, strict=True):
            assert [candidate.id for candidate in step.candidates] == candidates
            ratios = torch.tensor([candidate.logprob - candidate.reference for candidate in step.candidates])
            torch.testing.assert_close(ratios - ratios[0], (tilts - tilts[0]).to(ratios), atol=1e-4, rtol=1e-5)


BETAS = (0.1, None, 1.0, float("inf"), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["q", "shared"])
def test_values_of_preferences_tilt_by_q_over_beta(head):
    policy, value = build_model("llama"), value_model(head)
    value.config.preferences = True
    logits, beta = torch.tensor([[-3.0, 0.0, 40.0]]), torch.tensor([[0.5]])
    assert value.log_tilt(logits, beta).tolist() == value.log_tilt(logits, beta, "cd").tolist() == [[-6.0, 0.0, 80.0]]
    assert value.expected(logits) is logits
    check(policy, value, Guidance(candidates=6), requests(8, (1.0, None, 2.0, float("inf"))))  # Q has no bounds
    with pytest.raises(UserError, match="outside: must be mask with values of preferences"):
        ValueGuide(value, policy, "a fingerprint", Guidance(outside="zero_tilt"))


@pytest.mark.slow
@pytest.mark.parametrize("atoms", [None, ATOMS])
@pytest.mark.parametrize("head", ["v", "q", "shared"])
@pytest.mark.parametrize("outside", ["mask", "zero_tilt"])
def test_equals_naive_guidance(head, atoms, outside):
    guidance = Guidance(candidates=6, delta=0.05, outside=outside)
    check(build_model("llama"), value_model(head, atoms=atoms), guidance, requests(14, BETAS, temperature=0.8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
@pytest.mark.parametrize("head", ["v", "q"])
def test_equals_naive_guidance_in_other_families(kind, head):
    """Grouped key-value heads, layers with a sliding window shorter than the prompts."""
    guidance = Guidance(candidates=5, delta=0.0)
    check(build_model("llama"), value_model(head, kind), guidance, requests(9, BETAS))


@pytest.mark.slow
def test_tokens_wait_and_are_read_in_time():
    """A peaked policy whose top token often needs no scoring, for longer than tokens may wait."""
    guidance = Guidance(candidates=8, delta=0.3, outside="zero_tilt")
    for head in ("v", "q"):
        check(build_model("llama"), value_model(head), guidance, requests(10, (0.2,), temperature=0.3))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_p": 0.7}, {"top_k": 2, "temperature": 1.3}])
def test_filters_come_after_the_tilt(settings):
    check(build_model("llama"), value_model("v"), Guidance(candidates=7), requests(8, BETAS, **settings))


def test_controlled_decoding_uses_the_mean():
    check(
        build_model("llama"), value_model("v", atoms=ATOMS), Guidance(candidates=7, law="cd"), requests(8, (0.2, None))
    )


@pytest.mark.slow
def test_neighbours_have_no_say():
    policy, value = build_model("llama"), value_model("v")
    asked = requests(12, BETAS)
    value_guide = ValueGuide(value, policy, "f", Guidance(candidates=6))
    runs = [
        {
            d.request_id: d.ids
            for d in TransformersEngine(policy, fingerprint="r", slots=n, guide=value_guide).generate(asked)
        }
        for n in (1, 3, 12)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_guidance_off_is_the_base_token_for_token():
    policy = build_model("llama")
    asked = requests(12, (None,))
    plain = {d.request_id: d for d in TransformersEngine(policy, fingerprint="r", slots=4).generate(asked)}
    value_guide = ValueGuide(value_model("v"), policy, "f", Guidance(candidates=6))
    beside = {
        d.request_id: d for d in TransformersEngine(policy, fingerprint="r", slots=4, guide=value_guide).generate(asked)
    }
    assert plain == beside
    assert all(done.kl == 0 and done.log_ratio == 0 for done in beside.values())


def test_infinite_beta_is_the_base_under_zero_tilt():
    policy = build_model("llama")
    asked = requests(12, (float("inf"),))
    base = {
        d.request_id: d for d in TransformersEngine(policy, fingerprint="r", slots=4).generate(requests(12, (None,)))
    }
    value_guide = ValueGuide(value_model("v"), policy, "f", Guidance(candidates=6, outside="zero_tilt"))
    for done in TransformersEngine(policy, fingerprint="r", slots=4, guide=value_guide).generate(asked):
        assert done.ids == base[done.request_id].ids
        assert done.kl == pytest.approx(0, abs=1e-5)


def test_infinite_beta_under_mask_is_the_base_renormalised_on_its_candidates():
    policy = build_model("llama")
    value_guide = ValueGuide(value_model("v"), policy, "f", Guidance(candidates=4, delta=0.0))
    engine = TransformersEngine(policy, fingerprint="r", slots=4, guide=value_guide)
    cut = TransformersEngine(policy, fingerprint="r", slots=4)
    expected = {d.request_id: d for d in cut.generate(requests(12, (None,), top_k=4))}
    for done in engine.generate(requests(12, (float("inf"),))):
        assert done.ids == expected[done.request_id].ids
        assert done.logprobs == pytest.approx(expected[done.request_id].logprobs, abs=1e-4)


@pytest.mark.parametrize("atoms", [None, [0.0, 0.5, 1.0]])
def test_a_small_beta_is_the_reference_given_success(atoms):
    """beta -> 0: pi_ref times the probability of the best return; tilts near 1 / beta must keep their last digits."""
    policy, value = build_model("llama"), value_model("v", atoms=atoms)
    session = ValueGuide(value, policy, "f", Guidance(candidates=101, delta=0.0)).session(1, 64)
    prompt = (5, 9, 33)
    with torch.inference_mode():
        scores = policy(input_ids=torch.tensor([prompt])).logits[:, -1]
        session.add([Request(0, tuple(prompt), Sampling(), beta=1e-9)], torch.tensor([prompt[:-1]]), None)
        guided = session.guide_step(scores, None, None).scores  # of all tokens, in the order of their ids
        logits = value(torch.tensor([[*prompt, token] for token in range(101)]))[:, -1]
    log_p = torch.nn.functional.logsigmoid(logits) if atoms is None else torch.log_softmax(logits, -1)[:, -1]
    torch.testing.assert_close(guided.softmax(-1)[0], (scores[0] + log_p).softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("law", ["qsharp", "cd"])
def test_returns_below_zero_do_not_lift_what_is_not_valued(law):
    """Rewards of -1 and 0 are those of 0 and 1 to another zero: the same law under `zero_tilt`."""
    policy, value = build_model("llama"), value_model("v", atoms=[0.0, 1.0])
    guidance = Guidance(candidates=4, delta=0.0, outside="zero_tilt", law=law)
    runs = []
    for atoms in ([0.0, 1.0], [-1.0, 0.0]):
        value.config.atoms = atoms
        engine = TransformersEngine(policy, fingerprint="r", guide=ValueGuide(value, policy, "f", guidance))
        runs.append({done.request_id: done for done in engine.generate(requests(6, (0.2,)))})
    for number, done in runs[0].items():
        assert runs[1][number].ids == done.ids
        assert runs[1][number].kl == pytest.approx(done.kl, abs=1e-5)


@pytest.mark.parametrize("law", ["qsharp", "cd"])
@pytest.mark.parametrize("atoms", [None, ATOMS])
def test_the_released_order_puts_the_temperature_on_the_tilts_too(atoms, law):
    """softmax((l + tilt) / T); tilts of histograms relative to the worst candidate, of others to a return of 0."""
    policy, value = build_model("llama"), value_model("v", atoms=atoms)
    guidance = Guidance(candidates=6, delta=0.0, outside="zero_tilt", law=law, order="released_code")
    session = ValueGuide(value, policy, "f", guidance).session(1, 64)
    prompt, temperature, beta = (5, 9, 33), torch.tensor([[0.7]]), 0.5
    with torch.inference_mode():
        logits = policy(input_ids=torch.tensor([prompt])).logits[:, -1]
        session.add([Request(0, prompt, Sampling(), beta)], torch.tensor([prompt[:-1]]), None)
        guided = session.guide_step(logits / temperature, temperature, None)
        top = logits[0].topk(6).indices
        found = value(torch.tensor([[*prompt, token] for token in top.tolist()]))[:, -1]
    law_of_return = torch.sigmoid(found) if atoms is None else torch.softmax(found, -1)
    returns = torch.tensor(atoms or [0.0, 1.0])
    if atoms is None:
        law_of_return = torch.stack((1 - law_of_return, law_of_return), -1)
    if law == "qsharp":
        tilt = (law_of_return * (returns / beta).exp()).sum(-1).log()
        tilt = tilt if atoms is None else tilt - tilt.min()
    else:
        tilt = (law_of_return @ returns - returns[0]) / beta
    expected = logits[0].index_add(0, top, tilt) / temperature[0]
    torch.testing.assert_close(guided.scores.softmax(-1)[0], expected.softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["v", "shared"])
def test_a_broken_value_model_is_not_blamed_on_the_policy(head):
    policy, value = build_model("llama"), value_model(head)
    engine = TransformersEngine(policy, fingerprint="r", guide=ValueGuide(value, policy, "f"))
    (value.head if head == "v" else value.head.out).bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"^guide: the value model's logits are not numbers \(NaN\)"):
        list(engine.generate(requests(3, (0.1,))))


def test_an_abandoned_run_leaves_no_hook():
    policy, value = build_model("llama"), value_model("shared")
    engine = TransformersEngine(policy, fingerprint="r", guide=ValueGuide(value, policy, "f"))
    next(engine.generate(requests(12, (0.1,))))
    assert not policy.get_output_embeddings()._forward_pre_hooks


# -- mistakes


def test_beta_needs_a_guide():
    engine = TransformersEngine(build_model("llama"), fingerprint="r")
    with pytest.raises(UserError, match="beta: this engine has no guide"):
        engine.generate([Request(0, (5,), Sampling(max_tokens=4), beta=0.1)])


@pytest.mark.parametrize("beta", [0.0, -1.0, 1e-50, float("nan")])
def test_beta_has_a_least_value(beta):
    with pytest.raises(UserError, match="beta: must be at least 1e-09"):
        Request(0, (5,), Sampling(), beta=beta)


def test_other_sizes_are_refused():
    value = value_model("shared")
    value.config.vocab_size = 7
    with pytest.raises(UserError, match="guide: it knows 7 tokens, the policy 101"):
        ValueGuide(value, build_model("llama"), "f")
    value = value_model("shared")
    value.config.hidden_size = 7
    with pytest.raises(UserError, match="guide: its shared head reads states of size 7"):
        ValueGuide(value, build_model("llama"), "f")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates: must be at least 1, got 0"),
        ({"delta": 1.0}, "delta: must be at least 0 and below 1, got 1.0"),
        ({"outside": "drop"}, "outside: must be one of mask, zero_tilt, got 'drop'"),
        ({"law": "q"}, "law: must be one of qsharp, cd, got 'q'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        Guidance(**settings)


@pytest.mark.parametrize("head", ["v", "q"])
def test_a_request_may_have_fewer_of_its_tokens_valued(head):
    """Beside others that have them all, as under a guide that values no more."""
    policy, value = build_model("llama"), value_model(head)

    def run(most, candidates):
        guidance = Guidance(candidates=most, delta=0.0)
        guide = ValueGuide(value, policy, "f", guidance)
        asked = [
            Request(i, (5, 9 + i), Sampling(max_tokens=12, seed=i), 0.3, candidates=few)
            for i, few in enumerate(candidates)
        ]
        engine = TransformersEngine(policy, fingerprint="random", guide=guide)
        return {done.request_id: done for done in engine.generate(asked)}

    mixed, few, all_of_them = run(20, (4, None, 4, None)), run(4, (None,) * 4), run(20, (None,) * 4)
    for number, done in mixed.items():
        expected = all_of_them[number] if number % 2 else few[number]
        assert done.ids == expected.ids and done.kl == pytest.approx(expected.kl, abs=1e-4)
    assert any(few[number].ids != all_of_them[number].ids for number in few)

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.sampling import Law, _mix, gumbel, inverse_cdf, noise, truncate

LAST_UNIFORM = 1 - 2.0**-53


def exact_law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The law by the book, in plain Python: probabilities by token."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    if top_k:
        kth = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        weights = [w if w >= kth else 0.0 for w in weights]
    weights = [w / sum(weights) for w in weights]
    if top_p < 1:
        mass, last = 0.0, 0.0
        for w in sorted(weights, reverse=True):
            if mass >= top_p:
                break
            mass, last = mass + w, w
        weights = [w if w >= last else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def chi_square(counts, probs):
    draws = sum(counts)
    cells = [(c, p * draws) for c, p in zip(counts, probs, strict=True) if p > 0]
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def acceptable(counts, probs):
    """Within five standard deviations of the statistic's law; the seeds are fixed, so this does not flake."""
    statistic, freedom = chi_square(counts, probs)
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_mix_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([((1234567 + golden * (i + 1) + 2**63) % 2**64) - 2**63 for i in range(3)])
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [value % 2**64 for value in _mix(states).tolist()] == published


@pytest.mark.parametrize("over", ["index", "seed"])
def test_noise_is_uniform_over_tokens_and_over_neighbouring_seeds(over):
    many, one = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    uniforms = noise(one + 3, many) if over == "index" else noise(many, one)
    assert float(uniforms.min()) >= 0 and float(uniforms.max()) < 1
    assert acceptable(torch.histc(uniforms.float(), 50, 0, 1).tolist(), [1 / 50] * 50)
    lagged = torch.corrcoef(torch.stack((uniforms[:-1], uniforms[1:])))[0, 1]
    assert abs(float(lagged)) < 0.03


def test_noise_of_a_row_does_not_depend_on_the_other_rows():
    seeds, index = torch.tensor([5, 2**62, 0]), torch.tensor([0, 7, 7])
    assert torch.equal(noise(seeds, index)[1:2], noise(seeds[1:2], index[1:2]))


@pytest.mark.parametrize("over", ["seed", "index", "id"])
def test_every_token_that_could_stand_somewhere_has_noise_of_its_own(over):
    counters = {name: torch.zeros(20_000, dtype=torch.int64) + 3 for name in ("seed", "index", "id")}
    counters[over] = torch.arange(20_000)
    uniforms = noise(*counters.values())
    assert acceptable(torch.histc(uniforms.float(), 50, 0, 1).tolist(), [1 / 50] * 50)
    others = (noise(counters["seed"], counters["index"]), uniforms.roll(1))
    for other in others if over != "id" else others[1:]:
        assert abs(float(torch.corrcoef(torch.stack((uniforms, other)))[0, 1])) < 0.03


def test_the_largest_sum_with_gumbel_noise_is_a_draw():
    logits = torch.tensor([1.0, -1.0, 0.5, -0.2, -math.inf, 2.0], dtype=torch.float64)
    noises = gumbel(torch.arange(40_000)[:, None], torch.tensor([[7]]), torch.arange(6)[None])
    assert noises.shape == (40_000, 6) and noises.isfinite().all()
    counts = (logits + noises).argmax(-1).bincount(minlength=6).tolist()
    assert counts[4] == 0 and acceptable(counts, logits.softmax(-1).tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(temperature=1.5, top_k=5, top_p=0.9),
    ],
)
def test_drawn_tokens_follow_the_exact_law(sampling):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, -math.inf, 0.0, 1.0, -3.0])
    draws = 40_000
    law = Law.of([sampling] * draws)
    ids, logprobs = law.draw(
        law.scale(logits.expand(draws, -1)), noise(torch.arange(draws), torch.zeros(draws, dtype=torch.int64))
    )
    probs = exact_law(logits.tolist(), sampling.temperature, sampling.top_k, sampling.top_p)
    counts = torch.bincount(ids, minlength=8).tolist()
    assert all(count == 0 for count, p in zip(counts, probs, strict=True) if p == 0)
    assert acceptable(counts, probs)
    torch.testing.assert_close(logprobs, torch.tensor(probs).log()[ids], atol=1e-5, rtol=0)


@given(
    logits=st.lists(st.sampled_from([-math.inf, -4.0, -1.0, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=12).filter(
        lambda x: max(x) > -math.inf
    ),
    top_k=st.integers(0, 14),
    # no partial sum of these few logits comes near these masses, so that rounding never decides
    top_p=st.sampled_from([1e-9, 0.1237, 0.5123, 0.9071, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
)
def test_log_probs_are_those_of_the_truncated_law(logits, top_k, top_p, temperature):
    law = Law.of([Sampling(temperature=temperature, top_k=top_k, top_p=top_p)])
    scores = law.scale(torch.tensor([logits]))
    probs = exact_law(logits, temperature, top_k, top_p)
    for uniform in (0.0, 0.31, 0.77, LAST_UNIFORM):
        ids, logprobs = law.draw(scores, torch.tensor([uniform], dtype=torch.float64))
        assert float(logprobs) == pytest.approx(math.log(probs[int(ids)]), abs=1e-5)


def test_a_uniform_near_one_draws_the_last_token_that_has_weight():
    probs = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert inverse_cdf(probs, torch.tensor([LAST_UNIFORM] * 2, dtype=torch.float64)).tolist() == [2, 3]


@pytest.mark.parametrize("width", [5, 13, 29, 61])
def test_of_nans_some_token_is_drawn(width):
    found = inverse_cdf(torch.full((1, width), torch.nan), torch.tensor([0.3], dtype=torch.float64))
    assert 0 <= found.item() < width  # that it is none is for the engine to say


def test_a_uniform_of_zero_draws_the_first_token_that_has_weight():
    probs = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.2, 0.0, 0.8, 0.0]])
    assert inverse_cdf(probs, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 0]


def test_a_uniform_on_a_boundary_belongs_to_the_token_above_it():
    probs = torch.tensor([[0.25, 0.25, 0.5]])
    uniforms = torch.tensor([0.25, 0.5 - 2.0**-50, 0.5], dtype=torch.float64)
    assert inverse_cdf(probs.expand(3, -1), uniforms).tolist() == [1, 1, 2]


def test_tokens_tied_with_the_kth_stay_together():
    scores = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    kept = truncate(scores, torch.tensor([2]), torch.tensor([1.0]))
    assert kept.tolist() == [[1.0, 2.0, 1.0, -math.inf, 1.0]]


@pytest.mark.parametrize("top_p", [1e-12, 0.3])
def test_top_p_always_keeps_the_top_token(top_p):
    scores = torch.tensor([[0.5, 3.0, 0.1]])
    assert truncate(scores, torch.tensor([0]), torch.tensor([top_p])).isfinite().tolist() == [[False, True, False]]


def test_top_p_keeps_the_token_that_reaches_the_mass_and_no_more():
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    kept = truncate(scores.expand(2, -1), torch.tensor([0, 0]), torch.tensor([0.7, 0.76]))
    assert kept.isfinite().tolist() == [[True, True, False, False], [True, True, True, True]]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.99999), (40, 0.9), (2000, 1.0), (2000, 0.9)])
def test_a_large_vocabulary_is_truncated_as_if_sorted_whole(top_k, top_p):
    scores = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)) * 2
    kept = truncate(scores, torch.full((3,), top_k), torch.full((3,), top_p)).softmax(dim=-1)
    expected = torch.tensor([exact_law(row, 1.0, top_k, top_p) for row in scores.tolist()])
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-3)


def test_rows_with_different_settings_draw_as_each_would_alone():
    samplings = [
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_k=2),
        Sampling(temperature=0.5, top_p=0.6),
        Sampling(temperature=3),
    ]
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    uniforms = noise(torch.arange(5), torch.arange(5))
    law = Law.of(samplings)
    ids, logprobs = law.draw(law.scale(logits), uniforms)
    for row, sampling in enumerate(samplings):
        alone = Law.of([sampling])
        own_ids, own_logprobs = alone.draw(alone.scale(logits[row : row + 1]), uniforms[row : row + 1])
        assert ids[row] == own_ids[0]
        torch.testing.assert_close(logprobs[row], own_logprobs[0], atol=1e-6, rtol=0)


def test_a_greedy_row_takes_the_argmax_and_reports_the_models_own_log_prob():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    law = Law.of([Sampling(temperature=0, top_k=1)])
    ids, logprobs = law.draw(law.scale(logits), None)
    assert ids.tolist() == [1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])


def test_rows_without_temperature_or_filters_cost_nothing():
    law = Law.of([Sampling(), Sampling(seed=3)])
    logits = torch.randn(2, 9)
    assert law.scale(logits) is logits
    assert law.filtered is None and law.greedy is None


def test_bfloat16_logits_give_float32_log_probs():
    law = Law.of([Sampling(temperature=0.9)])
    scores = law.scale(torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert scores.dtype == torch.float32
    assert float(scores.log_softmax(-1).exp().sum()) == pytest.approx(1, abs=1e-5)

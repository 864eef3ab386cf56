"""From value logits to guided logits: the paper's numbers, and what the released code does instead."""

import pytest
import torch

from posttrain.decoding.guidance import Candidates, Guidance, guide
from posttrain.objectives.qsharp import bernoulli_log_tilt, categorical_log_tilt
from posttrain.rollouts.sampling import truncate

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
VALUES = torch.logit(torch.tensor([[0.1, 0.6, 0.9, 0.5]], dtype=torch.float64))
ATOMS = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
PMF = torch.tensor(
    [[[0.4, 0.3, 0.2, 0.1, 0], [0.1, 0.1, 0.1, 0.1, 0.6], [0.2] * 5, [0, 0, 1, 0, 0]]], dtype=torch.float64
)


def law_of(scores, log_tilt, outside, k=4, delta=0.0):
    candidates = Candidates.of(scores, Guidance(candidates=k, delta=delta))
    guided, kl = guide(scores, candidates, log_tilt.gather(1, candidates.ids), outside)
    return torch.softmax(guided, -1)[0], kl.item()


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("outside", ["mask", "zero_tilt"])
def test_a_all_tokens(outside):
    law, kl = law_of(LOGITS, bernoulli_log_tilt(VALUES, 1.0), outside)
    close(law, (0.49734531, 0.31710488, 0.14626516, 0.03928466))
    assert kl == pytest.approx(0.04776373, abs=1e-6)
    law, kl = law_of(LOGITS, bernoulli_log_tilt(VALUES, 0.1), outside)
    close(law, (0.21400385, 0.47218707, 0.26055530, 0.05325378))
    assert kl == pytest.approx(0.40237818, abs=1e-6)


def test_a4_two_candidates():
    tilt = bernoulli_log_tilt(VALUES, 0.1)
    close(law_of(LOGITS, tilt, "zero_tilt", k=2)[0], (0.31186400, 0.68810980, 0.00001915, 0.00000705))
    close(law_of(LOGITS, tilt, "mask", k=2)[0], (0.31187217, 0.68812783, 0, 0))


def test_a5_the_released_tail_boost_is_not_ours():
    """Candidates get at most 0 and the rest exactly 0 there; the same tilts with their shift are ours."""
    q = torch.tensor([[0.22180175, 0.65413411, 0.91353353, 0.56766764]], dtype=torch.float64)
    close(law_of(LOGITS, q.log(), "zero_tilt", k=2)[0], (0.34251574, 0.37161043, 0.20899052, 0.07688332))
    ours = law_of(LOGITS, bernoulli_log_tilt(VALUES, 0.5), "zero_tilt", k=2)[0]
    assert ours[2:].sum() < torch.softmax(LOGITS, -1)[0, 2:].sum()


def test_a6_temperature():
    for beta, released, exact in (
        (0.1, (0.19440716, 0.52279074, 0.24863380, 0.03416830), (0.27976788, 0.48074717, 0.20659934, 0.03288561)),
        (1.0, (0.54698804, 0.31164413, 0.11846264, 0.02290519), (0.58402797, 0.29000462, 0.10417638, 0.02179103)),
    ):
        tilt = bernoulli_log_tilt(VALUES, beta)
        close(law_of(LOGITS / 0.8, tilt / 0.8, "mask")[0], released)
        close(law_of(LOGITS / 0.8, tilt, "mask")[0], exact)


def test_a7_top_p_after_the_tilt():
    tilt = bernoulli_log_tilt(VALUES, 0.1) / 0.8
    candidates = Candidates.of(LOGITS / 0.8, Guidance(delta=0.0))
    guided, _ = guide(LOGITS / 0.8, candidates, tilt.gather(1, candidates.ids), "mask")
    kept = truncate(guided.float(), torch.tensor([0]), torch.tensor([0.9], dtype=torch.float64))
    close(torch.softmax(kept.double(), -1)[0], (0.20128469, 0.54128540, 0.25742987, 0))


def test_a8_kl_does_not_count_top_p():
    """Unguided with top-p 0.9 the released code reports 0.0326 of KL; ours is that of the guidance alone: 0."""
    kept = truncate(LOGITS.float(), torch.tensor([0]), torch.tensor([0.9], dtype=torch.float64)).double()
    law = torch.log_softmax(kept, -1)[0]
    close(law.exp(), (0.66524094, 0.24472848, 0.09003057, 0))
    theirs = (law.exp() * (law - torch.log_softmax(LOGITS, -1)[0])).nansum()
    assert theirs.item() == pytest.approx(0.03258376, abs=1e-6)
    assert law_of(LOGITS, torch.zeros_like(LOGITS), "mask")[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (1 / 3, (0.33983147, 0.59725813, 0.04599119, 0.01691921)),
        (0.1, (0.04134891, 0.95099648, 0.00559597, 0.00205864)),
    ],
)
def test_b_released_histogram_shift(beta, expected):
    tilt = categorical_log_tilt(PMF.log(), ATOMS, beta)
    close(law_of(LOGITS, tilt - tilt[0, :2].min(), "zero_tilt", k=2)[0], expected)


@pytest.mark.parametrize("outside", ["mask", "zero_tilt"])
def test_kl_is_that_of_the_whole_vocabulary(outside):
    torch.manual_seed(0)
    scores = torch.randn(64, 50) * 3
    candidates = Candidates.of(scores, Guidance(candidates=8, delta=0.02))
    tilt = torch.rand(64, 8) * 10
    guided, kl = guide(scores, candidates, tilt, outside)
    law, ref = torch.log_softmax(guided.double(), -1), torch.log_softmax(scores.double(), -1)
    brute = torch.where(law > -torch.inf, law.exp() * (law - ref), 0.0).sum(-1)
    torch.testing.assert_close(kl, brute, atol=1e-6, rtol=1e-5)
    assert (kl >= 0).all() and kl.isfinite().all()


def test_candidates_reach_the_mass_and_no_further():
    torch.manual_seed(0)
    scores = torch.randn(200, 40) * 4
    found = Candidates.of(scores, Guidance(candidates=10, delta=0.05))
    probs = torch.softmax(scores, -1)
    for row in range(200):
        count = int(found.valid[row].sum())
        top = probs[row].sort(descending=True).values
        assert found.valid[row, :count].all()
        assert count == 10 or top[:count].sum() >= 0.95 - 1e-6
        assert count == 1 or top[: count - 1].sum() < 0.95 + 1e-6


def test_delta_0_values_all_candidates():
    """Also where the top token's mass is 1 in float32: at a small beta the others may still win."""
    scores = torch.tensor([[60.0, 5.0, 4.0, -torch.inf], [100.3, 90.0, 80.0, 70.0]])
    found = Candidates.of(scores, Guidance(candidates=4, delta=0.0))
    assert found.valid.tolist() == [[True, True, True, False], [True] * 4]


def test_the_error_of_what_is_left_out_is_bounded():
    """Relative mass of the unscored tokens under the full tilt: at most delta * exp(1 / beta) / (1 - delta)."""
    torch.manual_seed(0)
    beta, delta = 0.5, 0.01
    scores = torch.randn(300, 60) * 4
    values = torch.randn(300, 60) * 5
    found = Candidates.of(scores, Guidance(candidates=60, delta=delta))
    full = torch.softmax(scores.double() + bernoulli_log_tilt(values.double(), beta), -1)
    inside = full.gather(1, found.ids).masked_fill(~found.valid, 0).sum(-1)
    ratio = (1 - inside) / inside
    assert (ratio <= delta * torch.tensor(1 / beta).exp() / (1 - delta) + 1e-9).all()


def test_huge_tilts_do_not_overflow():
    scores = torch.randn(4, 30)
    candidates = Candidates.of(scores, Guidance(candidates=5, delta=0.0))
    for outside in ("mask", "zero_tilt"):
        guided, kl = guide(scores, candidates, torch.tensor([[1e5, 0, 1e5, 3, 0]]).expand(4, 5), outside)
        law = torch.softmax(guided, -1)
        assert law.isfinite().all() and kl.isfinite().all()
        expected = torch.softmax(scores.gather(1, candidates.ids[:, [0, 2]]), -1)
        torch.testing.assert_close(law.gather(1, candidates.ids[:, [0, 2]]), expected, atol=1e-5, rtol=0)


def test_tokens_that_do_not_exist_stay_so():
    scores = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    candidates = Candidates.of(scores, Guidance(candidates=4, delta=0.0))
    for outside in ("mask", "zero_tilt"):
        guided, kl = guide(scores, candidates, torch.ones(1, 4), outside)
        assert (guided[0, [1, 3]] == -torch.inf).all() and kl.item() == pytest.approx(0, abs=1e-6)


def test_the_threshold_is_that_of_the_logits_as_they_are_however_large():
    """Rows whose best token leaves about delta, to within a thousandth of it: with the mass of a float32
    logsumexp, rounding would decide, and differently in every engine."""
    generator = torch.Generator().manual_seed(0)
    delta, rows = 1e-4, 4000
    left = delta * (1 + 1e-3 * (2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1))
    best = 5 + 25 * torch.rand(rows, generator=generator, dtype=torch.float64)
    others = best + torch.log(left / (1 - left)) - torch.tensor([[2.0], [2.0]], dtype=torch.float64).log()
    scores = torch.stack([best, *others], -1).float()
    exact = torch.softmax(scores.double(), -1)[:, 1:].sum(-1)  # of the rounded logits
    away = (exact - delta).abs() > 1e-5 * delta
    found = Candidates.of(scores, Guidance(delta=delta))
    assert away.sum() > rows / 2
    assert torch.equal(found.valid[away, 1], (exact > delta)[away])
    torch.testing.assert_close(found.logprobs.exp().sum(-1), torch.ones(rows, dtype=torch.float64), atol=1e-9, rtol=0)

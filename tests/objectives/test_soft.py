"""The soft value and the tilt, against their definitions and at the edges."""

import pytest
import torch

from posttrain.objectives.soft import soft_value, tilt

NAN, INF = float("nan"), float("inf")


def reference(seed=0, shape=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.log_softmax(torch.randn(shape, generator=generator, dtype=torch.float64), -1)
    return ref, torch.randn(shape, generator=generator, dtype=torch.float64)


def test_paper_vector():
    p0 = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    assert soft_value(q, p0.log(), 1.0).item() == pytest.approx(1.004332, abs=1e-6)
    optimum = tilt(p0.log(), q).exp()
    torch.testing.assert_close(
        optimum, torch.tensor([0.146516, 0.298703, 0.541306, 0.013475]).double(), atol=1e-6, rtol=0
    )
    assert (optimum @ q).item() == pytest.approx(1.367840, abs=1e-6)
    assert (optimum @ (optimum / p0).log()).item() == pytest.approx(0.363508, abs=1e-6)


def test_value_is_the_best_of_the_regularised_problem():
    ref, q = reference()
    beta = 0.3
    best = tilt(ref, q / beta)
    objective = (best.exp() * (q - beta * (best - ref))).sum(-1)
    torch.testing.assert_close(objective, soft_value(q, ref, beta))
    other = torch.log_softmax(best + 0.1 * torch.randn_like(best), -1)
    assert ((other.exp() * (q - beta * (other - ref))).sum(-1) < objective).all()


def test_tilt_is_the_reference_times_the_exponential():
    ref, q = reference()
    torch.testing.assert_close(tilt(ref, q), ref + q - soft_value(q, ref, 1.0)[:, None])


def test_logits_need_not_be_normalised():
    ref, q = reference()
    torch.testing.assert_close(tilt(ref + 7, q - 3), tilt(ref, q))


def test_any_dimension():
    ref, q = reference(shape=(4, 3, 2))
    torch.testing.assert_close(soft_value(q, ref, 0.5, dim=0), soft_value(q.movedim(0, -1), ref.movedim(0, -1), 0.5))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_lose_nothing_in_float32(scale):
    ref, q = (x.float() for x in reference())
    beta = 0.125  # a power of two: the shift by `scale` is exact
    shifted = soft_value(q.half().float() + scale * beta, ref, beta)
    plain = soft_value(q.half().float(), ref, beta)
    torch.testing.assert_close(shifted - scale * beta, plain, atol=2e-4, rtol=0)
    torch.testing.assert_close(tilt(ref, scale + q.half().float()), tilt(ref, q.half().float()), atol=2e-3, rtol=0)


def test_far_apart_scores_are_the_maximum():
    ref = torch.log(torch.tensor([0.9, 0.1]))
    assert soft_value(torch.tensor([-1e4, 1e4]), ref, 1.0).item() == pytest.approx(1e4 + ref[1].item())
    assert tilt(ref, torch.tensor([-1e4, 1e4])).tolist() == [-20000 + ref[0] - ref[1], 0]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_masked_actions_are_never_read(garbage):
    ref, q = reference()
    ref = torch.cat([ref, torch.full((3, 1), -INF)], -1)
    padded = torch.cat([q, torch.full((3, 1), garbage)], -1).requires_grad_()
    value, policy = soft_value(padded, ref, 0.7), tilt(ref, padded / 0.7)
    torch.testing.assert_close(value, soft_value(q, ref[:, :-1], 0.7))
    torch.testing.assert_close(policy[:, :-1], tilt(ref[:, :-1], q / 0.7))
    assert (policy[:, -1] == -INF).all()
    (value.sum() + policy[:, :-1].square().sum()).backward()
    assert padded.grad[:, :-1].isfinite().all()
    assert (padded.grad[:, -1] == 0).all()


def test_a_row_without_actions_is_minus_infinity_not_nan():
    ref = torch.tensor([[-INF, -INF], [0.0, -INF]])
    q = torch.tensor([[NAN, 1.0], [2.0, NAN]])
    assert soft_value(q, ref, 1.0).tolist() == [-INF, 2.0]
    assert tilt(ref, q).tolist() == [[-INF, -INF], [0.0, -INF]]


def test_gradient_of_the_value_is_the_tilted_policy():
    ref, q = reference()
    q.requires_grad_()
    soft_value(q, ref, 0.4).sum().backward()
    torch.testing.assert_close(q.grad, tilt(ref, q.detach() / 0.4).exp())


def test_finite_differences():
    ref, q = reference(shape=(2, 3))
    assert torch.autograd.gradcheck(lambda q, ref: soft_value(q, ref, 0.6), (q.requires_grad_(), ref.requires_grad_()))
    assert torch.autograd.gradcheck(tilt, (ref, q))


@pytest.mark.parametrize("beta", [0, -1.0])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta"):
        soft_value(torch.zeros(2), torch.zeros(2), beta)

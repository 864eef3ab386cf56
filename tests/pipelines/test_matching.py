"""The search for a beta, on KLs that are known in closed form."""

import math

import pytest

from posttrain.pipelines.matching import STEPS, TOLERANCE, beta_of_kl
from posttrain.rollouts.engine import LEAST_BETA


def tilted(beta):
    """KL of softmax((0, 1, 1) / beta) to uniform: it saturates at log 3/2."""
    masses = [math.exp(-1 / beta), 1.0, 1.0]
    return sum(m / sum(masses) * math.log(3 * m / sum(masses)) for m in masses if m)


class Counted:
    def __init__(self, kl):
        self.kl, self.betas = kl, []

    def __call__(self, beta):
        self.betas.append(beta)
        return self.kl(beta)


@pytest.mark.parametrize("start", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("sought", [0.2, 0.5, 2.0, 5.0])
def test_it_is_found_in_few_measurements(start, sought):
    kl = Counted(tilted)
    beta, found = beta_of_kl(kl, tilted(sought), start)
    assert found == tilted(beta) and abs(math.log(found / tilted(sought))) <= TOLERANCE
    assert len(kl.betas) <= 6 and len(set(kl.betas)) == len(kl.betas)


def test_where_the_start_is_right_nothing_else_is_tried():
    kl = Counted(tilted)
    assert beta_of_kl(kl, tilted(0.4), 0.4)[0] == pytest.approx(0.4)
    assert len(kl.betas) == 1


def test_noise_is_survived():
    """A measurement that is off by some 10 percent, and not monotone, still leads to within that of the target."""
    noisy = Counted(lambda beta: tilted(beta) * (1 + 0.1 * math.sin(1e4 * beta)))
    beta, found = beta_of_kl(noisy, tilted(1.0), 0.05)
    assert abs(math.log(found / tilted(1.0))) <= 0.1 and abs(math.log(tilted(beta) / tilted(1.0))) <= 0.2
    assert len(noisy.betas) <= STEPS


def test_a_target_out_of_reach_gives_the_closest():
    kl = Counted(tilted)
    found = beta_of_kl(kl, 1.0, 0.3)[1]  # more than log 3/2
    assert found == pytest.approx(math.log(3 / 2), rel=1e-3) and min(kl.betas) >= LEAST_BETA
    assert len(kl.betas) == STEPS


def test_guidance_that_moves_nothing_is_matched_at_once():
    kl = Counted(lambda beta: 0.0)
    assert beta_of_kl(kl, 0.0, 0.1) == (pytest.approx(0.1), 0.0) and len(kl.betas) == 1

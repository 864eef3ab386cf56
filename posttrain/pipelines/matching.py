"""The beta at which a guided policy moves as far from pi_ref as it should, in few measurements, each of which samples."""

import math
from collections.abc import Callable

from posttrain.rollouts.engine import LEAST_BETA

REACH = math.log(10_000)  # of log beta from its start, either way: where it is looked for
STEPS = 8
TOLERANCE = 0.03  # of the KL; its mean over some dozens of completions is less certain than that


def beta_of_kl(kl: Callable[[float], float], target: float, start: float) -> tuple[float, float]:
    """(beta, its KL) near `target`, which `kl(beta)`, falling in beta, is to have; the closest seen where none is near.

    start: above LEAST_BETA. The secant method on the logarithms, which lie near a straight line, of slope -2 while the tilt is
    weak and flatter as it saturates. A bracket holds it where noise or saturation would throw it out.
    """
    at, slope = math.log(start), -2.0
    low, high = max(at - REACH, math.log(LEAST_BETA)), at + REACH
    seen: list[tuple[float, float, float]] = []  # log beta, how far log KL is above the target's, KL
    for _ in range(STEPS):
        found = kl(math.exp(at))
        above = math.log(max(found, 1e-12) / max(target, 1e-12))
        if seen:
            slope = (above - seen[-1][1]) / (at - seen[-1][0])
        seen.append((at, above, found))
        if abs(above) <= TOLERANCE:
            break
        low, high = (at, high) if above > 0 else (low, at)
        step = -above / slope if slope < 0 else math.inf
        at = at + step if low < at + step < high else (low + high) / 2
    nearest = min(seen, key=lambda each: abs(each[1]))
    return math.exp(nearest[0]), nearest[2]

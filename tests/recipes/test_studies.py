"""Several seeds in one table, on scores small enough to count by hand."""

import numpy as np
import pytest

from posttrain.evaluation.arms import Arm
from recipes.qsharp.study import figures, measure, pooled, print_study


def arms(shift, kl):
    """Of four problems; guidance and CD differ on one of them."""
    scores = {
        "base": [0, 1, 0, 0],
        "majority": [0, 1, 0, 1],
        "qsharp": [1, 1, 0.5, 1],
        "qsharp_2": [1, 1, 1, 1 - shift],
    }
    scores["cd"] = scores["qsharp_best"] = [1, 1, 1, 0]
    guided = {"qsharp": kl, "qsharp_2": 2 * kl, "cd": 3 * kl}
    return {
        name: Arm(name, name, np.array(row, float), 1, 1, (), {"kl": guided[name]} if name in guided else {})
        for name, row in scores.items()
    }


def test_differences_are_paired_by_problem_within_a_seed_and_over_all(capsys):
    seeds = [measure(arms(0.0, 0.5)), measure(arms(0.5, 0.7))]
    one, two = map(figures, seeds)
    assert list(one["differences"]) == [f"qsharp_2 - {name}" for name in ("base", "majority", "cd", "qsharp")]
    assert one["differences"]["qsharp_2 - base"].difference == 0.75
    assert two["differences"]["qsharp_2 - cd"].difference == 0.125
    together = figures({name: pooled([seed[name] for seed in seeds]) for name in seeds[0]})
    over_all = together["differences"]["qsharp_2 - cd"]
    assert (over_all.problems, over_all.difference) == (8, (1 + 0.5) / 8)
    assert together["arms"]["qsharp_2"]["kl"] == pytest.approx(1.2) and together["arms"]["base"]["kl"] is None
    assert together["arms"]["qsharp_2"]["accuracy"] == pytest.approx(7.5 / 8)
    low, high = together["arms"]["qsharp_2"]["interval"]
    assert low < 7.5 / 8 < high
    sizes = {"policy": 9, "value": 4}
    print_study({"0": {**one, "parameters": sizes}, "all": {**together, "parameters": sizes}})
    shown = capsys.readouterr().out
    assert "seed all" in shown and "+18.75" in shown and "value model 4" in shown


def test_one_round_is_compared_with_no_other():
    alone = {name: arm for name, arm in measure(arms(0.0, 0.5)).items() if name != "qsharp_2"}
    assert list(figures(alone)["differences"]) == ["qsharp - base", "qsharp - majority", "qsharp - cd"]

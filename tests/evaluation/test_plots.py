"""What is drawn is where it should be: points are read back from the SVG."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.plots import (
    COLOURS,
    accuracy_curves,
    calibration,
    kl_plane,
    length_histogram,
    metric_curves,
    step_curves,
    token_plane,
)


def outlines(svg, colour, filled=False):
    """The corners of every path in a colour, [points, 2] in points of the page, y upwards."""
    found = []
    for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        style = element.get("style", "")
        inked = f"stroke: {colour}" in style and ("fill: none" not in style) == filled
        if inked and element.get("clip-path"):
            numbers = re.findall(r"-?[\d.]+", element.get("d"))
            found.append(np.array(numbers, dtype=float).reshape(-1, 2) * [1, -1])
    return found


def assert_drawn_at(pixels, values):
    """Along one axis the page is an increasing linear function of the data."""
    pixels, values = np.concatenate(pixels), np.concatenate(values)
    slope, offset = np.polyfit(values, pixels, 1)
    assert slope > 0 and pixels == pytest.approx(slope * values + offset, abs=1e-3)


def arm(name, *curve):
    return Arm(name, f"the {name}", np.array([0.0, 1.0]), 10, 1.0, curve)


def test_the_plane_of_kl_has_every_arm_and_the_lines_of_sweeps():
    class Point:
        def __init__(self, kl, accuracy):
            self.beta, self.kl, self.accuracy, self.interval = 1.0, kl, accuracy, (accuracy - 0.1, accuracy + 0.1)

    svg = kl_plane([arm("base"), arm("one"), arm("two")], {"Q#": [Point(0.5, 0.4), Point(1.0, 0.8), Point(2.0, 0.9)]})
    line = next(path for path in outlines(svg, COLOURS[3]) if len(path) == 3)
    assert_drawn_at([line[:, 0]], [np.array([0.5, 1.0, 2.0])])
    assert_drawn_at([line[:, 1]], [np.array([0.4, 0.8, 0.9])])
    assert all(f">{title}</text>" in svg for title in ("the base", "the one", "the two", "Q#, over beta"))


def test_step_curves_go_through_their_points():
    curves = {"one": ([1, 2, 5], [0.5, 0.25, 1.0]), "two": ([2, 3, 4], [0.1, 0.6, 0.3])}
    svg = step_curves(curves, "accuracy")
    lines = [outlines(svg, colour)[0] for colour in COLOURS[:2]]
    for axis in (0, 1):
        assert_drawn_at([line[:, axis] for line in lines], [np.array(curve[axis]) for curve in curves.values()])


def test_the_plane_has_a_bar_and_a_name_for_every_arm():
    values = {"a": (20.0, 0.25), "b": (40.0, 0.5), "c": (80.0, 0.9)}
    arms = {
        name: Arm(name, f"the {name}", np.repeat([1.0, 0.0], [round(20 * right), round(20 * (1 - right))]), tokens, 1.0)
        for name, (tokens, right) in values.items()
    }
    svg = token_plane(arms)
    bars = [outlines(svg, colour)[0] for colour in COLOURS[:3]]
    assert_drawn_at([bar[:, 0] for bar in bars], [np.full(2, np.log(tokens)) for tokens, _ in values.values()])
    assert_drawn_at([bar[:, 1] for bar in bars], [np.array(arm.interval) for arm in arms.values()])
    assert all(arm.title in svg for arm in arms.values())


def test_more_arms_than_styles_differ_by_filled_markers():
    names = [str(number) for number in range(len(COLOURS) + 1)]
    svg = token_plane({name: arm(name) for name in names})
    assert not re.search(f"fill: {COLOURS[1]}", svg) and re.search(f"fill: {COLOURS[0]}", svg)


def test_every_arm_with_a_curve_is_a_line_through_its_accuracies():
    curves = {"base": (0.5, 0.5, 0.5), "majority": (0.5, 0.4, 0.45), "oracle": (0.5, 0.75, 0.9)}
    arms = {name: arm(name, *curve) for name, curve in curves.items()}
    svg = accuracy_curves({**arms, "other": arm("other")})
    lines = [outlines(svg, colour)[0] for colour in COLOURS[:3]]
    assert_drawn_at([line[:, 1] for line in lines], list(map(np.array, curves.values())))
    assert_drawn_at([line[:, 0] for line in lines], [np.arange(1, 4)] * 3)
    assert "the oracle" in svg and "the other" not in svg


def test_lines_on_each_other_differ_in_more_than_colour():
    svg = accuracy_curves({name: arm(name, 0.5, 0.5) for name in "abcdefgh"})
    dashes = re.findall(r'<path d="[^"]+" clip-path="[^"]+" style="fill: none; (stroke-dasharray[^"]*)"', svg)
    assert len({re.sub("stroke: #\\w+", "", dash) for dash in dashes}) >= 6


def test_more_arms_than_colours_are_all_drawn():
    svg = accuracy_curves({f"arm{i}": arm(f"arm{i}", 0.1, 0.2) for i in range(11)})
    assert all(f"the arm{i}<" in svg for i in range(11))


def test_a_metric_curve_is_at_its_values():
    curves = {"pass@k": {"value": [0.2, 0.3, 0.6], "low": [0.1, 0.2, 0.5], "high": [0.3, 0.4, 0.7]}}
    line = outlines(metric_curves(curves), COLOURS[1])[0]
    assert_drawn_at([line[:, 1]], [np.array([0.2, 0.3, 0.6])])


def test_calibration_has_one_point_per_bin_of_equal_counts():
    probabilities = np.repeat([0.1, 0.4, 0.9], [4, 4, 4])
    correct = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=float)
    svg = calibration(probabilities, correct, bins=3)
    line = next(path for path in outlines(svg, COLOURS[2]) if len(path) == 3)
    assert_drawn_at([line[:, 0]], [np.array([0.1, 0.4, 0.9])])
    assert_drawn_at([line[:, 1]], [np.array([0.25, 0.5, 1.0])])


def test_calibration_of_fewer_completions_than_bins():
    assert calibration(np.array([0.2, 0.8]), np.array([0.0, 1.0])).startswith("<svg")


@pytest.mark.slow
def test_bars_are_as_high_as_their_counts():
    svg = length_histogram({"right": [3] * 5 + [39], "wrong": [20] * 10})
    bars = [bar for colour in (COLOURS[3], COLOURS[5]) for bar in outlines(svg, colour, filled=True)]
    heights = sorted(np.ptp(bar[:, 1]) for bar in bars if np.ptp(bar[:, 1]))
    assert np.array(heights) / heights[0] == pytest.approx([1, 5, 10], abs=0.01)
    assert "right (6)" in svg and "wrong (10)" in svg


def test_a_verdict_keeps_its_colour():
    """Completions without an answer are neither right nor wrong, also where there are no others."""
    svg = length_histogram({"no answer": [3, 4]})
    assert outlines(svg, COLOURS[0], filled=True)
    assert not outlines(svg, COLOURS[3], filled=True) and not outlines(svg, COLOURS[5], filled=True)


def test_a_histogram_of_nothing():
    assert length_histogram({"right": [], "wrong": []}).startswith("<svg")


def test_the_same_figure_is_the_same_text():
    lengths = {"right": [1, 2, 3], "wrong": [4]}
    assert length_histogram(lengths) == length_histogram(lengths)

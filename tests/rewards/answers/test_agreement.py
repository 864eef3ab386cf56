"""Equality of what only has numeric values: sound at every magnitude."""

import threading

import pytest

from posttrain.rewards.answers.expressions import same_expression
from posttrain.rewards.answers.parser import parse
from posttrain.rewards.equality import decide
from tests.rewards.clock import within_a_second

IDENTITIES = [
    (r"10^{60}\sqrt{2}+1", r"1+\sqrt{2}\cdot 10^{60}"),
    (r"\ln((10^{60}+\sqrt2)-10^{60})", r"\frac{\ln 2}{2}"),
    (r"10^{-80}\pi", r"\frac{\pi}{10^{80}}"),
    (r"(\sqrt2+\sqrt3)^{20}", r"(5+2\sqrt6)^{10}"),
    (r"\left(\frac{1+\sqrt5}{2}\right)^{100}-\left(\frac{1-\sqrt5}{2}\right)^{100}", r"354224848179261915075\sqrt5"),
    (r"\frac{(2+\sqrt3)^{1000}+(2-\sqrt3)^{1000}}{2}", r"\frac{(7+4\sqrt3)^{500}+(7-4\sqrt3)^{500}}{2}"),
    (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
    (r"\cos 36^\circ", r"\frac{1+\sqrt5}{4}"),
    (r"\arctan\frac12+\arctan\frac13", r"\frac\pi4"),
    (r"i^i", r"e^{-\pi/2}"),
    (r"\sqrt{x^2+2x+1}", "|x+1|"),
    (r"\frac{x-1}{\sqrt{x}-1}", r"\sqrt{x}+1"),
    (r"\ln(x^2)", r"2\ln|x|"),
    (r"\frac{(2n)!}{n!\,n!}", r"\binom{2n}{n}"),
    ("(-1)^{2n+1} n!", "-n!"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
    (r"\sqrt{2+\sqrt{2+\sqrt2}}", r"2\cos\frac{\pi}{16}"),
    (r"\sqrt{5+2\sqrt6}-\sqrt3-\sqrt2", "0"),
    (r"\cos\frac\pi7\cos\frac{2\pi}7\cos\frac{3\pi}7", r"\frac18"),
    (r"\cos\frac\pi7-\cos\frac{2\pi}7+\cos\frac{3\pi}7", r"\frac12"),
    (r"\tan\frac{3\pi}{11}+4\sin\frac{2\pi}{11}", r"\sqrt{11}"),
    (r"4\arctan\frac15-\arctan\frac1{239}", r"\frac\pi4"),
    (r"\sqrt{\sqrt2\cdot\sqrt2-2}+1", "1"),
    (r"\lfloor\sqrt2\cdot\sqrt8\rfloor", "4"),
    (r"\coth x", r"\frac{e^x+e^{-x}}{e^x-e^{-x}}"),
    (r"f(\sqrt8)", r"f(2\sqrt2)"),
    (r"\left(\frac{1+i\sqrt3}{2}\right)^3", "-1"),
]
NEAR_MISSES = [
    (r"10^{60}\sqrt{2}", r"10^{60}\sqrt{3}"),
    (r"10^{3000}+\sqrt{2}", r"10^{3000}+\sqrt{3}"),
    (r"10^{-500}\sqrt2", "0"),
    (r"(\sqrt2-1)^{200}", "0"),
    (r"1+(\sqrt2-1)^{300}", "1"),
    (r"\sqrt{10^{100}+1}", "10^{50}"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    (r"e^{-10000}", "0"),
    (r"\sin(10^{-60})", "10^{-60}"),
    (r"\lfloor 10^{40}\sqrt2\rfloor", r"10^{40}\sqrt2"),
    (r"\sqrt{x^2}", "x"),
    (r"x\sqrt{2}+10^{-300}", r"x\sqrt{2}"),
    (r"\sum_{k=1}^n k", r"\frac{n(n+1)}{2}+\frac{(n-1)(n-2)(n-3)(n-4)(n-5)}{10^9}"),
    ("f(2x)", "2f(x)"),
    (r"\log x", r"\ln x"),
    (r"\lfloor\sqrt2\cdot\sqrt2\rfloor+(\sqrt2-1)^{300}", "2"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt{2.0000000000000000000000000000000000000000001}"),
    (r"\cos\frac\pi7\cos\frac{2\pi}7\cos\frac{3\pi}7", r"\frac18+10^{-200}"),
    (r"f(\sqrt2+10^{-40})", r"f(\sqrt2)"),
    (r"\sqrt{1+10^{-300}}", "1"),
    (r"\sqrt[3]{10^{90}+1}-10^{30}", "0"),
    (r"\arcsin(1-10^{-400})", r"\frac\pi2"),
]


@pytest.mark.parametrize(("a", "b"), IDENTITIES)
def test_identities_hold(a: str, b: str) -> None:
    assert same_expression(parse(a), parse(b)) is True


@pytest.mark.parametrize(("a", "b"), NEAR_MISSES)
def test_near_misses_do_not(a: str, b: str) -> None:
    assert same_expression(parse(a), parse(b)) is False


@pytest.mark.parametrize("text", [r"\ln 0 + \sqrt{2}", r"\frac{\sqrt{2}}{0}", r"\infty - \infty"])
def test_what_has_no_value_decides_nothing(text: str) -> None:
    assert same_expression(parse(text), parse(f"1+{text}")) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\sqrt2\cdot 1000!",
        r"\sqrt{(10^6)!}",
        r"2^{\sqrt2^{\sqrt2^{30}}}",
        r"\sqrt{2}^{10^{9}}",
        r"\sqrt{9^{9^{9^{9}}}}",
    ],
)
def test_what_is_huge_ends_soon_and_equals_no_neighbour(text: str) -> None:
    assert within_a_second(lambda: decide(text, f"{text}+1").verdict) != "equal"


def test_threads_do_not_share_precision() -> None:
    verdicts: list[bool | None] = []

    def work() -> None:
        verdicts.extend(same_expression(parse(a), parse(b)) for a, b in IDENTITIES[:6])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 24

"""SymPy in a process that can be killed."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from posttrain.rewards.answers import algebra
from posttrain.rewards.answers.parser import parse
from posttrain.rewards.equality import decide
from posttrain.rewards.math import grade

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    algebra.warm()


@pytest.fixture
def unhurried() -> Iterator[None]:
    """On a slow machine too the verdict is what SymPy finds, and not that it had no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algebra, "CPU_SECONDS", 10.0)
        patch.setattr(algebra, "SECONDS", 60.0)
        algebra._stop()
        algebra.warm()
        yield
        algebra._stop()
    algebra.warm()


@pytest.mark.parametrize(
    ("gold", "pred", "verdict"),
    [
        ("1/3", r"\int_0^1 x^2 \, dx", "equal"),
        ("1/3", r"\int_0^1 x^3 \, dx", "different"),
        ("1", r"\lim_{x \to 0} \frac{\sin x}{x}", "equal"),
        (r"\frac{\pi^2}{6}", r"\sum_{n=1}^{\infty} \frac{1}{n^2}", "equal"),
        ("3", r"\sum_{n=0}^{\infty} \frac{1}{2^n}", "different"),
        ("e", r"\lim_{n\to\infty} (1+\frac1n)^n", "equal"),
    ],
)
def test_calculus_is_settled(unhurried: None, gold: str, pred: str, verdict: str) -> None:
    decision = decide(gold, pred)
    assert (decision.verdict, decision.step) == (verdict, "algebra")


def test_hopeless_work_is_cut_off_and_the_next_is_done() -> None:
    start = time.perf_counter()
    assert decide("5", r"\int_0^1 \sin(\cos(\tan(x^{50}))) dx").verdict == "timeout"
    assert time.perf_counter() - start < 3  # one second on an idle machine
    found = grade(completions=[r"\boxed{\lim_{x \to 0} \frac{\sin x}{x}}"], golds=["1"])
    assert found[0].verdict == "equal"


def test_it_works_off_the_main_thread(unhurried: None) -> None:
    verdicts: list[str] = []
    thread = threading.Thread(target=lambda: verdicts.append(decide("1/2", r"\int_0^1 x \, dx").verdict))
    thread.start()
    thread.join()
    assert verdicts == ["equal"]


def test_no_zombie_is_left() -> None:
    decide("5", r"\int_0^1 \sin(\cos(\tan(x^{50}))) dx")
    listing = subprocess.run(
        ["ps", "-o", "stat=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    assert not [line for line in listing.stdout.split() if line.startswith("Z")]


@pytest.mark.parametrize(
    "text",
    [
        r"\int_0^1 x^{100} dx",
        r"\int_0^1 (10^9)! dx",
        r"\int_0^1 x^{x^{x^2}} dx",
        r"\int_0^1 1000! \, dx",
        r"\int_0^1 9999999 \, dx",
    ],
)
def test_what_looks_dangerous_is_not_asked(text: str) -> None:
    assert not algebra.harmless(parse(text))


def test_trees_survive_the_pipe() -> None:
    node = parse(r"\frac{x^2}{3} + \sin(\pi x)")
    assert algebra.from_data(algebra.to_data(node)) == node

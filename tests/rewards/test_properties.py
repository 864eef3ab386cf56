"""Laws of equality on generated answers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posttrain.rewards.equality import decide
from posttrain.rewards.math import canonical, extract_answer, grade
from tests.rewards.clock import within_a_second

integers = st.integers(-10_000, 10_000)
names = st.sampled_from(["x", "y", "n", "a_1", r"\alpha", r"\pi"])


def fraction(pair: tuple[int, int]) -> str:
    return rf"\frac{{{pair[0]}}}{{{pair[1]}}}"


numbers = st.one_of(
    integers.map(str), st.tuples(integers, st.integers(1, 99)).map(fraction), st.decimals(-999, 999, places=3).map(str)
)


def operations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda p: f"{p[0]} + {p[1]}"),
        two.map(lambda p: f"({p[0]}) - ({p[1]})"),
        two.map(lambda p: rf"\left({p[0]}\right)\left({p[1]}\right)"),
        two.map(lambda p: rf"\frac{{{p[0]}}}{{{p[1]} + 1000}}"),
        inner.map(lambda e: rf"\sqrt{{({e})^2 + 1}}"),
        st.tuples(inner, st.integers(2, 4)).map(lambda p: f"({p[0]})^{{{p[1]}}}"),
        inner.map(lambda e: rf"\sin({e})"),
    )


expressions = st.recursive(st.one_of(numbers, names), operations, max_leaves=6)
answers = st.one_of(
    expressions,
    st.lists(expressions, min_size=2, max_size=4).map(", ".join),
    st.lists(expressions, min_size=2, max_size=4).map(lambda e: f"({', '.join(e)})"),
    st.lists(expressions, min_size=1, max_size=4).map(lambda e: rf"\{{{', '.join(e)}\}}"),
    expressions.map(lambda e: f"x = {e}"),
    st.tuples(integers, st.integers(1, 50)).map(lambda p: f"[{p[0]}, {p[0] + p[1]})"),
    expressions.map(lambda e: rf"{e} \text{{ cm}}"),
)
texts = st.text(max_size=60)
latex_soup = st.lists(
    st.sampled_from(
        r"\frac \sqrt { } ( ) [ ] \{ \} ^ _ ! ' | , ; : = < > + - * / \pm \cup \in \text{ a x 1 23 .5 \pi \sin \left( \right) \begin{pmatrix} "
        r"\end{pmatrix} & \\ % $ \infty \le \binom \sum_{k=1}^{9} \int \overline or and 0.\overline{3} ° \boxed{ #### \ldots".split()
    ),
    max_size=25,
).map(" ".join)
quick = settings(max_examples=150)


@quick
@given(answers)
def test_reflexive(answer: str) -> None:
    assert decide(answer, answer + " ").verdict == "equal"


@pytest.mark.slow
@quick
@given(answers, answers)
def test_symmetric(a: str, b: str) -> None:
    assert decide(a, b).verdict == decide(b, a).verdict


SPELLINGS = [
    lambda a: f"${a}$",
    lambda a: rf"\[ {a}. \]",
    lambda a: rf"\boxed{{{a}}}",
    lambda a: a.replace(r"\frac", r"\dfrac"),
    lambda a: a.replace(r"\left(", "(").replace(r"\right)", ")"),
    lambda a: a.replace(" + ", "+").replace(", ", r",\ "),
    lambda a: a.replace("+", " + ").replace("=", " = "),
    lambda a: a.replace("-", "−"),
]


@quick
@given(answers, st.sampled_from(SPELLINGS))
def test_stable_under_spelling(answer: str, respelt) -> None:  # type: ignore[no-untyped-def]
    assert decide(answer, respelt(answer)).verdict == "equal"


@quick
@given(st.lists(expressions, min_size=2, max_size=5), st.randoms())
def test_lists_are_unordered(items: list[str], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(items, len(items))
    assert decide(", ".join(items), ", ".join(shuffled)).verdict == "equal"


OTHER_SPELLINGS = [
    "{0}",
    "({0}) + 0",
    "1 - 1 + {0}",
    r"\frac{{3({0})}}{{3}}",
    r"\sqrt[3]{{({0})^3}}",
    r"\sqrt2 \frac{{{0}}}{{\sqrt2}}",
]


@pytest.mark.slow
@quick
@given(st.lists(expressions, min_size=2, max_size=3), st.randoms())
def test_entries_that_repeat_in_other_spellings_are_paired(items: list[str], random) -> None:  # type: ignore[no-untyped-def]
    def respelt() -> str:
        return ", ".join(random.choice(OTHER_SPELLINGS).format(item) for item in random.sample(twice, len(twice)))

    twice = [*items, items[0]]
    assert decide(respelt(), respelt()).verdict == "equal"


def test_multiplicities_count_where_as_much_is_said() -> None:
    assert decide(r"\sqrt8, 2\sqrt2, 3", r"3, \sqrt8, \sqrt8").verdict == "equal"
    assert decide(r"\sqrt8, 2\sqrt2, 3", r"3, 3, \sqrt8").verdict == "different"
    assert decide(r"\sqrt8, 2\sqrt2, 3", r"3, \sqrt8").verdict == "equal"


@quick
@given(expressions, st.integers(1, 9), st.integers(1, 60))
def test_an_offset_however_small_is_a_difference(expression: str, digit: int, place: int) -> None:
    assert decide(expression, f"{expression} + {digit} \\cdot 10^{{-{place}}}").verdict == "different"


@quick
@given(integers, integers)
def test_different_integers_differ(a: int, b: int) -> None:
    assert (decide(str(a), f"{b}.0").verdict == "equal") == (a == b)


@pytest.mark.slow
@quick
@given(answers, answers)
def test_one_canonical_form_means_equal(a: str, b: str) -> None:
    if canonical(a) == canonical(b):
        assert decide(a, b).verdict == "equal"


@quick
@given(st.one_of(texts, latex_soup), st.one_of(texts, latex_soup, answers))
@example(r"\begin{pmatrix}", r"\end{pmatrix}")
@example("{", "}")
@example(r"\frac", r"\sqrt")
@example("1/0", "0/0")
def test_no_text_raises_or_takes_long(pred: str, gold: str) -> None:
    assert within_a_second(lambda: decide(gold, pred).verdict) != "error"


@quick
@given(st.one_of(texts, latex_soup))
def test_no_completion_raises(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer.strip()
    assert grade(completions=[text], golds=["42"])[0].verdict != "error"

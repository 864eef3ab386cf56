"""The bound on the error holds."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.rewards.answers.bounds import NO_VALUE
from posttrain.rewards.answers.numeric import Evaluation
from posttrain.rewards.answers.tree import Apply, Node, Num, Sym

FUNCTIONS = (
    "ln abs sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan arccot arcsec arccsc arsinh arcosh artanh deg "
    "percent Re Im"
).split()

numbers = st.fractions(-5, 5, max_denominator=60).map(Num)
leaves = st.one_of(numbers, st.sampled_from([Sym("pi"), Sym("e"), Sym("i"), Sym("x"), Num(Fraction(10**40))]))


def applied(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.one_of(
        st.builds(lambda op, x: Apply(op, (x,)), st.sampled_from(FUNCTIONS), inner),
        st.builds(lambda op, x, y: Apply(op, (x, y)), st.sampled_from(["add", "mul", "pow"]), inner, inner),
    )


trees = st.recursive(leaves, applied, max_leaves=7)


@pytest.mark.slow
@settings(max_examples=400)
@given(trees, st.booleans())
def test_the_error_is_within_its_bound(tree: Node, real: bool) -> None:
    point = {"x": Fraction(22, 7)}
    try:
        rough = Evaluation(point, 100, real, final=True)
        value, error = rough.value(tree), rough.error
        fine = Evaluation(point, 1_000, real, final=True)
        truth = fine.value(tree)
    except NO_VALUE:
        assume(False)
    assert fine.size(truth - value) <= max(error, fine.error)

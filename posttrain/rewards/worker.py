"""The child's side of `process.Worker`: limits itself, then answers questions until its input ends."""

import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from posttrain.rewards.answers.tree import INFINITY, Apply, Node, Num, Sym, negative


def limit(megabytes: int) -> None:
    """No more memory than this, no files, no core dumps."""
    for what, most in (
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def allow(seconds: float) -> None:
    """From now on this much CPU time; the process that uses more is ended, by a timer or, behind it, by the kernel."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    until = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (until if hard == resource.RLIM_INFINITY else min(until, hard), hard))


def grade_chunk(pairs: list[tuple[str, str]]) -> list[list[str | None]]:
    from posttrain.rewards.math import grade_here

    return [[g.verdict, g.answer, g.rule] for g in grade_here(pairs)]


def compare(trees: list[Any]) -> str:
    """`equal`, `different`, or `unknown` where SymPy cannot evaluate."""
    import sympy  # type: ignore[import-untyped]

    from posttrain.rewards.answers.algebra import from_data

    a, b = (_sympy(from_data(data)).doit() for data in trees)
    rest = sympy.simplify(a - b)
    if rest == 0:
        return "equal"
    if rest.has(sympy.Integral, sympy.Limit, sympy.Sum, sympy.Product):
        return "unknown"
    return "different" if rest.equals(0) is False else "equal" if rest.equals(0) else "unknown"


def _sympy(node: Node) -> Any:
    """Our tree as SymPy's; text is never parsed."""
    import sympy

    constants = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}
    functions: dict[str, Callable[..., Any]] = {
        "add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow, "ln": sympy.log, "abs": sympy.Abs, "arcsin": sympy.asin,
        "arccos": sympy.acos, "arctan": sympy.atan, "binom": sympy.binomial, "ceil": sympy.ceiling,
        **{name: getattr(sympy, name) for name in "sin cos tan cot sec csc sinh cosh tanh factorial floor".split()},
    }  # fmt: skip
    match node:
        case Num(value):
            return sympy.Rational(value.numerator, value.denominator)
        case Sym(name):
            return constants.get(name) or sympy.Symbol(name, real=True)
        case Apply("lim", (variable, target, body)):
            return sympy.Limit(_sympy(body), _sympy(variable), _sympy(target), "+-" if target not in _INFINITE else "+")
        case Apply(("int" | "sum" | "prod") as op, (variable, low, high, body)):
            kind = {"int": sympy.Integral, "sum": sympy.Sum, "prod": sympy.Product}[op]
            return kind(_sympy(body), (_sympy(variable), _sympy(low), _sympy(high)))
        case Apply(op, args):
            return functions[op](*(_sympy(a) for a in args))
    raise TypeError(f"not an expression: {node!r}")


_INFINITE = (INFINITY, negative(INFINITY))


def same_latex(pair: list[str]) -> bool:
    """lm-eval's comparison: SymPy's LaTeX parser reads both (it builds trees, and evaluates no text), and they differ by 0."""
    import sympy
    from sympy.parsing.latex import parse_latex  # type: ignore[import-untyped]

    return bool(sympy.simplify(parse_latex(pair[0]) - parse_latex(pair[1])) == 0)


SECONDS_BETWEEN = 60.0  # of CPU time, to wait for the next question and read it
TASKS: dict[str, Callable[[Any], Any]] = {"grade": grade_chunk, "algebra": compare, "latex": same_latex}


def main() -> None:
    task, seconds, megabytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    answer = TASKS[task]
    if task in ("algebra", "latex"):
        import sympy  # noqa: F401 - before the memory limit counts
    limit(megabytes)
    for line in sys.stdin.buffer:
        number, question = json.loads(line)
        allow(seconds)
        try:
            result = answer(question)
        except Exception:
            result = "error"
        sys.stdout.buffer.write(json.dumps([number, result]).encode() + b"\n")
        sys.stdout.buffer.flush()
        allow(SECONDS_BETWEEN)


if __name__ == "__main__":
    main()

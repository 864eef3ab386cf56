"""Nothing that a model may write raises, runs, or takes a second."""

from pathlib import Path

import pytest

from posttrain.rewards.equality import decide
from posttrain.rewards.math import grade
from tests.rewards.clock import within_a_second

MEGABYTE = 1_000_000

LONG = {
    "digits": "9" * MEGABYTE, "boxed digits": rf"\boxed{{{'9' * MEGABYTE}}}", "open boxes": r"\boxed{" * (MEGABYTE // 7),
    "nested boxes": r"\boxed{" * 60_000 + "1" + "}" * 60_000, "open braces": "{" * MEGABYTE, "one box, open braces": r"\boxed{" + "{" * MEGABYTE,
    "close braces": "}" * MEGABYTE, "backslashes": "\\" * MEGABYTE, "hashes": "#" * MEGABYTE, "empty hashes": "#### \n" * (MEGABYTE // 6),
    "answer, spaces": "answer" + " " * MEGABYTE, "answer, stars": "answer " + "*" * MEGABYTE, "answers": "answer" * (MEGABYTE // 6),
    "statements": "the answer is " * (MEGABYTE // 14), "open elements": "<answer>" * (MEGABYTE // 8), "closed elements": "</answer>" * (MEGABYTE // 9),
    "open thoughts": "<think>" * (MEGABYTE // 7), "thoughts": "<think></think>" * (MEGABYTE // 15), "spaces": " " * MEGABYTE,
    "dollars": "$" * MEGABYTE, "stars": "*" * MEGABYTE, "bold": "**1" * (MEGABYTE // 3), "lines": "\n" * MEGABYTE, "nulls": "\0" * MEGABYTE,
    "digits of another plane": "𝟘" * (MEGABYTE // 4), "accents": "e" + "\u0301" * (MEGABYTE // 2), "commas": rf"\boxed{{{',' * MEGABYTE}}}",
    "fences": "```py\n" * (MEGABYTE // 6), "numbers": "#### " + ",".join(map(str, range(150_000))), "words": "The answer is " + "word " * (MEGABYTE // 5),
    "braces": rf"\boxed{{{'{' * 9_000}1{'}' * 9_000}}}", "many functions": r"\boxed" + r"\a{1}" * (MEGABYTE // 5), "prices": r"\boxed{" + "\\$1 - " * 3_000 + "= 2}",
}  # fmt: skip

DEEP = {
    "tower": "9**9**9", "braced tower": "9^{9^{9^{9}}}", "long tower": "2^" * 500 + "2", "factorial tower": "((((9!)!)!)!)!", "factorial": "10000000!",
    "factorials": "x" + "!" * 300, "binomial": r"\binom{10^9}{5\cdot 10^8}", "fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "roots": r"\sqrt{" * 300 + "2" + "}" * 300, "parentheses": "(" * 900 + "1" + ")" * 900, "signs": "-" * 1500 + "1", "plus-minus": r"\pm 1" * 300,
    "bars": "|" * 1000, "sum of sums": r"\sum_{k=1}^{300}" * 4 + "k", "long sum": r"\sum_{k=1}^{10^9} k", "exponentials": r"e^{e^{e^{e^{10}}}}",
    "sine of much": r"\sin(10^{100000})", "gamma": r"(10^{10}+\frac12)!", "unions": r"(0,1)\cup" * 150 + "(2,3)", "products": r"\begin{pmatrix}1&2\\3&4\end{pmatrix}" * 30,
    "exponent": "1e999999999", "a large root": r"\sqrt[999999]{2}", "applications": "f(" * 200 + "x" + ")" * 200, "repeating": rf"0.\overline{{{'3' * 1500}}}",
    "goes on": "0." + "12" * 900 + "3...", "chain": "1<" * 900 + "2", "ratio": "1:" * 900 + "2", "inequalities": " or ".join(f"x>{i}" for i in range(150)),
    "gammas": "+".join(f"(x+{k})!" for k in range(1, 150)), "polynomial": "(a+b+c+d+e+f)^{999999}", "many radicals": "+".join(rf"\sqrt{{{i}}}x^{{{i}}}" for i in range(90)),
    "half a surrogate": "\ud800", "division by zero": r"\frac{1}{0}", "zero to the zero": "0^0", "indeterminate": r"\infty-\infty", "integral": r"\int_0^1 x^{x^{x}} dx",
}  # fmt: skip

CODE = [
    "__import__('os').system('touch {path}')",
    "open('{path}', 'w').write('x')",
    "eval(\"open('{path}','w')\")",
    "exec('import os; os.mknod(\"{path}\")')",
    r"\input{{{path}}}",
    r"\immediate\write18{{touch {path}}}",
    "$(touch {path})",
    "`touch {path}`",
]

GOLDS = [
    "5",
    r"\sqrt{2}",
    "x^2+1",
    "(1,2)",
    r"\{1,2\}",
    "x>5",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\text{east}",
    "52_8",
    r"28\%",
    "",
]


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_is_graded_within_a_second(name: str) -> None:
    for completion in (LONG[name], f"The answer is {LONG[name]}", rf"\boxed{{{LONG[name]}}}"):
        found = within_a_second(lambda completion=completion: grade(completions=[completion], golds=["5"])[0])
        assert found.verdict in ("different", "no_answer")


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_a_bomb_is_defused_within_a_second(name: str) -> None:
    bomb = DEEP[name]
    for gold in GOLDS:
        for a, b in ((gold, bomb), (bomb, gold), (bomb, f"(0)+{bomb}"), (bomb, f"{bomb}-0")):
            assert within_a_second(lambda a=a, b=b: decide(a, b).verdict) != "error"


@pytest.mark.parametrize("name", DEEP)
def test_a_bomb_equals_no_plain_answer(name: str) -> None:
    assert not any(decide(gold, DEEP[name]).verdict == "equal" for gold in GOLDS)


@pytest.mark.parametrize("code", CODE)
def test_no_code_runs(code: str, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    text = code.format(path=path)
    completions = [text, rf"\boxed{{{text}}}", f"#### {text}", f"The answer is {text}", f"```python\n{text}\n```"]
    assert not any(g.correct for g in grade(completions=completions, golds=["5"] * len(completions)))
    assert decide(text, f"{text} ").verdict == "equal"
    assert not path.exists()

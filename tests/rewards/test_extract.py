"""Where the answer of a completion is, and by which rule."""

import pytest

from posttrain.rewards.extract import extract

STATED = [
    # boxes
    (r"so \boxed{42}.", "42", "boxed"),
    (r"first \boxed{41}, then \boxed{42}", "42", "boxed"),
    (r"\boxed{42} but later \boxed{}", "42", "boxed"),
    (r"\boxed{42} but later \boxed{ }", "42", "boxed"),
    (r"\fbox{7}", "7", "boxed"),
    (r"\boxed   {  x^2 } trailing", "x^2", "boxed"),
    (r"\boxed 5$", "5", "boxed"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
    (r"\boxed{[0, 1\}}", r"[0, 1\}", "boxed"),
    (r"\boxed{\boxed{3}}", r"\boxed{3}", "boxed"),
    (r"\boxed{x = \fbox{5}}", r"x = \fbox{5}", "boxed"),
    (r"\boxed{5} and \boxed{never closes", "5", "boxed"),
    (r"\boxed{never closes \boxed{5}", "5", "boxed"),
    (r"\\boxed{42}", "42", "boxed"),
    ("The answer is 3. \\boxed{4} #### 5", "4", "boxed"),
    # ####
    ("2 + 2 = 4\n#### 4", "4", "hash"),
    ("23+48=1c71;#### 71", "71", "hash"),
    ("#### 1\n#### 2", "2", "hash"),
    ("####42", "42", "hash"),
    ("The answer is #### 42", "42", "hash"),
    ("#### $1,234.", "$1,234", "hash"),
    ("#### Step 2: multiply\nThe answer is 5", "5", "phrase"),
    ("#### Final Answer\n\n5", "5", "phrase"),
    # elements
    ("<answer> 12.5 </answer>", "12.5", "tag"),
    ("<ANSWER>1</ANSWER> no: <answer>2</answer>", "2", "tag"),
    # statements
    ("The answer is 42.", "42", "phrase"),
    ("the final answer is: 42", "42", "phrase"),
    ("Answer: 41 was a guess.\nAnswer: 42", "42", "phrase"),
    ("**Answer:** 42", "42", "phrase"),
    ("**Final Answer**: **42**", "42", "phrase"),
    ("### Final answer\n\n$\\frac12$\n", "$\\frac12$", "phrase"),
    ("The final answer is\n\\[\nx = 5\n\\]", "x = 5", "phrase"),
    ("Answer $ 9 $", "$ 9 $", "phrase"),
    ("The answer is $5$ meters.", "$5$ meters", "phrase"),
    ("The answer is 3.5 km.", "3.5 km", "phrase"),
    ("The answer is 42, since 6 * 7 = 42.", "42", "phrase"),
    ("The answer is therefore simply 42 because of this", "42", "phrase"),
    ("The answer is for sure D, it can't be A or B", "D", "phrase"),
    ("The answer: D, it doesn't make sense for it to be A or B", "D", "phrase"),
    ("I think the correct answer is C", "C", "phrase"),
    ("The correct option is (B).", "(B)", "phrase"),
    ("The answers are 2 and 3.", "2 and 3", "phrase"),
    ("Final Answer: The largest $n$ is 34. I hope it is correct.", "34", "phrase"),
    ("Therefore 42 is our answer.", "42", "phrase"),
    (r"Therefore $x \ge 5$ is the solution.", r"$x \ge 5$", "phrase"),
    ("答案是 42。", "42", "phrase"),
    ("✅ Final Answer: **73**", "73", "phrase"),
    ("The answer is 5! Great", "5", "phrase"),
    # a bold number at the end, and a bare one
    ("First.\nSo she has **18** eggs.", "18", "bold"),
    ("42", "42", "bare"),
    (" $-1,234.5$ ", "$-1,234.5$", "bare"),
    # think blocks
    (r"<think> \boxed{1} </think> \boxed{2}", "2", "boxed"),
    (r"reasoning \boxed{1} </think> \boxed{2}", "2", "boxed"),
    (r"<think>a</think> The answer is 2. <think>b</think>", "2", "phrase"),
    (r"<thinking>\boxed{1}</thinking>\boxed{2}", "2", "boxed"),
    (r"<think>a <think>b</think> \boxed{1} </think> \boxed{2}", "2", "boxed"),
]  # fmt: skip

SILENT = [
    "",
    " \n ",
    "plain text, no box",
    "3 * 4 = 13",
    "I don't know.",
    r"start \boxed{never closes",
    r"The answer is \boxed{42",
    "The answer is",
    r"\boxed{}",
    r"<think> The answer is \boxed{42} </think>",
    r"<think> The answer is \boxed{42}",
    r"\boxed{41} <think> or is it \boxed{42}",
    "<think> unfinished",
    "so we compute 6 * 7 = 42 and then",
    "\\(42" + " " * 198 + "is not the answer",
    "**1** and **2** are not it",
    "```python\nanswer = 42\nprint(answer)\n```",
    "```python\n#### 42\n",
]


@pytest.mark.parametrize(("text", "answer", "rule"), STATED)
def test_what_is_stated_is_found(text: str, answer: str, rule: str) -> None:
    found = extract(text)
    assert (found.answer, found.rule) == (answer, rule)


@pytest.mark.parametrize("text", SILENT)
def test_what_is_not_stated_is_not_found(text: str) -> None:
    found = extract(text)
    assert (found.answer, found.rule) == (None, "none")


@pytest.mark.parametrize("hedge", ["5 or 6", "either 5 or 6", "5, but it could be 6", "not 5", "5 but I'm not sure"])
def test_a_hedge_stays_in_the_answer(hedge: str) -> None:
    answer = extract(f"The answer is {hedge}.").answer
    assert answer is not None
    assert answer != "5"


def test_the_whole_completion_is_searched() -> None:
    assert extract(r"\boxed{42}" + " and so on" * 50_000).answer == "42"

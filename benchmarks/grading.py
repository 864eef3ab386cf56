"""Our grader beside Math-Verify, in one run: accuracy, false accepts, time per answer, answers per second.

    python benchmarks/grading.py --data DATA [--count 10000]

DATA is the folder with `grader_dev/cases.jsonl` (labelled cases) and `gsm8k/test.jsonl` (for the rate), as POSTTRAIN_DATA names it.
False accepts are counted, and as a share of the wrong answers. Math-Verify is given what it likes best: golds and
answers in a box, completions as they are.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.math import equal, grade

Case = dict[str, Any]
Judge = Callable[[Case], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("POSTTRAIN_DATA"), help="folder of data sets")
    parser.add_argument("--count", type=int, default=10_000, help="GSM8K-sized gradings for the rate")
    args = parser.parse_args()
    try:
        cases = read(args.data, "grader_dev/cases.jsonl")
        problems = read(args.data, "gsm8k/test.jsonl")
    except UserError as error:
        sys.exit(f"grading: error: {error}")
    judges = {"posttrain": ours, f"Math-Verify {version('math-verify')}": peers()}
    print(f"{len(cases)} labelled cases, {sum(not case['equal'] for case in cases)} of them wrong answers\n")
    print(
        f"{'':18} {'right':>7} {'false accepts':>15} {'false rejects':>14} {'median ms':>10} {'p99 ms':>9} {'max ms':>9}"
    )
    for name, judge in judges.items():
        judge(cases[0])  # imports are not grading
        print(f"{name:18} {measured(cases, judge)}")
    rows = gsm8k_sized(problems, args.count)
    print(f"\n{len(rows)} GSM8K-sized gradings")
    rates = {
        "posttrain": rate(rows, grade_all),
        f"Math-Verify {version('math-verify')}": rate(rows, each(peers())),
    }
    for name, (count, seconds) in rates.items():
        print(f"{name:18} {count / seconds:10,.0f} per second ({count} in {seconds:.2f} s)")
    (our_count, our_seconds), (peer_count, peer_seconds) = rates.values()
    print(f"ratio of rates     {our_count / our_seconds / (peer_count / peer_seconds):10,.0f}")


def read(folder: Path | str | None, name: str) -> list[Case]:
    if folder is None or not (path := Path(folder) / name).is_file():
        raise UserError(f"--data: {folder} has no {name}; name the folder of data sets")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ours(case: Case) -> bool:
    if case["kind"] == "pair":
        return equal(gold=case["gold"], pred=case["pred"]) == "equal"
    return grade(completions=[case["completion"]], golds=[case["gold"]])[0].correct


def peers() -> Judge:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # it logs every timeout

    def judge(case: Case) -> bool:
        text = f"\\boxed{{{case['pred']}}}" if case["kind"] == "pair" else case["completion"]
        return bool(verify(parse(f"\\boxed{{{case['gold']}}}"), parse(text)))

    return judge


def measured(cases: list[Case], judge: Judge) -> str:
    wrong = {True: 0, False: 0}
    milliseconds = []
    for case in cases:
        start = time.perf_counter()
        said = judge(case)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        wrong[said] += said != case["equal"]
    right = 1 - (wrong[True] + wrong[False]) / len(cases)
    p99 = sorted(milliseconds)[int(0.99 * len(cases))]
    median = statistics.median(milliseconds)
    accepts = f"{wrong[True]} ({wrong[True] / sum(not case['equal'] for case in cases):.1%})"
    return f"{right:7.1%} {accepts:>15} {wrong[False]:14} {median:10.3f} {p99:9.2f} {max(milliseconds):9.1f}"


def gsm8k_sized(problems: list[Case], count: int) -> list[Case]:
    """Reference solutions, every other one with a wrong answer."""
    rows = []
    for i in range(count):
        problem = problems[i % len(problems)]
        answer = problem["answer"] if i % 2 else str(int(problem["answer"]) + 1)
        completion = f"{problem['solution']}\nThe answer is \\boxed{{{answer}}}."
        rows.append({"kind": "completion", "completion": completion, "gold": problem["answer"]})
    return rows


def grade_all(rows: list[Case]) -> None:
    grade(completions=[row["completion"] for row in rows], golds=[row["gold"] for row in rows])


def each(judge: Judge) -> Callable[[list[Case]], None]:
    def run(rows: list[Case]) -> None:
        for row in rows:
            judge(row)

    return run


def rate(rows: list[Case], run: Callable[[list[Case]], None]) -> tuple[int, float]:
    start = time.perf_counter()
    run(rows)
    return len(rows), time.perf_counter() - start


if __name__ == "__main__":
    main()

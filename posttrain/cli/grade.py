"""Is this answer right? Prints the verdict; with --explain, the path that led to it.

PRED is a completion (`... so \\boxed{42}.`) or the answer itself (`42`). Verdicts: equal, different, no_answer,
timeout, error.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gold", metavar="GOLD", help="the right answer")
    parser.add_argument("pred", metavar="PRED", help="a completion or an answer; - reads it from standard input")
    parser.add_argument(
        "--explain", action="store_true", help="extraction rule, normal forms, and the step that decided"
    )


def run(args: argparse.Namespace) -> None:
    from posttrain.errors import UserError
    from posttrain.rewards.explain import grade_text
    from posttrain.rewards.math import readable

    grade, lines = grade_text(args.gold, sys.stdin.read() if args.pred == "-" else args.pred)
    if args.explain:
        print("\n".join(lines))
    if grade.verdict == "different" and not readable(args.gold):
        raise UserError(f"gold: {args.gold[:80]!r} cannot be read; it equals nothing but its own spelling")
    print(f"verdict     {grade.verdict}" if args.explain else grade.verdict)

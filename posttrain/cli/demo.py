"""The whole path on the embedded model: sample, grade, learn, re-rank, measure, report."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="the run's folder; what is finished there is kept"
    )
    parser.add_argument("--seed", type=int, default=0, help="of problems, completions and training")
    parser.add_argument("--fast", action="store_true", help="fewer problems and steps, in a third of the time")


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_arms
    from posttrain.pipelines.demo import demo

    result = demo(args.out, args.seed, fast=args.fast)
    print_arms(result.arms.values())
    print(f"report: {args.out / 'report.html'}\nnumbers: {args.out / 'summary.json'}")

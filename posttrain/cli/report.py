"""One page over any runs: what became of each, training curves, accuracy against KL and tokens, paired tests, completions.

    posttrain report runs/demo
    posttrain report runs/dqo/arithmetic runs/qsharp/arithmetic --out runs/both

Arms are compared where they were measured on the same problems. A run that is still at work may be looked at, too.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of any command's run")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder of report.html and report.md; default: report"
    )


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_table
    from posttrain.evaluation.runs_report import write_runs_report

    for found in write_runs_report(args.runs, args.out):
        print(f"{found.title}, {found.problems} problems:")
        print_table(*found.arms)
    print(f"report: {args.out / 'report.html'} (also .md)")

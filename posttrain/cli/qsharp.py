"""Q#: learn the law of the return under a frozen model, guide every token by it, and measure what that buys.

Collects completions, trains a value model on how they ended, repeats with guided roll-ins, and measures guided decoding
beside the model itself, its votes and controlled decoding. Interrupted, the same command goes on where it stopped; --stage
runs one stage alone. Every field of the configuration: posttrain.pipelines.qsharp and posttrain.pipelines.value_training.
"""

import argparse
from pathlib import Path

from posttrain.cli.engines import add_engine_arguments, engine_fields
from posttrain.record import REPORT_TO, begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file such as recipes/qsharp/arithmetic.yaml")
    parser.add_argument("--out", help="the run's folder, instead of the configuration's")
    parser.add_argument("--model", help="instead of the configuration's")
    parser.add_argument("--report-to", nargs="+", metavar="NAME", help=REPORT_TO)
    add_engine_arguments(parser)
    parser.add_argument("--stage", choices=("collect", "train", "evaluate"), help="this stage only")
    parser.add_argument("--round", type=int, help="collect and train: this round only")


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_arms, print_differences
    from posttrain.config import build, read_yaml
    from posttrain.errors import UserError
    from posttrain.pipelines import qsharp

    if args.round is not None and args.stage not in ("collect", "train"):
        raise UserError("round: it goes with --stage collect or --stage train")
    given = {"out": args.out, "model": args.model, **engine_fields(args)}
    overrides = {name: value for name, value in given.items() if value is not None}
    config = build(qsharp.QSharpConfig, {**read_yaml(args.config), **overrides})
    begin(config.out, config, args.report_to)
    result = qsharp.run(config, args.stage, args.round)
    if result is None:
        return
    lead = f"Every token is tilted by what {config.rounds} rounds of completions taught a value model ({config.value.head})."
    qsharp.publish(result, f"Q#: {config.model} on {config.data}", lead)
    print_arms(result.arms.values())
    print_differences(qsharp.comparisons({name: arm.per_problem for name, arm in result.arms.items()}))
    guide = qsharp.guide_folder(Path(config.out), config.history, config.rounds)
    print(f"report: {config.out}/report.html\nguide: {guide}")

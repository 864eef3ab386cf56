"""DQO: train a policy by soft actor-critic over tokens, offline, on its own graded completions, and measure it.

Collects completions, trains policy and value model together, and measures the policy before and after. Interrupted, the same
command goes on where it stopped. Every field of the configuration: posttrain.pipelines.dqo.
"""

import argparse

from posttrain.cli.engines import add_engine_arguments, engine_fields
from posttrain.record import REPORT_TO, begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file such as recipes/dqo/arithmetic.yaml")
    parser.add_argument("--out", help="the run's folder, instead of the configuration's")
    parser.add_argument("--model", help="instead of the configuration's")
    parser.add_argument("--report-to", nargs="+", metavar="NAME", help=REPORT_TO)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_arms
    from posttrain.config import build, read_yaml
    from posttrain.pipelines import dqo

    given = {"out": args.out, "model": args.model, **engine_fields(args)}
    overrides = {name: value for name, value in given.items() if value is not None}
    config = build(dqo.DQORunConfig, {**read_yaml(args.config), **overrides})
    begin(config.out, config, args.report_to)
    result = dqo.run(config)
    if result is None:  # one of several processes, and not the first
        return
    dqo.publish(result, f"DQO: {config.model} on {config.data}", dqo.lead(config))
    print_arms(result.arms.values())
    print(f"report: {config.out}/report.html\npolicy: {config.out}/policy")

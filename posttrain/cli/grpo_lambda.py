"""GRPO-lambda: train a policy online, with a length penalty where it is right often enough, and measure it.

Measures the policy, trains it on its own graded completions, and measures it again, for every arm of the configuration.
Interrupted, the same command goes on where it stopped. Every field of the configuration: posttrain.pipelines.grpo_lambda.
"""

import argparse

from posttrain.cli.engines import add_engine_arguments, engine_fields
from posttrain.record import REPORT_TO, begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file such as recipes/grpo_lambda/arithmetic.yaml")
    parser.add_argument("--out", help="the run's folder, instead of the configuration's")
    parser.add_argument("--model", help="instead of the configuration's")
    parser.add_argument("--report-to", nargs="+", metavar="NAME", help=REPORT_TO)
    parser.add_argument("--seed", type=int, help="instead of the configuration's")
    add_engine_arguments(parser, ("transformers", "service"))


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_arms
    from posttrain.config import build, read_yaml
    from posttrain.pipelines import grpo_lambda

    given = {"out": args.out, "model": args.model, "seed": args.seed, **engine_fields(args)}
    overrides = {name: value for name, value in given.items() if value is not None}
    config = build(grpo_lambda.GRPOLambdaRunConfig, {**read_yaml(args.config), **overrides})
    begin(config.out, config, args.report_to)
    result = grpo_lambda.run(config)
    if result is None:  # one of several processes, and not the first
        return
    grpo_lambda.publish(
        result,
        f"GRPO-lambda: {config.model} on {config.data}",
        f"Trained online for {config.training.steps} steps of {config.training.prompts_per_step} prompts.",
    )
    print_arms(result.arms.values())
    print(f"report: {config.out}/report.html\npolicy: {config.out}/{config.arms[-1]}")

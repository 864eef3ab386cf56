"""Train a Q-Probe on a model's own samples and measure its re-ranking.

Samples both splits (or continues), fits the probe on the training prompts, re-ranks k samples of each test prompt, and writes
the probe, summary.json and report.html into the run's folder. Every field of the configuration: posttrain.pipelines.qprobe.
"""

import argparse

from posttrain.cli.engines import add_engine_arguments, engine_fields
from posttrain.record import begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML file such as recipes/qprobe/gsm8k.yaml")
    parser.add_argument("--out", help="the run's folder, instead of the configuration's")
    parser.add_argument("--model", help="instead of the configuration's")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_arms
    from posttrain.config import build, read_yaml
    from posttrain.pipelines import qprobe

    given = {"out": args.out, "model": args.model, **engine_fields(args)}
    overrides = {name: value for name, value in given.items() if value is not None}
    config = build(qprobe.QProbeConfig, {**read_yaml(args.config), **overrides})
    begin(config.out, config)
    result = qprobe.run(config)
    qprobe.publish(
        result, f"Q-Probe: {config.model} on {config.data}", f"One of {config.k} samples is chosen by a linear probe."
    )
    print_arms(result.arms.values())
    print(f"report: {config.out}/report.html\nprobe: {config.out}/probe")

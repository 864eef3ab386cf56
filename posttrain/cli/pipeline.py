"""Several methods on one base, from one file: sample, train, measure, and compare them in one table and one report.

posttrain pipeline FILE

FILE is one of `posttrain recipe list`, such as pipeline/demo, or your own. Its stages are the methods' commands; each is skipped
where nothing that it depends on has changed. Interrupted, the same command goes on where it stopped. Every field:
posttrain.pipelines.pipeline.
"""

import argparse

from posttrain.record import REPORT_TO, begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a YAML file, or a pipeline of posttrain recipe list")
    parser.add_argument("--out", help="the run's folder, instead of the file's")
    parser.add_argument("--model", help="the base, instead of the file's")
    parser.add_argument("--seed", type=int, help="instead of the file's")
    parser.add_argument("--report-to", nargs="+", metavar="NAME", help=REPORT_TO)


def run(args: argparse.Namespace) -> None:
    from posttrain.cli.tables import print_arms
    from posttrain.config import build, read_yaml
    from posttrain.pipelines import pipeline
    from posttrain.pipelines.recipe import check, find

    given = {"out": args.out, "model": args.model, "seed": args.seed}
    overrides = {name: value for name, value in given.items() if value is not None}
    config = build(pipeline.PipelineConfig, {**read_yaml(find(args.file)), **overrides})
    check("pipeline", config)
    begin(config.out, config, args.report_to)
    result = pipeline.run(config)
    pipeline.publish(result)
    print_arms(result.arms.values())
    print(f"report: {config.out}/report.html\nnumbers: {config.out}/summary.json")

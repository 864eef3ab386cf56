"""--engine and --url of the commands that a configuration tells the rest."""

import argparse

ENGINES = ("transformers", "vllm", "service", "ray")


def add_engine_arguments(parser: argparse.ArgumentParser, engines: tuple[str, ...] = ENGINES) -> None:
    parser.add_argument("--engine", choices=engines, help="what samples, instead of the configuration's")
    parser.add_argument(
        "--url",
        dest="urls",
        metavar="URL",
        nargs="+",
        help="of --engine service: where posttrain rollout-service runs, once or often",
    )

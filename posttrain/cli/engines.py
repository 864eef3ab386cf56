"""--engine and --url of the commands that a configuration tells the rest."""

import argparse
from typing import Any

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


def engine_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What they put in the place of the configuration's, None for nothing; an engine that is no service has no addresses."""
    elsewhere = args.engine not in (None, "service") and args.urls is None
    return {"engine": args.engine, "urls": () if elsewhere else args.urls}

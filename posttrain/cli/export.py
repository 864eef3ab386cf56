"""One folder to publish: a run's policy with adapters merged, its value model and probe beside it, and a card.

    posttrain export runs/qsharp/arithmetic --out published
    posttrain export runs/qprobe/arithmetic runs/qsharp/arithmetic --out published

RUN is a run of qsharp, qprobe, dqo, grpo-lambda or pipeline, or a folder that holds a policy, a LoRA adapter, a value model or
a probe; several are put together, if they are for one policy. `posttrain.load_guided(DIR)` loads the result with guidance on.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="RUN", help="a run's folder, or one of its parts")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; new or empty")


def run(args: argparse.Namespace) -> None:
    from posttrain.pipelines.export import export

    for name in export(args.sources, args.out):
        print(args.out / name)

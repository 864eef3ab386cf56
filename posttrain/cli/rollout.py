"""sample completions of a model, grade them, store them as a rollout table

    posttrain rollout --model tiny --data arithmetic --samples 8 --limit 200 --out runs/rollout

Interrupted, the same command with --resume continues where it stopped; the table is the same, byte for byte.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cli.engines import ENGINES
from posttrain.record import begin

if TYPE_CHECKING:
    from posttrain.rollouts.table import RolloutTable

OF_THE_ENGINE = ("engine", "url", "guide", "candidates", "lazy", "any_reference", "dtype", "device", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="tiny, a folder, a .gguf file or a hub id")
    parser.add_argument(
        "--data",
        required=True,
        help="arithmetic, a .jsonl or .parquet file, a folder under POSTTRAIN_DATA, or a hub id",
    )
    parser.add_argument("--samples", type=int, required=True, help="completions per prompt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table; new or empty, unless --resume")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--max-tokens", type=int, default=256, help="per completion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", metavar="TEMPLATE", help="the user turn, with {problem} in it")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    parser.add_argument("--slots", type=int, default=64, help="completions sampled at the same time")
    parser.add_argument(
        "--shard-prompts",
        type=int,
        help="prompts per shard, the unit that --resume redoes; default: 256 completions' worth",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what samples")
    parser.add_argument(
        "--url", nargs="+", help="of --engine service: where posttrain rollout-service runs, once or often"
    )
    parser.add_argument("--guide", metavar="DIR", help="a value model of posttrain qsharp, which tilts every token")
    parser.add_argument("--beta", type=float, help="KL coefficient of the guide, in units of the reward; default 0.1")
    parser.add_argument("--candidates", type=int, help="most likely tokens that the guide values; default 20")
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="of a V-type guide: value only the candidates that could be drawn; the same law, whose KL is then not known",
    )
    parser.add_argument(
        "--any-reference", action="store_true", help="use a guide that was trained for another policy all the same"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted collection")


def run(args: argparse.Namespace) -> None:
    import torch

    from posttrain.decoding.guidance import Guidance
    from posttrain.decoding.guide import load_guide
    from posttrain.decoding.vllm import load_vllm_guide
    from posttrain.errors import UserError
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.pipelines.engines import Sampler
    from posttrain.pipelines.rollout import RolloutConfig, rollout
    from posttrain.provenance import plain
    from posttrain.rollouts.collect import check_folder
    from posttrain.rollouts.engine import Sampling, check_lazy
    from posttrain.rollouts.service import check_for_service
    from posttrain.rollouts.vllm import check_for_vllm

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"threads: must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_tokens, args.seed)
    for name in ("beta", "candidates", "lazy", "any_reference"):
        if not args.guide and getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: it is the guide's; name one with --guide DIR")
    guidance = Guidance(Guidance.candidates if args.candidates is None else args.candidates, lazy=args.lazy)
    if args.lazy:
        check_lazy(sampling)
    if args.engine in ("vllm", "ray"):
        check_for_vllm(args.engine, device=args.device, threads=args.threads, dtype=args.dtype)
    fixed = {name: getattr(args, name) for name in ("device", "threads", "dtype")}
    check_for_service(args.url, args.engine == "service", **fixed)
    config = RolloutConfig(
        args.data,
        args.split,
        args.limit,
        args.prompt,
        args.samples,
        sampling,
        args.slots,
        args.shard_prompts,
        beta=(0.1 if args.beta is None else args.beta) if args.guide else None,
        sampler=Sampler(args.engine, tuple(args.url or ()), args.dtype),
    )
    check_folder(args.out, args.resume)
    rows = config.rows()
    begin(args.out, {"model": args.model, **plain(config), **{name: getattr(args, name) for name in OF_THE_ENGINE}})
    own = args.engine == "transformers"
    # Takes time where the model is loaded here: after all that can be refused without it.
    policy = load_model(args.model, args.device, args.dtype) if own else load_tokenizer(args.model)
    load = load_guide if own else load_vllm_guide
    guide = load(args.guide, policy, guidance, args.any_reference) if args.guide else None
    _show(rollout(policy, config, rows, args.out, args.resume, guide=guide))


def _show(table: "RolloutTable") -> None:
    from posttrain.cli.tables import print_table
    from posttrain.pipelines.rollout import figures_of, publish

    print_table(("figure", "value"), figures_of(table).items())
    print(f"report: {publish(table)}")

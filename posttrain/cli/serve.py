"""serve a model over HTTP, with guidance and re-ranking, to OpenAI's clients

    posttrain serve --model tiny --guide runs/demo/qsharp/round-2/value --probe runs/demo/qprobe/probe

SIGTERM ends it gracefully: what has begun is finished. Extra fields of a request: `guidance: {beta, top_k, guide,
explain}` and `rerank: {k, beta, probe}`, or `guide` instead of `probe` for best-of by a guide's value model.

With --engine vllm what follows `--` are vLLM's own options:

    posttrain serve --engine vllm --model M --guide G -- --tensor-parallel-size 4
"""

import argparse
import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.serving.catalogue import Catalogue, Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="tiny, a folder, a .gguf file or a hub id")
    parser.add_argument(
        "--guide",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a value model of posttrain qsharp; repeatable",
    )
    parser.add_argument(
        "--probe", action="append", default=[], metavar="[NAME=]DIR", help="a probe of posttrain qprobe; repeatable"
    )
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="what samples")
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine's own needs a key")
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one")
    parser.add_argument(
        "--api-key", help="what clients must send; better in POSTTRAIN_API_KEY, where ps does not show it"
    )
    parser.add_argument("--candidates", type=int, default=20, help="most tokens that a guide values")
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="of V-type guides: value only the candidates that could be drawn; the same law, of which answers then tell nothing",
    )
    parser.add_argument("--max-requests", type=int, default=256, help="answered at the same time; more get a 429")
    parser.add_argument("--max-completions", type=int, default=64, help="for one request: n, or k of rerank")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request")
    parser.add_argument("--drain", type=int, default=60, help="seconds after SIGTERM for what has begun")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    parser.add_argument("--slots", type=int, default=64, help="completions sampled at the same time")
    parser.add_argument(
        "--context",
        type=int,
        help="most tokens of prompt and completion, for which every slot has room; default: the model's own",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("vllm", nargs="*", metavar="-- OPTIONS", help="vLLM's own options")


def run(args: argparse.Namespace) -> None:
    import torch

    from posttrain.errors import UserError
    from posttrain.rollouts.vllm import check_for_vllm

    try:
        from posttrain.serving.app import create_app
        from posttrain.serving.catalogue import Limits, named_folders
        from posttrain.serving.server import bind, check_open, serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'posttrain[serve]'") from None

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"threads: must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.drain < 0:
        raise UserError(f"drain: must not be negative, got {args.drain}")
    for name in ("slots", "context"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(args, name)}")
    key = os.environ.get("POSTTRAIN_API_KEY") if args.api_key is None else args.api_key
    check_open(args.host, key)
    limits = Limits(args.max_requests, args.max_completions, args.max_body)
    guides, probes = named_folders("guide", args.guide), named_folders("probe", args.probe)
    if args.lazy and not guides:
        raise UserError("--lazy: it is the guide's; name one with --guide DIR")
    if args.engine == "vllm":
        check_for_vllm(device=args.device, threads=args.threads, dtype=args.dtype)
        if len(guides) > 1:
            raise UserError(
                f"guide: one with --engine vllm, where it and the policy are one model, got {', '.join(guides)}; start a "
                "server for each, or use --engine transformers"
            )
    elif args.vllm:
        raise UserError(f"{args.vllm[0]}: is vLLM's; add --engine vllm")
    load = _vllm if args.engine == "vllm" else _transformers
    with bind(args.host, args.port) as bound, ExitStack() as stack:
        catalogue = load(args, guides, probes, limits, stack)
        guiding = [f"{name} (lazy)" if args.lazy else name for name in guides]
        print(f"model {catalogue.name}, guides: {', '.join(guiding) or 'none'}, probes: {', '.join(probes) or 'none'}")
        serve(create_app(catalogue, key), bound, args.drain, lambda text: print(text, flush=True))


def _transformers(
    args: argparse.Namespace, guides: dict[str, str], probes: dict[str, str], limits: "Limits", _: ExitStack
) -> "Catalogue":
    from posttrain.decoding.guidance import Guidance
    from posttrain.models.load import load_model
    from posttrain.serving.catalogue import Catalogue

    guidance = Guidance(args.candidates, lazy=args.lazy)
    policy = load_model(args.model, args.device, args.dtype)
    _check_context(args, policy.context)
    catalogue = Catalogue.load(policy, guides, probes, guidance, args.slots, limits)
    catalogue.engine.context = min(catalogue.engine.context, args.context or policy.context)
    return catalogue


def _vllm(
    args: argparse.Namespace, guides: dict[str, str], probes: dict[str, str], limits: "Limits", stack: ExitStack
) -> "Catalogue":
    """What can be refused is, before vLLM starts. stack: what is to be closed when the server has ended."""
    import torch

    from posttrain.decoding.guidance import Guidance
    from posttrain.decoding.rerank import Reranker
    from posttrain.decoding.vllm import load_vllm_guide
    from posttrain.models.load import load_model, load_tokenizer, model_folder
    from posttrain.models.probe import Probe
    from posttrain.rollouts.vllm import VLLMEngine
    from posttrain.serving.catalogue import Catalogue

    policy, guidance = load_tokenizer(args.model), Guidance(args.candidates, lazy=args.lazy)
    _check_context(args, policy.context)
    served = {name: load_vllm_guide(folder, policy, guidance) for name, folder in guides.items()}
    heads = {name: Probe.from_pretrained(folder, policy.fingerprint) for name, folder in probes.items()}
    # In a process of its own, as in vLLM's own server: this one is busy with its clients. Spawned, it ends with this one.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    signal.signal(signal.SIGTERM, _interrupt)  # or that process would outlive this one
    engine = stack.enter_context(
        VLLMEngine(
            model_folder(args.model),
            slots=args.slots,
            dtype=args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
            guide=next(iter(served.values()), None),
            options=[*((f"--max-model-len={args.context}",) if args.context else ()), *args.vllm],
        )
    )
    if heads:  # vLLM shows no hidden states: a second copy of the policy reads them
        policy = load_model(args.model, args.device, args.dtype)
    rerankers = {name: Reranker(policy, probe.to(policy.model.device)) for name, probe in heads.items()}
    return Catalogue(policy, served, rerankers, args.slots, limits, engine)


def _check_context(args: argparse.Namespace, most: int) -> None:
    from posttrain.errors import UserError

    if args.context and args.context > most:
        raise UserError(f"context: {args.model} has {most} tokens, got {args.context}")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt

"""serve a policy to rollouts: vLLM's own server, which says what it serves and takes new weights

    posttrain rollout-service --model M --port 8001
    posttrain rollout --model M --engine service --url http://127.0.0.1:8001 ...

Prints one line when it is ready; SIGTERM ends it. With --guide, requests that say a beta are guided by a value model.
What follows `--` are vLLM's own options:

    posttrain rollout-service --model M -- --tensor-parallel-size 4
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.decoding.vllm import VLLMGuide
    from posttrain.models.load import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="tiny, a folder, a .gguf file or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine's own needs a key")
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one")
    parser.add_argument(
        "--api-key", help="what clients must send; better in POSTTRAIN_API_KEY, where ps does not show it"
    )
    parser.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 on a GPU, else float32")
    parser.add_argument("--slots", type=int, default=64, help="completions sampled at the same time")
    parser.add_argument("--context", type=int, help="most tokens of prompt and completion; default: the model's own")
    parser.add_argument("--guide", metavar="DIR", help="a value model of posttrain qsharp, for requests with a beta")
    parser.add_argument("--guidance", metavar="JSON", help='the guide\'s settings, such as {"candidates": 20}')
    parser.add_argument(
        "--any-reference", action="store_true", help="use a guide that was trained for another policy all the same"
    )
    parser.add_argument("vllm", nargs="*", metavar="-- OPTIONS", help="vLLM's own options")


def run(args: argparse.Namespace) -> None:
    import torch

    from posttrain.decoding.vllm import compose
    from posttrain.errors import UserError
    from posttrain.models.load import load_tokenizer, model_folder
    from posttrain.rollouts.vllm import check_for_vllm

    try:
        from posttrain.serving.rollout_service import options, prepare_environment, serve
        from posttrain.serving.server import bind, check_open

        prepare_environment()
        import vllm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"rollout-service: {error.name} cannot be imported; pip install 'posttrain[vllm,serve]'"
        ) from None

    for name in ("slots", "context"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}")
    check_for_vllm(dtype=args.dtype)
    key = os.environ.get("POSTTRAIN_API_KEY") if args.api_key is None else args.api_key
    check_open(args.host, key)
    policy = load_tokenizer(args.model)
    if args.context and args.context > policy.context:
        raise UserError(f"context: {args.model} has {policy.context} tokens, got {args.context}")
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    folder, guide, context = model_folder(args.model), _guide(args, policy), args.context
    if guide and guide.context is not None:
        context = min(guide.context, context or policy.context)
    with tempfile.TemporaryDirectory(prefix="posttrain-") as scratch, bind(args.host, args.port) as bound:
        if guide:
            compose(folder, guide, Path(scratch, "guided"))
        settings = options(
            Path(scratch, "guided") if guide else folder,
            name=args.model,
            dtype=dtype,
            slots=args.slots,
            context=context,
            key=key,
            guided=guide is not None,
            more=args.vllm,
        )
        port = bound.getsockname()[1]
        wanted = serve(settings, policy, bound, lambda text: print(text, flush=True), guide)
    if wanted:  # a process of its own: what vLLM held, on GPUs too, is free
        os.execv(sys.executable, [sys.executable, "-m", "posttrain", *_again(args, port, wanted)])


def _guide(args: argparse.Namespace, policy: "Policy") -> "VLLMGuide | None":
    from posttrain.config import build
    from posttrain.decoding.guidance import Guidance
    from posttrain.decoding.vllm import load_vllm_guide
    from posttrain.errors import UserError

    if not args.guide:
        for name in ("guidance", "any_reference"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')}: it is the guide's; name one with --guide DIR")
        return None
    try:
        guidance = build(Guidance, dict(json.loads(args.guidance or "{}")))
    except (ValueError, TypeError):
        raise UserError(f"--guidance: must be a JSON object, got {args.guidance!r}") from None
    return load_vllm_guide(args.guide, policy, guidance, args.any_reference)


def _again(args: argparse.Namespace, port: int, guide: "VLLMGuide") -> list[str]:
    """This command's words, with another guide."""
    words = ["rollout-service", "--model", args.model, "--host", args.host, "--port", str(port)]
    words += [
        "--slots",
        str(args.slots),
        "--guide",
        str(guide.folder),
        "--guidance",
        json.dumps(asdict(guide.guidance)),
    ]
    for name, value in (("--api-key", args.api_key), ("--dtype", args.dtype), ("--context", args.context)):
        words += [] if value is None else [name, str(value)]
    return [*words, "--", *args.vllm]

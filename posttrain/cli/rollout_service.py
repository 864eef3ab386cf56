"""serve a policy to rollouts: vLLM's own server, which says what it serves and takes new weights

    posttrain rollout-service --model M --port 8001
    posttrain rollout --model M --engine service --url http://127.0.0.1:8001 ...

Prints one line when it is ready; SIGTERM ends it. What follows `--` are vLLM's own options:

    posttrain rollout-service --model M -- --tensor-parallel-size 4
"""

import argparse
import os


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
    parser.add_argument("vllm", nargs="*", metavar="-- OPTIONS", help="vLLM's own options")


def run(args: argparse.Namespace) -> None:
    import torch

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
    check_for_vllm(device=None, threads=None, dtype=args.dtype)
    key = os.environ.get("POSTTRAIN_API_KEY") if args.api_key is None else args.api_key
    check_open(args.host, key)
    policy = load_tokenizer(args.model)
    if args.context and args.context > policy.context:
        raise UserError(f"context: {args.model} has {policy.context} tokens, got {args.context}")
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    folder = model_folder(args.model)
    with bind(args.host, args.port) as bound:
        settings = options(
            folder, name=args.model, dtype=dtype, slots=args.slots, context=args.context, key=key, more=args.vllm
        )
        serve(settings, folder, bound, lambda text: print(text, flush=True))

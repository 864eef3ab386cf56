"""Star graphs: pre-trains a model that can only guess the first node, then lets Q# guide it there. Meant for a GPU.

    python -m recipes.star_graph.run [--degree 5 --length 5] [--base FOLDER] [--smoke]

Three stages: next-token pre-training on the paths (the reference), roll-outs of it on new graphs and a V-type value model
fitted to their outcomes, and the accuracy of the reference, Q# and CD on test graphs.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from posttrain.cli.tables import print_table
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import ValueGuide
from posttrain.evaluation.intervals import mean_interval
from posttrain.models.load import model_fingerprint
from posttrain.models.value import ValueModel, ValueModelConfig
from posttrain.provenance import write_json
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.trainers.value import ValueConfig, ValueTrainer
from posttrain.trainers.value_examples import Example
from recipes.star_graph.graphs import StarGraph, check_sizes, stream, vocabulary

SMOKE = {
    "length": 3, "nodes": 8, "width": 64, "layers": 2, "steps": 300, "batch_size": 64, "lr": 4e-3, "pool": 5000,
    "graphs": 100, "samples": 2, "epochs": 1, "test": 50,
}  # fmt: skip


def new_model(args: argparse.Namespace) -> Any:
    """A small Llama, or the model of a folder with our tokens instead of its own."""
    if args.base:
        model = AutoModelForCausalLM.from_pretrained(args.base, use_safetensors=True, trust_remote_code=False)
        model.resize_token_embeddings(vocabulary(args.nodes))
        return model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary(args.nodes),
            hidden_size=args.width,
            intermediate_size=4 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.width // 32),
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def pretrain(model: Any, graphs: Sequence[StarGraph], args: argparse.Namespace) -> None:
    """Next-token loss on the paths alone, over the graphs again and again."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.999), weight_decay=0.1)
    warm_up = max(1, min(100, args.steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps - warm_up), args.lr / 10),
        ],
        [warm_up],
    )
    endless = itertools.cycle(graphs)
    model.train()
    progress = tqdm(range(args.steps), desc="pre-training", mininterval=5)
    for _ in progress:
        batch = list(itertools.islice(endless, args.batch_size))
        ids = torch.tensor([graph.prompt_ids + graph.path for graph in batch], device=model.device)
        labels = ids.clone()
        labels[:, : len(batch[0].prompt_ids)] = -100
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


def sample(
    model: Any, graphs: Sequence[StarGraph], samples: int, args: argparse.Namespace, guide: Any = None
) -> list[tuple[StarGraph, tuple[int, ...], float]]:
    """(graph, path, KL to the reference) of every sample, at temperature 1, graph by graph."""
    engine = TransformersEngine(model, fingerprint="star graph", slots=args.slots, eos_ids=(), guide=guide)
    requests = [
        Request(
            number,
            graph.prompt_ids,
            Sampling(max_tokens=args.length, seed=args.seed + number),
            args.beta if guide else None,
        )
        for number, graph in enumerate(graph for graph in graphs for _ in range(samples))
    ]
    done = {completion.request_id: completion for completion in engine.generate(requests)}
    return [(graphs[number // samples], done[number].ids, done[number].kl) for number in range(len(requests))]


def train_value(model: Any, reference: str, graphs: Sequence[StarGraph], args: argparse.Namespace) -> ValueModel:
    """A value model of its own weights, fitted to outcomes of the reference. The paper starts it from pretrained GPT-2."""
    decoder = new_model(args).get_decoder()
    value = ValueModel(
        ValueModelConfig(
            backbone=decoder.config,
            head="v",
            hidden_size=decoder.config.hidden_size,
            embedding_size=decoder.get_input_embeddings().embedding_dim,
            vocab_size=decoder.config.vocab_size,
            reference=reference,
        )
    )
    value.backbone.load_state_dict(decoder.state_dict())
    examples = [
        Example(
            input_ids=[*graph.prompt_ids, *ids],
            first=len(graph.prompt_ids),
            return_=graph.reward(ids),
            prompt_id=str(graph.prompt_ids),
        )
        for graph, ids, _ in sample(model, graphs, args.samples, args)
    ]
    config = ValueConfig(
        output_dir=str(args.out / "checkpoints"),
        learning_rate=args.value_lr,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=args.seed,
        save_strategy="no",
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        disable_tqdm=True,
    )
    trainer = ValueTrainer(value, config, examples)
    trainer.train()
    trainer.save(args.out / "value")
    return value.to(model.device).eval().requires_grad_(False)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, its interval and the mean KL of each arm; also written to `result.json`."""
    check_sizes(args.degree, args.length, args.nodes)
    torch.manual_seed(args.seed)

    def graphs(split: str, count: int) -> list[StarGraph]:
        return list(itertools.islice(stream(args.seed, split, args.degree, args.length, args.nodes), count))

    model = new_model(args).to(args.device)
    pretrain(model, graphs("pre-training", args.pool), args)
    model.save_pretrained(args.out / "reference")
    reference = model_fingerprint(args.out / "reference")
    value = train_value(model, reference, graphs("post-training", args.graphs), args)
    test = graphs("test", args.test)
    arms: dict[str, Any] = {"reference": None}
    for law in ("qsharp", "cd"):
        arms[law] = ValueGuide(value, model, "star graph", Guidance(candidates=10, delta=0, law=law))
    result: dict[str, Any] = {}
    for name, guide in arms.items():
        rows = sample(model, test, 1, args, guide)
        rewards = np.array([graph.reward(ids) for graph, ids, _ in rows])
        low, high = mean_interval(rewards)
        kl = float(np.mean([kl for *_, kl in rows]))
        result[name] = {"accuracy": float(rewards.mean()), "low": low, "high": high, "kl": kl}
    write_json(args.out / "result.json", {"guess": 1 / args.degree, **result})
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--length", type=int, default=5, help="nodes of a path, the centre among them")
    parser.add_argument("--nodes", type=int, default=50, help="names that nodes are drawn from")
    parser.add_argument("--base", help="a folder whose model both models start from, e.g. GPT-2; default: from scratch")
    parser.add_argument("--width", type=int, default=384, help="of a model from scratch")
    parser.add_argument("--layers", type=int, default=6, help="of a model from scratch")
    parser.add_argument("--pool", type=int, default=200_000, help="graphs of pre-training")
    parser.add_argument("--steps", type=int, default=8000, help="of pre-training")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2.5e-4, help="of pre-training")
    parser.add_argument("--graphs", type=int, default=100_000, help="that the value model learns from")
    parser.add_argument("--samples", type=int, default=4, help="roll-outs of each of them")
    parser.add_argument("--epochs", type=float, default=5, help="of the value model")
    parser.add_argument("--value-lr", type=float, default=1e-4)
    parser.add_argument("--test", type=int, default=2000, help="graphs that accuracy is measured on")
    parser.add_argument("--beta", type=float, default=0.1, help="KL coefficient")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/star_graph"))
    parser.add_argument("--smoke", action="store_true", help="sizes that a CPU goes through in under a minute")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    result = run(args)
    print_table(
        ("arm", "accuracy", "95 % interval", "KL, nats"),
        [
            (
                name,
                f"{100 * row['accuracy']:.1f} %",
                f"{100 * row['low']:.1f} - {100 * row['high']:.1f}",
                f"{row['kl']:.3f}",
            )
            for name, row in result.items()
        ],
    )


if __name__ == "__main__":
    main()

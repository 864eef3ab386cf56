"""What a step of DQO costs: time and peak memory beside TRL's SFTTrainer and DPOTrainer, on the same tokens and the same model.

    python -m benchmarks.dqo_step [--vocab 1000 150000] [--hidden 256] [--layers 8] [--rows 4] [--time 128] [--repeats 3]
        [--parts times peaks growth]

A random Llama (on a GPU, by default, one of half a billion parameters) learns from rows of `time` tokens, a quarter of them
prompt; DPO gets the same rows as pairs, and runs its reference too. Arms are interleaved; a ratio is the median over repeats,
with its range, to SFT of the same kind (full, or LoRA of rank 16).

`bound` is what the ratio would be if only products with weights counted: a forward costs b in the body and h in the head (of
completions' tokens), a backward as much again for the states and for weights that learn; so full SFT costs 3 (b + h), LoRA
2 (b + h), and a critic, which has no head, 3 b, or 2 b with adapters; the layers below the last ones that learn, b alone. Memory
is the peak of a process of its own, beyond what it held before the model was made.
"""

import argparse
import copy
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback

from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.trainers.baselines import IGNORED
from posttrain.trainers.dqo import DQOConfig, DQOTrainer, labelled

WIDTH = 120
WARM_UP = 1  # a trainer's first step makes the optimizer's state
RANK = 16
PARTS = ("times", "peaks", "growth")
ARMS = (
    *("SFT", "DPO", "DQO", "DQO, LoRA critic", "DQO, critic's upper half", "DQO, no critic"),
    *("SFT, LoRA", "DPO, LoRA", "DQO, LoRA", "DQO, LoRA, critic's upper half", "DQO, LoRA, no critic"),
)


def random_llama(args: argparse.Namespace, vocab: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 64),
        max_position_embeddings=args.time,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(args.device)


def rows_of(args: argparse.Namespace, vocab: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    first = args.time // 4
    steps = WARM_UP + args.steps
    ids = torch.randint(3, vocab, (args.rows * steps, args.time), generator=generator).tolist()
    return [
        {"input_ids": row, "first": first, "reward": float(i % 2), "prompt_id": str(i)} for i, row in enumerate(ids)
    ]


class StepTimes(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = now(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(now(args.device) - self.started)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make(arm: str, args: argparse.Namespace, vocab: int, folder: Path) -> Any:
    """The arm's trainer, of a fresh model."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    model, rows = random_llama(args, vocab), rows_of(args, vocab)
    method, *how = arm.split(", ")
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear") if "LoRA" in how else None
    common = {
        "output_dir": str(folder),
        "max_steps": WARM_UP + args.steps,
        "per_device_train_batch_size": args.rows // 2 if method == "DPO" else args.rows,
        "learning_rate": 1e-4,
        "bf16": args.bf16,
        "gradient_checkpointing": False,
        "use_cpu": args.device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if method == "SFT":
        data = Dataset.from_list(
            [
                {"input_ids": row["input_ids"], "labels": [IGNORED] * row["first"] + row["input_ids"][row["first"] :]}
                for row in rows
            ]
        )
        return SFTTrainer(
            model,
            SFTConfig(**common, max_length=None),
            train_dataset=data,
            processing_class=no_text(),
            peft_config=lora,
        )
    if method == "DPO":
        first = rows[0]["first"]
        data = Dataset.from_list(
            [
                {
                    "prompt_ids": a["input_ids"][:first],
                    "chosen_ids": a["input_ids"][first:],
                    "rejected_ids": b["input_ids"][first:],
                }
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
        )
        of_ids = type("DPOTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
        reference = None if lora else copy.deepcopy(model)
        arguments = DPOConfig(**common, max_length=None)
        return of_ids(model, reference, arguments, train_dataset=data, processing_class=no_text(), peft_config=lora)
    if "no critic" in how:
        critic = new_critic(transformers.LlamaForCausalLM(bodiless(model.config)).to(args.device), "benchmark")
        value_lora = None
    else:
        value_lora = lora or (LoraConfig(r=RANK, target_modules="all-linear") if "LoRA critic" in how else None)
        critic = new_critic(model, "benchmark", shared=lora is not None)
    pair = ActorCritic(model, critic)
    unlabelled: list[Any] = [
        {**row, "process_rewards": None, "behaviour_logprobs": None, "truncated": False} for row in rows
    ]
    examples = labelled(pair, unlabelled, f"{args.hidden}-{args.layers}-{vocab}", folder / "cache")
    upper = args.layers // 2 if "critic's upper half" in how else None
    return DQOTrainer(
        pair, DQOConfig(**common, value_layers=upper), examples, peft_config=lora, value_peft_config=value_lora
    )


def bodiless(config: Any) -> Any:
    """A model without layers, of next to no size: what is left of a critic is the code around it."""
    config = copy.deepcopy(config)
    config.update({"num_hidden_layers": 0, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1})
    config.num_key_value_heads, config.head_dim = 1, 64
    return config


def no_text() -> Any:
    """A tokenizer that no one asks for anything but its padding."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def bound(arm: str, args: argparse.Namespace, model: Any) -> float:
    """Over SFT of the same kind."""
    method, *how = arm.split(", ")
    body = sum(weight.numel() for weight in model.model.layers.parameters())
    head = 0.75 * model.lm_head.weight.numel()
    lora = "LoRA" in how
    once = body + head
    sft = (2 if lora else 3) * once
    if method == "SFT":
        return 1.0
    if method == "DPO":
        return (sft + once) / sft
    learned = 1 if lora or "LoRA critic" in how else 2  # backward: of the states, and of the weights where they learn
    if "no critic" in how:
        return 1.0
    share = (args.layers // 2) / args.layers if "critic's upper half" in how else 1.0
    return (sft + body * (1 + learned * share)) / sft


def step_seconds(arm: str, args: argparse.Namespace, vocab: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = make(arm, args, vocab, Path(folder)), StepTimes()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(times)
        trainer.train()
    return statistics.median(times.seconds[WARM_UP:])


def peak(arm: str, args: argparse.Namespace, vocab: int, tokens: int | None = None) -> float:
    """MiB, in a process of its own."""
    sizes = {"hidden": args.hidden, "layers": args.layers, "rows": args.rows, "time": tokens or args.time, "steps": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "benchmarks.dqo_step", *options, f"--vocab={vocab}", f"--threads={args.threads}"]
    found = subprocess.run([*command, f"--peak={arm}"], capture_output=True, text=True, check=True).stdout
    return json.loads(found.splitlines()[-1])


def own_peak(arm: str, args: argparse.Namespace, vocab: int) -> float:
    import trl  # noqa: F401  what is imported is not counted

    with tempfile.TemporaryDirectory() as folder:
        if args.device == "cuda":
            make(arm, args, vocab, Path(folder)).train()
            return torch.cuda.max_memory_allocated() / 2**20
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        make(arm, args, vocab, Path(folder)).train()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - resident / 2**20


def print_times(args: argparse.Namespace, vocab: int) -> None:
    model = random_llama(args, vocab)
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    times = [{arm: step_seconds(arm, args, vocab) for arm in ARMS} for _ in range(args.repeats)]
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {args.threads} threads"
    table = Table(title=f"{size:.0f}M parameters, vocabulary {vocab}; {args.rows} x {args.time} tokens; {where}")
    for column in ("arm", "s / step", "of SFT", "range", "bound", "of bound"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in ARMS:
        base = "SFT, LoRA" if ", LoRA" in arm and arm != "DQO, LoRA critic" else "SFT"
        ratios = [row[arm] / row[base] for row in times]
        ratio, reckoned = statistics.median(ratios), bound(arm, args, model)
        table.add_row(
            arm,
            f"{statistics.median(row[arm] for row in times):.3f}",
            f"{ratio:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{reckoned:.2f}",
            f"{ratio / reckoned:.2f}",
            end_section=arm == "DQO, no critic",
        )
    Console(width=WIDTH).print(table)


def print_peaks(args: argparse.Namespace) -> None:
    table = Table(title=f"peak MiB; {args.rows} x {args.time} tokens")
    table.add_column("vocabulary")
    for vocab in args.vocab:
        table.add_column(f"{vocab}", justify="right")
    for arm in ARMS:
        peaks = [f"{peak(arm, args, vocab):.0f}" for vocab in args.vocab]
        table.add_row(arm, *peaks, end_section=arm == "DQO, no critic")
    Console(width=WIDTH).print(table)


def print_growth(args: argparse.Namespace) -> None:
    table = Table(
        title=f"DQO: peak MiB by tokens in a row ({args.rows} rows), and the logits of all of them in float32"
    )
    table.add_column("vocabulary", justify="right")
    lengths = [args.time * factor for factor in (1, 2, 4)]
    for length in lengths:
        table.add_column(f"{length}", justify="right")
        table.add_column("logits", justify="right")
    for vocab in args.vocab:
        cells = []
        for length in lengths:
            cells += [f"{peak('DQO', args, vocab, length):.0f}", f"{4 * args.rows * length * vocab / 2**20:.0f}"]
        table.add_row(str(vocab), *cells)
    Console(width=WIDTH).print(table)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1000, 150_000])
    parser.add_argument("--hidden", type=int, default=1024 if gpu else 256)
    parser.add_argument("--layers", type=int, default=28 if gpu else 8)
    parser.add_argument("--rows", type=int, default=8 if gpu else 4)
    parser.add_argument("--time", type=int, default=1024 if gpu else 128, help="tokens in a row")
    parser.add_argument("--steps", type=int, default=10 if gpu else 2, help="that are timed, in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--peak", metavar="ARM", help="print the peak memory of one arm, and nothing else")
    args = parser.parse_args()
    args.device, args.bf16 = ("cuda", True) if gpu else ("cpu", False)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if args.peak:
        print(own_peak(args.peak, args, args.vocab[0]))
        return
    for vocab in args.vocab if "times" in args.parts else ():
        print_times(args, vocab)
    if "peaks" in args.parts:
        print_peaks(args)
    if "growth" in args.parts:
        print_growth(args)


if __name__ == "__main__":
    main()

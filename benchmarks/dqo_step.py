"""Step time and peak memory of DQOTrainer against TRL's SFTTrainer and DPOTrainer on the same tokens.

    python benchmarks/dqo_step.py [--quick] [--vocab 1000 150000] [--arms sft dqo ...] [--device cuda]

A random Llama, rows of the same length, one optimizer step each; no row is padded, no reference is computed during a step (DPO's
and DQO's log-probabilities are computed before). Every arm has a process of its own, started anew for every repeat, the repeats
interleaved: time is the median of its steps without the first two, memory the most that it ever held (of the process, on a CPU
above what it held before training; of the allocator on a GPU). Ratios are to SFT in the same repeat, full to full and LoRA to
LoRA; medians over repeats, with their range.

Reckoned bound of the time, in products of a token with the weights: a full SFT step has 3 of body and head each (forward,
two of backward), one of LoRA 2. DQO adds the value model's body, full or LoRA; an upper-layer critic has no backward below its
first trained layer. With a trained head backward computes the logits again, which the bound leaves out: it buys that no
[tokens, vocabulary] tensor exists, and weighs most where the head is most of the model.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.models.load import load_model
from posttrain.trainers.dqo import DQOConfig, DQOTrainer, labelled

FULL = ("sft", "dpo", "dqo", "dqo, lora critic", "dqo, upper critic", "dqo, no critic")
LORA = ("lora sft", "lora dpo", "lora dqo", "lora dqo, upper critic", "lora dqo, no critic")
ARMS = (*FULL, *LORA)
ADAPTED = ("dqo, lora critic", "lora dqo", "lora dqo, upper critic")  # whose value model has adapters
SIZES = {  # hidden, intermediate, layers, heads
    "quick": (64, 172, 4, 4),
    "small": (256, 688, 8, 4),
    "0.5b": (1024, 2816, 24, 16),
}


def llama(size: str, vocab: int) -> Any:
    hidden, intermediate, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def bound(arm: str, size: str, vocab: int, upper: int) -> float:
    """Products with weights of a step of the arm, over those of SFT; attention's own, which both have alike, left out."""
    hidden, intermediate, layers, _ = SIZES[size]
    body, head = layers * (4 * hidden**2 + 3 * hidden * intermediate), hidden * vocab
    trained = 2 if arm.startswith("lora") else 3  # forward and what of backward there is
    sft = trained * (body + head)
    if "sft" in arm or "dpo" in arm:
        return 1.0
    kinds = {"no critic": 0.0, "upper critic": 1 + (trained - 1) * upper / layers, "lora critic": 2.0}
    return (sft + kinds.get(arm.partition(", ")[2], trained) * body) / sft


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.started)


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(arm: str, options: argparse.Namespace, vocab: int, folder: Path) -> dict[str, float]:
    """One arm, in a process of its own."""
    model = llama(options.size, vocab).to(options.device)
    rows, length, prompt = options.rows, options.length, options.length // 4
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab, (rows * options.steps, length), generator=generator).tolist()
    settings = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "per_device_train_batch_size": rows // 2 if "dpo" in arm else rows,  # pairs
        "use_cpu": options.device == "cpu",
        "bf16": options.bf16,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "learning_rate": 1e-5,
        "dataloader_pin_memory": False,
    }
    clock = Clock()
    trainer = trainer_of(arm, model, ids, prompt, settings, folder, options.upper)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else peak_resident() - before
    return {"seconds": statistics.median(clock.seconds[2:]), "bytes": float(peak)}


def trainer_of(
    arm: str, model: Any, ids: list[list[int]], prompt: int, settings: dict[str, Any], folder: Path, upper: int
) -> Any:
    lora = LoraConfig(r=16, target_modules="all-linear") if arm.startswith("lora") else None
    if "dqo" in arm:
        return dqo_trainer(arm, model, ids, prompt, settings, folder, lora, upper)

    def of_ids(trainer: type) -> Any:
        return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})

    tokenizer = a_tokenizer()
    if "sft" in arm:
        data = [{"input_ids": row, "completion_mask": [0] * prompt + [1] * (len(row) - prompt)} for row in ids]
        arguments = SFTConfig(**settings, max_length=None)
        return of_ids(SFTTrainer)(
            model, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=lora
        )
    pairs = [
        {"prompt_ids": one[:prompt], "chosen_ids": one[prompt:], "rejected_ids": other[prompt:]}
        for one, other in zip(ids[::2], ids[1::2], strict=True)
    ]
    arguments = DPOConfig(**settings, max_length=None, precompute_ref_log_probs=True)
    return of_ids(DPOTrainer)(
        model, None, arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=lora
    )


def dqo_trainer(
    arm: str,
    model: Any,
    ids: list[list[int]],
    prompt: int,
    settings: dict[str, Any],
    folder: Path,
    lora: Any,
    upper: int,
) -> Any:
    actor_critic = ActorCritic(model, new_critic(model, "benchmark", shared=lora is not None))
    examples: list[Any] = [
        {
            "input_ids": row,
            "first": prompt,
            "reward": float(i % 2),
            "process_rewards": None,
            "behaviour_logprobs": None,
            "truncated": False,
            "prompt_id": str(i),
        }
        for i, row in enumerate(ids)
    ]
    data = labelled(actor_critic, examples, "benchmark", folder / "cache", settings["per_device_train_batch_size"])
    if "no critic" in arm:
        actor_critic.critic = NoCritic(model.config.hidden_size).to(model.device)
    arguments = DQOConfig(
        **settings,
        train_sampling_strategy="random",
        value_layers=upper if "upper" in arm else None,
    )
    of_critic = LoraConfig(r=16, target_modules="all-linear") if arm in ADAPTED else None
    return DQOTrainer(actor_critic, arguments, data, peft_config=lora, value_peft_config=of_critic)


class NoCritic(torch.nn.Module):
    """A head on nothing: what is left of a step without the value model's body."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.backbone, self.head = Zeros(hidden), torch.nn.Linear(hidden, 1)


class Zeros(torch.nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, self.hidden, device=input_ids.device))


def a_tokenizer() -> Any:
    """Any will do, for what it pads with: the rows have ids already."""
    return load_model("tiny", "cpu").tokenizer


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(arm: str, vocab: int, options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: one that has imported everything already, where no GPU forbids that."""
    context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        worker = context.Process(target=write_run, args=(arm, options, vocab, Path(folder)))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"{arm}: its process ended with {worker.exitcode}")
        return dict(json.loads((Path(folder) / "run.json").read_text()))


def write_run(arm: str, options: argparse.Namespace, vocab: int, folder: Path) -> None:
    torch.set_num_threads(options.threads)
    (folder / "run.json").write_text(json.dumps(run(arm, options, vocab, folder)))


def show(found: dict[tuple[str, int], list[dict[str, float]]], options: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    title = f"{options.size} Llama, {where}; {options.rows} rows of {options.length} tokens; {options.repeats} repeats"
    table = Table(title=title)
    for column in ("vocab", "arm", "s/step", "of SFT", "range", "bound", "of bound", "peak MiB", "of SFT"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for (arm, vocab), runs in found.items():
        base = found.get(("lora sft" if arm.startswith("lora") else "sft", vocab), [])
        row = [str(vocab), arm, f"{statistics.median(run['seconds'] for run in runs):.3f}"]
        megabytes = f"{statistics.median(run['bytes'] for run in runs) / 2**20:.0f}"
        if base:
            ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, base, strict=True)]
            memory = statistics.median(run["bytes"] / other["bytes"] for run, other in zip(runs, base, strict=True))
            reckoned = bound(arm, options.size, vocab, options.upper)
            ratio = statistics.median(ratios)
            row += [
                f"{ratio:.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{reckoned:.2f}",
                f"{ratio / reckoned:.2f}",
            ]
            row += [megabytes, f"{memory:.2f}"]
        else:
            row += ["", "", "", "", megabytes, ""]
        table.add_row(*row)
    Console(width=120).print(table)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: 0.5b on a GPU, else small; --quick: quick")
    parser.add_argument("--vocab", type=int, nargs="+", default=[1000, 150_000])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rows", type=int, help="completions per step, even; default: 8, --quick 4")
    parser.add_argument("--length", type=int, help="tokens per row, a quarter of them prompt; default: 512, --quick 64")
    parser.add_argument("--steps", type=int, help="default: 8, --quick 4; the first two do not count")
    parser.add_argument("--upper", type=int, help="layers of an upper-layer critic; default: a quarter of them")
    parser.add_argument("--repeats", type=int, help="default: 3, --quick 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smaller model, shorter rows")
    options = parser.parse_args()
    usual = {
        "size": "0.5b" if options.device == "cuda" else "small",
        "rows": 8,
        "length": 512,
        "steps": 8,
        "repeats": 3,
    }
    quick = {"size": "quick", "rows": 4, "length": 64, "steps": 4, "repeats": 1}
    for name, value in (quick if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.upper = options.upper or SIZES[options.size][2] // 4
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for vocab in options.vocab:
        for _ in range(options.repeats):
            for arm in options.arms:
                found.setdefault((arm, vocab), []).append(measured(arm, vocab, options))
    show(found, options)


if __name__ == "__main__":
    main()

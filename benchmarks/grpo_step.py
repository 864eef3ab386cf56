"""What GRPO-lambda adds to a step of GRPO, and what our engine saves of it, on the embedded model.

    python -m benchmarks.grpo_step [--steps 6] [--repeats 5] [--threads 2]

The same settings and problems for all arms: TRL's GRPOTrainer; GRPOLambdaTrainer; GRPOLambdaTrainer with completions from our
engine in place of TRL's own `generate`. Arms are interleaved; a ratio is the median over repeats, with its range, to TRL's own.
The policy hardly moves (a learning rate of 1e-9) and the gate is open from the first step, so that every step is alike.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.dqo_step import WARM_UP, StepTimes
from posttrain.data.load import load_rows
from posttrain.data.prompts import messages_for, template_for
from posttrain.models.load import load_model
from posttrain.pipelines.grpo_lambda import correctness
from posttrain.trainers.engine_rollouts import engine_rollouts
from posttrain.trainers.grpo_lambda import GRPOLambdaConfig, GRPOLambdaTrainer

ARMS = ("GRPO (TRL)", "GRPO-lambda", "GRPO-lambda, our engine")
PROMPTS, SAMPLES, TOKENS = 16, 8, 192


def step_seconds(arm: str, args: argparse.Namespace) -> list[float]:
    policy, template = load_model("tiny"), template_for("arithmetic")
    data = [
        {"prompt": messages_for(row, template), "answer": row["answer"]}
        for row in load_rows("arithmetic", "train", PROMPTS * (WARM_UP + args.steps))
    ]
    ours = arm != "GRPO (TRL)"
    config, trainer = (GRPOLambdaConfig, GRPOLambdaTrainer) if ours else (GRPOConfig, GRPOTrainer)
    gate = {"penalty_warmup_steps": 0, "gate_fraction": 0.5, "min_group_accuracy": 0.0} if ours else {}
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        made: Any = trainer(
            policy.model,
            correctness,
            config(
                output_dir=folder,
                max_steps=WARM_UP + args.steps,
                per_device_train_batch_size=PROMPTS * SAMPLES,
                num_generations=SAMPLES,
                max_completion_length=TOKENS,
                scale_rewards="none",
                loss_type="dr_grpo",
                learning_rate=1e-9,
                use_cpu=policy.model.device.type == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **gate,
            ),
            Dataset.from_list(data),
            processing_class=policy.tokenizer,
            rollout_func=engine_rollouts() if arm == ARMS[2] else None,
        )
        made.remove_callback(PrinterCallback)
        made.add_callback(times)
        made.train()
    return times.seconds[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="that are timed, in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    times = [{arm: statistics.median(step_seconds(arm, args)) for arm in ARMS} for _ in range(args.repeats)]
    table = Table(title=f"{PROMPTS} prompts x {SAMPLES} completions, {args.threads} threads; {args.repeats} repeats")
    for column in ("arm", "s / step", "of TRL's", "range"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in ARMS:
        ratios = [row[arm] / row[ARMS[0]] for row in times]
        seconds = statistics.median(row[arm] for row in times)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(arm, f"{seconds:.2f}", f"{statistics.median(ratios):.3f}", spread)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""Three steps of a value model on the embedded model; the launcher decides on how many ranks and under what ZeRO.

accelerate launch --use_deepspeed --zero_stage 3 --num_processes 2 tests/trainers/ranks_value.py OUT [--resume CHECKPOINT]
"""

import argparse
import os
from pathlib import Path

from posttrain.models.load import load_model
from posttrain.models.value import new_value_model
from posttrain.pipelines.ranks import leave, part
from posttrain.trainers.value import ValueConfig, ValueTrainer
from tests.trainers.ranks_dqo import write_report


def trained(out: Path, rows: int, accumulation: int, checkpoint: Path | None = None) -> ValueTrainer:
    """Every step takes eight examples of 24, `rows` at a time on every rank."""
    value = new_value_model(load_model("tiny", device="cpu"), zero_init=False)
    arguments = ValueConfig(
        str(out / "run"),
        max_steps=3,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # where gradients are nearly zero Adam's steps are otherwise all sign and no size
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
    )
    examples = [
        {"input_ids": list(range(43, 50 + i)), "first": 2 + i % 3, "return_": float(i % 2), "prompt_id": str(i)}
        for i in range(24)
    ]
    trainer = ValueTrainer(value, arguments, examples)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def main(out: Path, checkpoint: Path | None) -> None:
    trainer = trained(out, 2, 4 // int(os.environ["WORLD_SIZE"]), checkpoint)
    trainer.save(out / "guide")
    if trainer.is_world_process_zero():
        write_report(out, trainer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()
    main(args.out, args.resume)
    part()
    leave(0)

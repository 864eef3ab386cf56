"""Two steps of a value model on the embedded model; the launcher decides on how many ranks and under what ZeRO.

accelerate launch --use_deepspeed --zero_stage 3 --num_processes 2 tests/trainers/zero_value_model.py OUT
"""

import json
import sys
from pathlib import Path

from posttrain.models.load import load_model
from posttrain.models.value import new_value_model
from posttrain.trainers.value import ValueConfig, ValueTrainer


def trained(out: Path, rows: int, accumulation: int) -> ValueTrainer:
    """Every step takes all eight examples, `rows` at a time on every rank."""
    value = new_value_model(load_model("tiny", device="cpu"), zero_init=False)
    arguments = ValueConfig(
        str(out / "run"),
        max_steps=2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        logging_steps=1,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # where gradients are nearly zero Adam's steps are otherwise all sign and no size
        use_cpu=True,
        save_strategy="no",
    )
    examples = [
        {"input_ids": list(range(43, 50 + i)), "first": 2 + i % 3, "return_": float(i % 2), "prompt_id": str(i)}
        for i in range(8)
    ]
    trainer = ValueTrainer(value, arguments, examples)
    trainer.train()
    return trainer


def main(out: Path) -> None:
    trainer = trained(out, rows=2, accumulation=2)
    trainer.save(out / "guide")
    if trainer.is_world_process_zero():
        report = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "ranks": trainer.args.world_size,
            "engine": type(trainer.model_wrapped).__name__,
            "zero_stage": trainer.model_wrapped.zero_optimization_stage(),
        }
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A GRPO-lambda training that goes on from its last whole checkpoint, and is killed after the step it is told.

python tests/trainers/killed_grpo.py OUT STEP
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from posttrain.models.load import load_model
from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.trainers.engine_rollouts import engine_rollouts
from posttrain.trainers.grpo_lambda import GRPOLambdaConfig, GRPOLambdaTrainer
from tests.trainers.test_grpo_lambda import arguments, data, verdicts


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(out: Path, kill: int = -1) -> GRPOLambdaTrainer:
    """Three epochs of three steps, whose orders differ; checkpoints after every second step, the guard looks on."""
    policy = load_model("tiny", "cpu")
    args = arguments(
        GRPOLambdaConfig,
        out,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_completion_length=96,
        max_steps=7,
        gate_fraction=0.5,
        penalty_warmup_steps=1,
        alpha_ramp_steps=6,
        lr_scheduler_type="cosine",
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=8,
    )
    trainer = GRPOLambdaTrainer(
        policy.model,
        verdicts,
        args,
        data(12),
        data(2),
        processing_class=policy.tokenizer,
        callbacks=[Kill(kill)],
        rollout_func=engine_rollouts(),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    return trainer


if __name__ == "__main__":
    trainer = trained(Path(sys.argv[1]), int(sys.argv[2]))
    trainer.save_model(str(Path(sys.argv[1]) / "policy"))

"""A DQO training that goes on from its last whole checkpoint, and is killed after the step it is told.

python tests/trainers/killed_dqo.py OUT STEP
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.trainers.dqo import DQOConfig, DQOTrainer, labelled
from tests.trainers.ranks_dqo import actor_critic, examples


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(out: Path, kill: int = -1) -> DQOTrainer:
    """Two epochs of five steps, whose orders differ; checkpoints after steps 3, 6 and 9."""
    model = actor_critic()
    arguments = DQOConfig(
        str(out / "run"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        value_learning_rate=3e-3,
        critic_warmup_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=3,
    )
    trainer = DQOTrainer(
        model, arguments, labelled(model, examples(), "reference", out / "cache"), callbacks=[Kill(kill)]
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(out / "run"))
    trainer.save(out / "policy")
    return trainer


if __name__ == "__main__":
    trained(Path(sys.argv[1]), int(sys.argv[2]))

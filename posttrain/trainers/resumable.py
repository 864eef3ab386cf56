"""What transformers' trainers need so that a killed training ends as an undisturbed one."""

from typing import Any

from transformers import Trainer


class Resumable(Trainer):
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """From a checkpoint of the last step transformers would take one more, where steps end within an epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

"""Dropout of what a value model's head reads, early or late in its training (Liu et al. 2023, arXiv 2303.01500).

Early dropout helps a model that underfits, late dropout one that overfits. The masks fall on the inputs of the head's first
layer while it trains, and on nothing else: the policy's forward, evaluation and what is saved know of none.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from posttrain.errors import UserError

SCHEDULES = ("constant", "early", "late")


def dropout_rate(rate: float, schedule: str, cutoff: int, step: int) -> float:
    """The rate at a step (from 0): `constant`; `early`, linearly from `rate` to 0 in the first `cutoff` steps and 0 from then
    on; `late`, 0 before step `cutoff` and `rate` from there."""
    if schedule == "early":
        return rate * max(0.0, 1 - step / max(cutoff - 1, 1)) if step < cutoff else 0.0
    return rate if schedule == "constant" or step >= cutoff else 0.0


def check_dropout(rate: float, schedule: str, cutoff: int | None) -> None:
    """Errors: UserError naming `head_dropout`, `dropout_schedule` or `dropout_cutoff`."""
    if not 0 <= rate < 1:
        raise UserError(f"head_dropout: must be at least 0 and below 1, got {rate}")
    if schedule not in SCHEDULES:
        raise UserError(f"dropout_schedule: must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if (schedule == "constant") != (cutoff is None):
        raise UserError("dropout_cutoff: an early or late dropout_schedule needs it, a constant one has none")
    if cutoff is not None and cutoff < 1:
        raise UserError(f"dropout_cutoff: must be at least 1 step, got {cutoff}")


class HeadDropout(TrainerCallback):
    """Masks the inputs of `layer` in training mode; the step's number is the trainer's, so a resumed training goes on."""

    def __init__(self, layer: nn.Module, rate: float, schedule: str, cutoff: int) -> None:
        self.rate, self.schedule, self.cutoff = rate, schedule, cutoff
        self.now = 0.0
        layer.register_forward_pre_hook(self._drop)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = dropout_rate(self.rate, self.schedule, self.cutoff, state.global_step)

    def _drop(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return F.dropout(inputs[0], self.now, layer.training)

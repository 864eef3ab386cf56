"""Group-relative advantages of rewards [prompts, samples] (GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783)."""

from typing import Literal

from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, scale: Scale = "group", ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """A = (r - mean of its group) / (s + eps), [prompts, samples].

    scale: s is the group's standard deviation, the whole batch's (rows of all ranks), or, Dr. GRPO, nothing is divided.
    ddof: 1 for deviations of samples, 0 for those of populations; the defaults are TRL's. A reward of NaN was not scored: it
    enters no mean, and its advantage is 0.

    With `group`, a factor that all rewards of a group share cancels: alpha of a length penalty does nothing where all
    are right. Errors: ValueError for another scale or shape.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards: must be [prompts, samples], got {list(rewards.shape)}")
    centred = rewards - rewards.nanmean(-1, keepdim=True)
    if scale == "group":
        centred = centred / (_deviation(rewards, ddof) + eps)
    elif scale == "batch":
        centred = centred / (_deviation(rewards.reshape(1, -1), ddof) + eps)
    elif scale != "none":
        raise ValueError(f"scale: must be 'group', 'batch' or 'none', got {scale!r}")
    return centred.nan_to_num(nan=0.0)


def _deviation(rows: Tensor, ddof: int) -> Tensor:
    """Standard deviation of every row's numbers, [rows, 1]; 0 where there are too few."""
    count = (~rows.isnan()).sum(-1, keepdim=True)
    squares = (rows - rows.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - ddof).clamp(min=1)).sqrt()

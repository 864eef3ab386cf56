"""Best-of-n distillation: supervised fine-tuning on the completions that a scorer prefers, where no reward says which are right.

The training-time twin of re-ranking, and of Digi-Q's extraction (arXiv 2502.15760). Its KL to the policy that sampled is at most
log n - (n - 1) / n nats per completion.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.objectives.qprobe import best_of_n
from posttrain.rollouts.table import RolloutTable
from posttrain.trainers.baselines import IGNORED

Scorer = Callable[[Sequence[int], Sequence[Sequence[int]]], Tensor]
"""Scores [samples] of a prompt's completions, all token ids: `Reranker.score` of a probe, `CriticReranker.score` of a critic."""


def bon_distill(
    table: RolloutTable,
    scorers: Sequence[Scorer],
    n: int,
    min_advantage: float = 0.0,
    head_reduce: Literal["min", "mean", "max"] = "min",
) -> list[dict[str, list[int]]]:
    """Rows for `baselines.sft_trainer`: of each prompt's first `n` completions the best, where it is more than `min_advantage` above
    their mean score. A completion that was cut at a length is never one.

    Errors: UserError naming `n` for less than 2, or more than a prompt has; `scorers` for none; `min_advantage` where nothing is left.
    """
    if not scorers:
        raise UserError("scorers: at least one is needed")
    rows = []
    for prompts, completions, ends in zip(
        *map(table.by_prompt, ("prompt_ids", "completion_ids", "finish_reason")), strict=True
    ):
        if not 2 <= n <= len(completions):
            raise UserError(f"n: must be between 2 and the {len(completions)} completions of a prompt, got {n}")
        prompt, candidates = prompts[0], completions[:n]
        scores = torch.stack([scorer(prompt, candidates) for scorer in scorers]).unsqueeze(1)
        chosen, _, kept = best_of_n(scores, None, min_advantage, head_reduce)
        if kept and ends[int(chosen)] == "stop":
            best = candidates[int(chosen)]
            rows.append({"input_ids": [*prompt, *best], "labels": [IGNORED] * len(prompt) + best})
    if not rows:
        raise UserError(
            f"min_advantage: no completion is {min_advantage} above its prompt's mean; lower it, or sample more"
        )
    return rows

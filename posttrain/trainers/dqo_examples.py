"""What DQO learns from: the completions of rollout tables, paired or not, each with its reward and the law that sampled it."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from posttrain.errors import UserError
from posttrain.objectives.dqo import token_rewards
from posttrain.rollouts.table import RolloutTable

Truncated = Literal["keep", "drop"]
Process = Literal["additive", "shaping"]
DECODED = 8  # rows whose text is compared


class Example(TypedDict):
    """input_ids: prompt and completion; first: index in them of the completion's first token; reward: paid on its last.

    process_rewards: of the completion's tokens, to be added to that one; None where no step has any.
    behaviour_logprobs: log mu of the completion's tokens; None where the reference itself sampled them, whose
    log-probabilities are then those that the trainer computes. truncated: cut at a length, without an end token.
    """

    input_ids: list[int]
    first: int
    reward: float
    process_rewards: list[float] | None
    behaviour_logprobs: list[float] | None
    truncated: bool
    prompt_id: str


def examples_of(
    tables: Sequence[RolloutTable],
    reference: str,
    truncated: Truncated = "keep",
    process: Process = "additive",
    process_scale: float = 1.0,
    weighted: bool = True,
) -> list[Example]:
    """Every completion of the tables that has tokens, in their order.

    reference: fingerprint of pi_ref. truncated: `keep` completions that were cut at a length, with no reward above 0
    (nobody knows how they would have ended), or `drop` them. process, process_scale: what the steps' scores are, times what
    (`objectives.dqo.token_rewards`). weighted: whether log mu is asked for, which a loss without importance weights does not read.

    Errors: UserError naming `reward` where it is not a finite number; `prompt_ids` and `completion_ids` where they are
    missing or hold each other; `process_rewards` for a token that is not there or has two potentials, and for what is not
    finite; `logprobs` where they do not fit the completion, or are missing and another law than the reference sampled it;
    `table` when nothing is left; `truncated`, `process` and `process_scale` for another choice.
    """
    if truncated not in ("keep", "drop"):
        raise UserError(f"truncated: must be 'keep' or 'drop', got {truncated!r}")
    if process not in ("additive", "shaping"):
        raise UserError(f"process: must be 'additive' or 'shaping', got {process!r}")
    if not math.isfinite(process_scale):
        raise UserError(f"process_scale: must be a finite number, got {process_scale}")
    examples: list[Example] = []
    for table in tables:
        rows = [row for row in table.rows() if _has_tokens(row, f"row {row['prompt_id']!r} of {table.folder}")]
        _expect_apart(rows, table)
        for row in rows:
            where = f"row {row['prompt_id']!r} of {table.folder}"
            reward, cut_off = _reward(row, where), row["finish_reason"] == "length"
            if cut_off and truncated == "drop":
                continue
            examples.append(
                {
                    "input_ids": [*row["prompt_ids"], *row["completion_ids"]],
                    "first": len(row["prompt_ids"]),
                    "reward": min(reward, 0.0) if cut_off else reward,
                    "process_rewards": _process_rewards(row, process, process_scale, where),
                    "behaviour_logprobs": _behaviour_logprobs(row, reference, where) if weighted else None,
                    "truncated": cut_off,
                    "prompt_id": row["prompt_id"],
                }
            )
    if not examples:
        raise UserError(
            "table: no completion is left to learn from (all are empty or truncated); "
            "sample more, with a larger max_tokens"
        )
    return examples


def check_vocabulary(table: RolloutTable, tokenizer: Any, size: int) -> None:
    """Whether the table's ids are of this tokenizer and of a model of `size` embeddings: a policy that did not sample it may have
    another vocabulary. Errors: UserError naming `vocabulary`."""
    rows = list(table.rows())
    largest = max((i for row in rows for i in (*(row["prompt_ids"] or ()), *(row["completion_ids"] or ()))), default=0)
    if largest >= size:
        raise UserError(
            f"vocabulary: {table.folder} has the token {largest}, and the model {size} embeddings; it is another's"
        )
    for row in rows[:DECODED]:
        text, ids = row["completion"], row["completion_ids"]
        if text and ids and not tokenizer.decode(ids, skip_special_tokens=True).startswith(text):
            raise UserError(
                f"vocabulary: the tokens of row {row['prompt_id']!r} of {table.folder} do not say {text[:40]!r} in this model's "
                "vocabulary; they are another's"
            )


def _has_tokens(row: dict[str, Any], where: str) -> bool:
    if not row["prompt_ids"]:
        raise UserError(f"prompt_ids: {where} has none; the first token needs a prompt, if only a begin token")
    if row["completion_ids"] is None:
        raise UserError(f"completion_ids: {where} has none; the ids are needed as they were sampled")
    return len(row["completion_ids"]) > 0


def _expect_apart(rows: Sequence[dict[str, Any]], table: RolloutTable) -> None:
    """Refuses prompts that contain the completion, and the reverse; a few rows may do so by chance."""
    repeated = sum(row["completion_ids"][: len(row["prompt_ids"])] == row["prompt_ids"] for row in rows)
    if 2 * repeated > len(rows):
        raise UserError(
            f"completion_ids: {repeated} of {len(rows)} completions of {table.folder} begin with their prompt; "
            "leave the prompt out of them"
        )
    answered = sum(row["prompt_ids"][-len(row["completion_ids"]) :] == row["completion_ids"] for row in rows)
    if 2 * answered > len(rows):
        raise UserError(
            f"prompt_ids: {answered} of {len(rows)} prompts of {table.folder} end with their completion; "
            "leave the completion out of them"
        )


def _reward(row: dict[str, Any], where: str) -> float:
    reward = row["reward"]
    if reward is None or not math.isfinite(reward):
        raise UserError(f"reward: {where} has {reward}; every completion needs a finite number")
    return reward


def _process_rewards(row: dict[str, Any], process: Process, scale: float, where: str) -> list[float] | None:
    if not row["process_rewards"]:
        return None
    scores = [(step["token"], step["reward"]) for step in row["process_rewards"]]
    if any(token is None or reward is None or not math.isfinite(reward) for token, reward in scores):
        raise UserError(f"process_rewards: {where} has one that is not a token and a finite number")
    try:
        return token_rewards(0.0, len(row["completion_ids"]), scores, process, scale).tolist()
    except ValueError as error:
        raise UserError(f"process_rewards: {where}: {str(error).removeprefix('scores: ')}") from None


def _behaviour_logprobs(row: dict[str, Any], reference: str, where: str) -> list[float] | None:
    """log mu of the tokens; None where the reference sampled them as it is: temperature 1, nothing cut off, no guide."""
    sampling = row["sampling"] or {}
    as_it_is = sampling.get("temperature") == 1 and sampling.get("top_p") == 1 and sampling.get("top_k") == 0
    by_reference = (row["policy"] or "").rpartition("@")[2] == reference
    if by_reference and as_it_is and row["guide"] is None and not row["cut"]:
        return None
    logprobs, length = row["logprobs"], len(row["completion_ids"])
    if logprobs is None:
        raise UserError(
            f"logprobs: {where} has none, and was not sampled from the reference as it is (temperature 1, top_p 1, "
            "top_k 0, no guide); collect it again with log-probabilities, or train without importance weights (importance_cap: null)"
        )
    if len(logprobs) != length:
        raise UserError(f"logprobs: {where} has {len(logprobs)} for {length} tokens; one for each is needed")
    if any(value is None or not math.isfinite(value) for value in logprobs):
        raise UserError(f"logprobs: {where} has one that is not a finite number; collect it again")
    return logprobs

"""Process scores: how often a policy that goes on from the end of a step comes to the right answer (Monte Carlo), or what DQO's
value model says of it.

Monte Carlo's score of a prefix is an unbiased estimate of its pass rate, which is V of the policy without KL; a rollout table keeps
scores in `process_rewards`, and `objectives.dqo.token_rewards` says how rewards are made of them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.actor_critic import prefix_values
from posttrain.models.value import ValueModel
from posttrain.provenance import versions
from posttrain.rewards.math import Grade, grade
from posttrain.rollouts.collect import check_folder, completion_seed, completion_text, reserved
from posttrain.rollouts.engine import Engine, Request, Sampling
from posttrain.rollouts.rollin import Prefix
from posttrain.rollouts.table import RolloutTable, read_table, shard_name, write_manifest, write_shard

Scores = list[dict[str, Any]]  # of one completion: {"token": index of a step's last token, "reward": its score}


def step_ends(tokenizer: Any, ids: list[int], separator: str = "\n") -> list[int]:
    """Index of the last token of every step but the last one, whose score is the outcome. A step takes the separators after
    it along: between two that follow each other nothing is thought."""
    counts = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True).count(separator) for i in range(len(ids))]
    ends = [i for i, (before, after) in enumerate(zip([0, *counts], counts, strict=False)) if after > before]
    return [i for i in ends if i + 1 < len(ids) and i + 1 not in ends]


def monte_carlo_scores(
    engine: Engine,
    tokenizer: Any,
    table: RolloutTable,
    *,
    samples: int,
    sampling: Sampling,
    separator: str = "\n",
    grader: Callable[..., list[Grade]] = grade,
) -> list[Scores]:
    """Scores of every row's steps: the share of `samples` continuations of the prefix that end in the right answer.

    sampling.max_tokens counts prefix and continuation, sampling.seed is the run's seed; a prefix that leaves no token has no
    score. Errors: UserError naming `samples`, or, before any generation, what does not fit the engine's context.
    """
    if samples < 1:
        raise UserError(f"samples: must be at least 1, got {samples}")
    rows = list(table.rows())
    requests: list[Request] = []
    owners: list[tuple[int, int]] = []  # of every request: number of the row, and where the step ends
    for number, row in enumerate(rows):
        for end in step_ends(tokenizer, row["completion_ids"] or [], separator):
            left = sampling.max_tokens - (end + 1)
            prompt = (*row["prompt_ids"], *row["completion_ids"][: end + 1])
            for k in range(samples if left > 0 else 0):
                seed = completion_seed(sampling.seed, f"{row['prompt_id']}\0{row['sample']}\0{end}", k)
                requests.append(Request(len(requests), prompt, replace(sampling, max_tokens=left, seed=seed)))
                owners.append((number, end))
    texts, golds = [""] * len(requests), [rows[number]["answer"] for number, _ in owners]
    for completion in engine.generate(requests):
        number, end = owners[completion.request_id]
        prefix = Prefix(tuple(rows[number]["completion_ids"][: end + 1]))
        texts[completion.request_id] = completion_text(tokenizer, prefix.before(completion))
    thinking = table.manifest["settings"].get("thinking", "")
    grades = grader(completions=[thinking + text for text in texts], golds=golds)
    right: dict[tuple[int, int], int] = {}
    for owner, graded in zip(owners, grades, strict=True):
        right[owner] = right.get(owner, 0) + graded.correct
    scores: list[Scores] = [[] for _ in rows]
    for (number, end), count in right.items():
        scores[number].append({"token": end, "reward": count / samples})
    return scores


def critic_scores(critic: ValueModel, tokenizer: Any, table: RolloutTable, separator: str = "\n") -> list[Scores]:
    """Scores of every row's steps by DQO's value model: V where the step ends, with no sampling."""
    rows = list(table.rows())
    values = prefix_values(critic, [(row["prompt_ids"], row["completion_ids"] or []) for row in rows])
    return [
        [
            {"token": end, "reward": float(own[end + 1])}
            for end in step_ends(tokenizer, row["completion_ids"] or [], separator)
        ]
        for row, own in zip(rows, values, strict=True)
    ]


def write_scored(table: RolloutTable, scores: list[Scores], out: str | Path) -> RolloutTable:
    """The table with these scores in `process_rewards`, in the folder `out`. Errors: UserError naming `out`, and `scores` when
    they are not one list of each row."""
    if len(scores) != len(table):
        raise UserError(f"scores: there are {len(scores)} of {len(table)} rows; one list of each row is needed")
    out = Path(out)
    check_folder(out, resume=False, way="delete it")
    rows = [{**row, "process_rewards": own} for row, own in zip(table.rows(), scores, strict=True)]
    with reserved(out):
        settings = {**table.manifest["settings"], "process_rewards": True}
        entry = write_shard(out, 0, rows)
        manifest = {
            "settings": settings,
            "versions": versions(),
            "shards": {shard_name(0): entry},
            "expected_shards": 1,
        }
        write_manifest(out, {**table.manifest, **manifest})
    return read_table(out)

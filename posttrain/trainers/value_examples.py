"""What a value model learns from: completions of rollout tables, each labelled with its return from some token on."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.errors import UserError
from posttrain.rollouts.table import RolloutTable

PAD = 0  # right-padded under a causal mask, so that no labelled token ever sees it


class Example(TypedDict):
    """input_ids: prompt and completion; first: index in them of the first labelled token; all from there on have the label
    `return_`; prompt_id: whose completion it is."""

    input_ids: list[int]
    first: int
    return_: float
    prompt_id: str


class Pair(Example):
    """A completion that is preferred to `rejected`, another of the same prefix."""

    rejected: Example


def examples_of(tables: Sequence[RolloutTable], drop_unanimous: bool = True) -> list[Example]:
    """Every completion of the tables; of a row that was rolled in, the tokens from its cut on are labelled.

    drop_unanimous: leave out prompts whose completions all have the same reward, over all tables: they tell nothing of
    which token matters. Errors: UserError naming `reward` for one that is not a finite number, and when nothing is left;
    naming `table` for a guided one, whose outcomes are not of the reference's law.
    """
    rewards: dict[str, set[float]] = {}
    examples: list[Example] = []
    for table in tables:
        for row in table.rows():
            reward = row["reward"]
            if reward is None or not math.isfinite(reward):
                raise UserError(
                    f"reward: {table.folder} has a row of prompt {row['prompt_id']!r} without a finite reward"
                )
            if row["beta"] is not None:
                raise UserError(
                    f"table: {table.folder} was sampled with a guide; its completions must be cut and rolled out first"
                )
            rewards.setdefault(row["prompt_id"], set()).add(reward)
            if not row["completion_ids"]:
                continue
            prompt = list(row["prompt_ids"])
            ids = prompt + list(row["completion_ids"])
            examples.append(
                {
                    "input_ids": ids,
                    "first": len(prompt) + row["cut"],
                    "return_": reward,
                    "prompt_id": row["prompt_id"],
                }
            )
    if drop_unanimous:
        examples = [example for example in examples if len(rewards[example["prompt_id"]]) > 1]
    if not examples:
        raise UserError(
            "reward: no prompt has completions with different rewards; sample more of each, or other prompts"
        )
    return examples


def split_by_prompt(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; no prompt is in both, and both have the same mixture of easy and hard prompts: of
    the prompts in order of their mean return, one of each run of 1 / fraction is held out.

    Errors: UserError naming `eval_fraction` when one side would be empty.
    """
    returns: dict[str, list[float]] = {}
    for example in examples:
        returns.setdefault(example["prompt_id"], []).append(example["return_"])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(returns), generator=generator).tolist()
    means = [sum(values) / len(values) for values in returns.values()]
    names = list(returns)
    order = [names[i] for i in sorted(range(len(names)), key=lambda i: (means[i], noise[i]))]
    count = round(len(order) * fraction)
    if not 0 < count < len(order):
        raise UserError(
            f"eval_fraction: {fraction} of {len(order)} prompts leaves nothing on one side; take more prompts"
        )
    held_out = {order[int((i + 0.5) * len(order) / count)] for i in range(count)}
    return (
        [example for example in examples if example["prompt_id"] not in held_out],
        [example for example in examples if example["prompt_id"] in held_out],
    )


def pairs_of(examples: Sequence[Example]) -> list[Pair]:
    """Of every prefix (a prompt, or what was rolled in) the completions above its mean return, paired with those below: each
    at least once, those of the smaller side in turn.

    Errors: UserError naming `reward` where no prefix has both.
    """
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(example["input_ids"][: example["first"]]), []).append(example)
    pairs: list[Pair] = []
    for group in groups.values():
        mean = sum(example["return_"] for example in group) / len(group)
        above = [example for example in group if example["return_"] > mean]
        below = [example for example in group if example["return_"] < mean]
        count = max(len(above), len(below)) if above and below else 0
        pairs += [{**above[i % len(above)], "rejected": below[i % len(below)]} for i in range(count)]
    if not pairs:
        raise UserError(
            "reward: no prompt has completions with different rewards to make pairs of; sample more of each"
        )
    return pairs


def collate_pairs(pairs: Sequence[Pair], packed: bool = False) -> dict[str, Tensor]:
    """As `collate`, of twice as many rows: those that are preferred, then the others in the same order."""
    return collate([*pairs, *(pair["rejected"] for pair in pairs)], packed)


def collate(examples: Sequence[Example], packed: bool = False) -> dict[str, Tensor]:
    """A batch. returns: float32 [rows]; mask: bool [rows, time], which tokens are labelled.

    Padded: input_ids [rows, time], and attention_mask. Packed: input_ids and position_ids [1, tokens], one row after the
    other without padding, positions starting anew in each, and lengths [rows]: needs an attention that keeps rows apart by
    their positions, as transformers' flash and sdpa attention do.
    """
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    lengths = torch.tensor([len(row) for row in rows])
    time = torch.arange(int(lengths.max()))
    first = torch.tensor([example["first"] for example in examples])
    batch: dict[str, Any] = {
        "returns": torch.tensor([example["return_"] for example in examples]),
        "mask": (time >= first[:, None]) & (time < lengths[:, None]),
    }
    if packed:
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        return {**batch, "input_ids": torch.cat(rows)[None], "position_ids": positions[None], "lengths": lengths}
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD)
    return {**batch, "input_ids": ids, "attention_mask": (time < lengths[:, None]).long()}


def unpack(logits: Tensor, lengths: Tensor) -> Tensor:
    """Packed logits [1, tokens, ...] as [rows, time, ...], zero where a row is shorter."""
    return pad_sequence(list(logits[0].split(lengths.tolist())), batch_first=True)

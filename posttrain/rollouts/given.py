"""Completions that somebody else made and judged, as a rollout table: from a .jsonl or .parquet file with a row for each.

    prompt_ids, or prompt           token ids; a text, which becomes the user's turn, or a list of messages {role, content}
    completion_ids, or completion   token ids as they were sampled, end token included; a text, which is tokenised and ended
    reward                          a number
    logprobs                        optional: of completion_ids, under the law that sampled them; only with completion_ids
    process_rewards                 optional: {token, reward} of steps, token an index in completion_ids
    truncated                       optional: true where the completion was cut at a length, and has no end token

Ids are better: text that is tokenised need not give the tokens that were sampled. Prompts may have different numbers of rows, in
any order; rows of equal prompt ids are completions of one prompt.
"""

import math
from pathlib import Path
from typing import Any
from unicodedata import normalize

from jinja2 import TemplateError

from posttrain.data.load import read_rows
from posttrain.data.prompts import render
from posttrain.errors import UserError
from posttrain.provenance import hash_files, hash_json, versions
from posttrain.rollouts.collect import reserved
from posttrain.rollouts.table import (
    MANIFEST,
    RolloutTable,
    read_manifest,
    read_table,
    shard_name,
    write_manifest,
    write_shard,
)


def given_table(file: str | Path, tokenizer: Any, out: str | Path) -> RolloutTable:
    """The table of a file's rows in the folder `out`; one that was made of the same file and tokenizer is kept.

    Errors: UserError naming `completions` and the first row that lacks something or cannot be spelt, before
    anything is written; `out`, which another file's table fills.
    """
    file, out = Path(file), Path(out)
    settings = {
        "completions": hash_files([file]) if file.is_file() else None,
        "tokenizer": hash_json(
            [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token_id]
        ),
    }
    if (out / MANIFEST).is_file():
        if read_manifest(out)["settings"] != settings:
            raise UserError(f"out: {out} holds other completions; delete it, or give another out")
        return read_table(out)
    found = read_rows(file, "completions")
    rows = [_row(row, tokenizer, f"{file} row {number}") for number, row in enumerate(found, 1)]
    if not rows:
        raise UserError(f"completions: {file} is empty")
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["prompt_ids"]), []).append(row)
    for group, own in enumerate(groups.values()):
        for sample, row in enumerate(own):
            row |= {"prompt_id": str(group), "group": group, "sample": sample}
    with reserved(out):
        shards = {shard_name(0): write_shard(out, 0, [row for own in groups.values() for row in own])}
        write_manifest(
            out,
            {"settings": settings, "versions": versions(), "expected_shards": 1, "shards": shards, "seconds": 0.0},
        )
    return read_table(out)


def _row(row: dict[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
    prompt, completion, truncated = row.get("prompt"), row.get("completion"), bool(row.get("truncated"))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and not all(_is_message(message) for message in prompt):
        raise UserError(f"completions: {where} has a prompt whose messages are not all {{role, content}}, two texts")
    prompt_ids, completion_ids = row.get("prompt_ids"), row.get("completion_ids")
    if prompt_ids is None:
        if not isinstance(prompt, list):
            raise UserError(f"completions: {where} has neither prompt_ids nor a prompt, a text or a list of messages")
        try:
            prompt_ids = render(tokenizer, prompt)
        except (TemplateError, ValueError) as error:
            raise UserError(f"completions: {where} has a prompt that the chat template refuses: {error}") from None
    if completion_ids is None:
        if not isinstance(completion, str):
            raise UserError(f"completions: {where} has neither completion_ids nor a completion, which is a text")
        if row.get("logprobs") is not None or row.get("process_rewards") is not None:
            raise UserError(f"completions: {where} has logprobs or process_rewards, which need its completion_ids")
        completion_ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
        _check_spelt(completion, completion_ids, tokenizer, where)
        completion_ids += [] if truncated else [tokenizer.eos_token_id]
    reward = row.get("reward")
    if isinstance(reward, bool):
        reward = float(reward)
    if not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise UserError(f"completions: {where} has the reward {reward!r}; every row needs a finite number")
    largest = len(tokenizer)
    for name, ids in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < largest for i in ids):
            raise UserError(f"completions: {where} has {name} that are not a list of token ids below {largest}")
    length, logprobs, steps = len(completion_ids), row.get("logprobs"), row.get("process_rewards")
    if logprobs is not None and not (
        isinstance(logprobs, list) and len(logprobs) == length and all(map(_is_number, logprobs))
    ):
        raise UserError(
            f"completions: {where} has logprobs that are not a list of {length} numbers, one for each token"
        )
    if steps is not None and not (isinstance(steps, list) and all(_is_step(step, length) for step in steps)):
        raise UserError(
            f"completions: {where} has process_rewards that are not a list of {{token, reward}}, tokens below {length}"
        )
    return {
        "prompt": prompt if isinstance(prompt, list) else [],
        "prompt_ids": prompt_ids,
        "completion": completion
        if isinstance(completion, str)
        else tokenizer.decode(completion_ids, skip_special_tokens=True),
        "completion_ids": completion_ids,
        "finish_reason": "length" if truncated else "stop",
        "answer": None,
        "extracted": None,
        "verdict": None,
        "reward": float(reward),
        "correct": reward > 0.5,
        "logprobs": logprobs,
        "policy": "given",
        "guide": None,
        "beta": None,
        "kl": 0.0,
        "log_ratio": 0.0,
        "process_rewards": steps,
        "cut": 0,
        "sampling": None,
    }


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _is_step(step: Any, length: int) -> bool:
    if not isinstance(step, dict) or not _is_number(step.get("reward")):
        return False
    token = step.get("token")
    return isinstance(token, int) and 0 <= token < length


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_spelt(text: str, ids: list[int], tokenizer: Any, where: str) -> None:
    """Whether a text's tokens say it, but for the normal form in which some tokenizers write accents.

    Errors: UserError naming `completions`, the row, and what is lost.
    """
    spelt = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if normalize("NFKC", spelt) == normalize("NFKC", text):
        return
    special = [token for token in tokenizer.all_special_tokens if token in text]
    lost = special or [character for character in dict.fromkeys(text) if character not in spelt]
    what = f"has {', '.join(map(repr, lost[:5]))}, which" if lost else f"says {text[:40]!r}, which"
    raise UserError(
        f"completions: {where} {what} the model's tokenizer cannot spell as text; change it, or give completion_ids instead"
    )

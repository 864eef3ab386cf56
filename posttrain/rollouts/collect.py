"""Collects a rollout table: samples every prompt, grades and stores; an interrupted run continues where it stopped.

The unit of work is a shard: fixed prompts, admitted to the engine in a fixed order, alone. What is in a shard is a
function of its prompts and the settings, so an unfinished shard is redone whole, a finished one never, and no shard
shows where a run was killed.
"""

import errno
import fcntl
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain import record
from posttrain.data.prompts import Message, messages_for, render
from posttrain.errors import UserError
from posttrain.progress import Bar, bar
from posttrain.provenance import hash_json, versions
from posttrain.rewards.extract import open_tag
from posttrain.rewards.math import Grade, grade
from posttrain.rollouts.engine import Completion, Engine, Request, Sampling, check_request
from posttrain.rollouts.rollin import NO_PREFIX, Prefix
from posttrain.rollouts.table import (
    RolloutTable,
    check_shard,
    read_manifest,
    read_table,
    remove_scratch,
    shard_name,
    write_manifest,
    write_shard,
)

SHARD_COMPLETIONS = 256  # what a kill can cost, against the end of each shard, where the batch runs empty
DECISIVE = ("torch", "transformers")  # versions that a resumed collection must share
MAY_DIFFER = {"threads", "slots", "device", "grader", "vllm", *DECISIVE}  # once every shard is there


@dataclass(frozen=True)
class Prompt:
    """A row of data as the model sees it. `id` is unique within a collection; `answer` is the gold answer."""

    id: str
    messages: Sequence[Message]
    ids: tuple[int, ...]
    answer: str


def prompts_for(rows: Sequence[dict[str, Any]], tokenizer: Any, template: str) -> list[Prompt]:
    """Rows of `load_rows` through the chat template."""
    prompts = []
    for row in rows:
        messages = messages_for(row, template)
        prompts.append(Prompt(row["id"], messages, tuple(render(tokenizer, messages)), row["answer"]))
    return prompts


def completion_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A completion's own seed, a hash: no other prompt, sample or order has a say in what it will be."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def collect(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    least_samples: int | None = None,
    sampling: Sampling,
    out: str | Path,
    policy: str,
    settings: dict[str, Any] | None = None,
    beta: float | None = None,
    guide: str | None = None,
    prefixes: Mapping[tuple[str, int], Prefix] | None = None,
    shard_prompts: int | None = None,
    resume: bool = False,
    grader: Callable[..., list[Grade]] = grade,
    progress: bool = True,
) -> RolloutTable:
    """`samples` completions of every prompt, as a rollout table in the folder `out`; sampling.seed is the run's seed.

    least_samples: a prompt has as few as that, up to `samples`: its number is drawn, as likely one as another, by the run's seed.
    policy: the model's name; settings: whatever else decides the rows (slots, dtype, threads, ...). All of it goes into
    the manifest, and a resumed collection must agree with it. shard_prompts: prompts per shard, by default as many as
    give 256 completions. grader: called with `completions` and `golds`.

    beta: the KL coefficient of the engine's guide, and guide: its name; None: no guidance. prefixes: what was rolled in
    already, by prompt id and sample: the engine goes on from there, and `max_tokens` counts both.

    Errors, all before any generation: UserError naming `samples`, `least_samples`, `shard_prompts`, `prompt`, `max_tokens`, `data` or
    `out`, or, on resume, the setting that differs from the interrupted run's.
    """
    if samples < 1:
        raise UserError(f"samples: must be at least 1, got {samples}")
    if least_samples is not None and not 1 <= least_samples <= samples:
        raise UserError(f"least_samples: must be between 1 and the {samples} samples, got {least_samples}")
    if shard_prompts is None:
        shard_prompts = -(-SHARD_COMPLETIONS // samples)
    if shard_prompts < 1:
        raise UserError(f"shard_prompts: must be at least 1, got {shard_prompts}")
    check_prompts(prompts, engine, sampling, beta)
    if prefixes and sampling.stop:
        raise UserError("stop: a text that begins in what was rolled in would not be seen; leave stop texts out")
    for (prompt_id, _), prefix in (prefixes or {}).items():
        if prefix.finish_reason is None and len(prefix.ids) >= sampling.max_tokens:
            raise UserError(
                f"max_tokens: row {prompt_id!r} was rolled in for {len(prefix.ids)} tokens, which leaves nothing of "
                f"{sampling.max_tokens}; as many as were asked for there"
            )
    out = Path(out)
    policy = f"{policy}@{engine.fingerprint}"
    # A chat template may open the thought itself. What is cut off in it has no answer, and only with its tag does the grader know.
    thinking = open_tag(tokenizer.decode(list(prompts[0].ids), skip_special_tokens=False)) if prompts else ""
    manifest: dict[str, Any] = {
        "settings": {
            "policy": policy,
            "data": hash_json([[prompt.id, prompt.ids, prompt.answer] for prompt in prompts]),
            "prompts": len(prompts),
            "samples": samples,
            **({} if least_samples is None else {"least_samples": least_samples}),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
            "stop_ids": list(sampling.stop_ids),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"thinking": thinking} if thinking else {}),
            **({"beta": beta, "guide": guide} if beta is not None else {}),
            **({"prefixes": _prefix_hash(prefixes)} if prefixes is not None else {}),
            "shard_prompts": shard_prompts,
            **(settings or {}),
        },
        "versions": versions(),
        "expected_shards": -(-len(prompts) // shard_prompts),
        "shards": {},
        "seconds": 0.0,
    }
    with reserved(out):
        manifest = _opened(out, manifest, resume)
        finished = manifest["shards"]
        counts = [_count(prompt, least_samples or samples, samples, sampling.seed) for prompt in prompts]
        with bar(f"rollout {out.name}", sum(counts), progress) as shown:
            done = _Progress(shown)
            for index in range(manifest["expected_shards"]):
                if shard_name(index) in finished:
                    shown.skip(finished[shard_name(index)]["rows"])
                    continue
                start = time.perf_counter()
                first = index * shard_prompts
                shard = slice(first, first + shard_prompts)
                jobs = _jobs(prompts[shard], first, counts[shard], sampling, beta, prefixes or {})
                completions = _sample(engine, jobs, done)
                texts = [completion_text(tokenizer, completion) for completion in completions]
                grades = grader(
                    completions=[thinking + text for text in texts], golds=[job.prompt.answer for job in jobs]
                )
                rows = [_row(*row, policy, guide) for row in zip(jobs, completions, texts, grades, strict=True)]
                done.graded(rows)
                with _writing(out):
                    finished[shard_name(index)] = write_shard(out, index, rows)
                    manifest["seconds"] += time.perf_counter() - start
                    # Before the manifest says that the shard is there: a kill between the two costs no line.
                    record.log(out, index, _measured(rows, time.perf_counter() - start))
                    write_manifest(out, manifest)
    return read_table(out)


def check_prompts(prompts: Sequence[Prompt], engine: Engine, sampling: Sampling, beta: float | None = None) -> None:
    """Errors: UserError naming `data`, `prompt` or `max_tokens`, with the row that cannot be sampled, or what the engine cannot do."""
    if not prompts:
        raise UserError("data: there is no prompt to sample")
    seen: set[str] = set()
    if beta is not None and math.isinf(beta):
        raise UserError("beta: an infinite one does not guide; leave it out")
    for index, prompt in enumerate(prompts):
        request = Request(index, prompt.ids, sampling, beta)
        check_request(request, engine.context, f"row {prompt.id!r}")
        engine.check(request)
        if prompt.id in seen:
            raise UserError(f"data: two rows have the id {prompt.id!r}; ids must be unique")
        seen.add(prompt.id)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"out: cannot write to {out}: {error.strerror}") from None


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """The folder, made where it is missing, locked against a second run as long as this process lives."""
    _check_writable(out)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out: another run is writing to {out}") from None
        except OSError as error:
            raise UserError(f"out: {out} cannot be locked: {error.strerror}; give a folder on a local disk") from None
        yield
    finally:
        os.close(folder)


def _check_writable(out: Path) -> None:
    """Of a folder that is not there yet: whether it could be made. Nothing is."""
    with _writing(out):
        ground = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not ground.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(ground, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_folder(out: Path, resume: bool, way: str = "--resume continues an interrupted run") -> None:
    """Whether a table can be collected here, before a model is loaded for it; nothing is written.

    way: what else than another folder would be right where this one is not empty.
    Errors: UserError naming `out`, which cannot be written to or, without `resume`, is not empty.
    """
    _check_writable(out)
    if not resume and out.is_dir() and not record.is_bare(out):
        raise UserError(f"out: {out} is not empty; {way}, or give another folder")


def _opened(out: Path, manifest: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The manifest to go on with: the new one, now written, or on resume the old one, which must agree with it."""
    check_folder(out, resume)
    remove_scratch(out)
    if not record.is_bare(out):
        return _agreed(out, read_manifest(out), manifest)
    with _writing(out):
        write_manifest(out, manifest)
    return manifest


def _agreed(out: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    before, now = (
        {**manifest["settings"], **{package: manifest["versions"].get(package) for package in DECISIVE}}
        for manifest in (old, new)
    )
    differs = {field for field in {*now, *before} if before.get(field) != now.get(field)}
    present = {
        name: entry for name, entry in old["shards"].items() if (out / name).exists()
    }  # deleted: collect it again
    if len(present) == old["expected_shards"]:
        differs -= MAY_DIFFER
    if differs > {"data"}:  # a hash of what other settings decide: those say more
        differs -= {"data"}
    if differs:
        changes = [f"{field} {before.get(field)!r}, not {now.get(field)!r}" for field in sorted(differs)]
        raise UserError(
            f"{min(differs)}: {out} was collected with {'; '.join(changes)}; "
            "resume with the same settings, or give another folder"
        )
    for name, entry in present.items():
        check_shard(out, name, entry)
    return {**old, "shards": present}


@dataclass(frozen=True)
class _Job:
    """A row before it is sampled. `request` asks for what comes after the prefix; None: the prefix is all."""

    prompt: Prompt
    group: int
    sample: int
    sampling: Sampling
    prefix: Prefix
    request: Request | None


def _count(prompt: Prompt, least: int, most: int, seed: int) -> int:
    """How many completions a prompt has; the seed is none of theirs."""
    return least + completion_seed(seed, prompt.id, most) % (most - least + 1)


def _jobs(
    prompts: Sequence[Prompt],
    first: int,
    counts: Sequence[int],
    sampling: Sampling,
    beta: float | None,
    prefixes: Mapping[tuple[str, int], Prefix],
) -> list[_Job]:
    """In order of prompt, then sample."""
    jobs: list[_Job] = []
    for group, (prompt, count) in enumerate(zip(prompts, counts, strict=True), first):
        for k in range(count):
            own = replace(sampling, seed=completion_seed(sampling.seed, prompt.id, k))
            prefix = prefixes.get((prompt.id, k), NO_PREFIX)
            request = None
            if prefix.finish_reason is None:
                left = replace(own, max_tokens=own.max_tokens - len(prefix.ids))
                request = Request(len(jobs), prompt.ids + prefix.ids, left, beta)
            jobs.append(_Job(prompt, group, k, own, prefix, request))
    return jobs


def _prefix_hash(prefixes: Mapping[tuple[str, int], Prefix]) -> str:
    return hash_json([[*key, prefix.ids, prefix.cut] for key, prefix in sorted(prefixes.items())])


def _sample(engine: Engine, jobs: Sequence[_Job], done: "_Progress") -> list[Completion]:
    """In order of the jobs, each with its prefix."""
    rest = {}
    for completion in engine.generate(job.request for job in jobs if job.request is not None):
        rest[completion.request_id] = completion
        done.sampled(completion)
    return [job.prefix.before(rest.get(number)) for number, job in enumerate(jobs)]


def _row(job: _Job, completion: Completion, text: str, graded: Grade, policy: str, guide: str | None) -> dict[str, Any]:
    beta = job.request.beta if job.request else None
    return {
        "prompt_id": job.prompt.id,
        "sample": job.sample,
        "group": job.group,
        "prompt": list(job.prompt.messages),
        "prompt_ids": job.prompt.ids,
        "completion": text,
        "completion_ids": completion.ids,
        "finish_reason": completion.finish_reason,
        "answer": job.prompt.answer,
        "extracted": graded.answer,
        "verdict": graded.verdict,
        "reward": float(graded.correct),
        "correct": graded.correct,
        "logprobs": completion.logprobs or None,
        "policy": policy,
        "guide": guide if beta is not None else None,
        "beta": beta,
        "kl": completion.kl,
        "log_ratio": completion.log_ratio,
        "cut": job.prefix.cut,
        "sampling": {
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
            "top_k": job.sampling.top_k,
            "max_tokens": job.sampling.max_tokens,
            "seed": job.sampling.seed,
        },
    }


def completion_text(tokenizer: Any, completion: Completion) -> str:
    """Without special tokens, and cut before the stop text that ended it."""
    if completion.text is not None:
        return completion.text
    text: str = tokenizer.decode(completion.ids, skip_special_tokens=True)
    return text.partition(completion.stop)[0] if completion.stop else text


class _Progress:
    """Completions, tokens per second and accuracy so far, on stderr where that is a terminal."""

    def __init__(self, shown: Bar) -> None:
        self.bar = shown
        self.start = time.perf_counter()
        self.tokens = self.correct = self.rows = 0

    def sampled(self, completion: Completion) -> None:
        self.tokens += len(completion.ids)
        self.bar.advance(1, self._note() if self.bar.shown else None)

    def graded(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += len(rows)
        self.correct += sum(row["correct"] for row in rows)

    def _note(self) -> str:
        speed = self.tokens / (time.perf_counter() - self.start)
        accuracy = f"{self.correct / self.rows:.3f}" if self.rows else "-"
        return f"{speed:.0f} tokens/s, accuracy {accuracy}"


def _measured(rows: Sequence[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Of a shard, for the run's record."""
    tokens, kls = [len(row["completion_ids"]) for row in rows], [row["kl"] for row in rows]
    has_kl = any(row["guide"] for row in rows) and None not in kls
    return {
        "completions": len(rows),
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "tokens": sum(tokens) / len(rows),
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        **({"kl": sum(kls) / len(rows)} if has_kl else {}),
        "tokens_per_second": sum(tokens) / seconds,
    }

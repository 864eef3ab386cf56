"""An evaluation, stage by stage: render, generate, grade, report. Every stage is kept, and can be run again alone.

A completion is a function of its key: `rollouts/manifest.json` holds all that can change it (weights, tokenizer and template
by fingerprint, prompt ids, sampling, seed, engine, dtype, versions), and nothing goes on under another key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.data.prompts import messages_for, render, render_text
from posttrain.errors import UserError
from posttrain.evaluation.benchmarks import Benchmark, Problems
from posttrain.evaluation.grades import grade_benchmark
from posttrain.evaluation.harness_report import write_reports
from posttrain.evaluation.run_folder import benchmark_of, read_run, remove_scratch, timed, write_prompts, write_run
from posttrain.provenance import write_json
from posttrain.rollouts.collect import Prompt, check_folder, collect, reserved
from posttrain.rollouts.engine import Engine, Request, check_request, first_stop

Stage = Literal["render", "generate", "grade", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class Model:
    """Who is measured: an engine with its tokenizer. `settings`: what else decides its completions (dtype, device, ...).

    beta, guide: of the engine's guide, its KL coefficient and its name; None where it has none.
    """

    name: str
    engine: Engine
    tokenizer: Any
    settings: dict[str, Any] = field(default_factory=dict)
    beta: float | None = None
    guide: str | None = None


def evaluate(
    tasks: Sequence[Problems],
    model: Model,
    out: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    until: Stage = "report",
    shard_prompts: int | None = None,
    show: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Runs the stages up to `until`, or with `resume` what is left of them. show: one prompt of each benchmark.

    Errors, all before any generation: UserError naming `out`, `prompt`, `max_tokens` or, on resume, what is not as it was.
    """
    prompts = [render_prompts(task, model) for task in tasks]
    with reserved(out):
        check_folder(out, resume)
        remove_scratch(out)
        engine = model.engine
        write_run(
            out,
            tasks,
            model=model.name,
            fingerprint=engine.fingerprint,
            context=engine.context,
            seed=seed,
            settings={**model.settings, **({"beta": model.beta} if model.beta is not None else {})},
        )
        for task, rendered in zip(tasks, prompts, strict=True):
            name, first = task.benchmark.name, rendered[0]
            write_prompts(out / name, task, rendered, model.tokenizer)
            if show:
                say(
                    f"{name}: {len(rendered)} problems, n = {task.benchmark.n}; the prompt of {first.id} ({len(first.ids)} tokens):"
                )
                say(model.tokenizer.decode(first.ids, skip_special_tokens=False))
        if until == "render":
            return
        for task, rendered in zip(tasks, prompts, strict=True):
            with timed(out, task.benchmark.name, "generate"):
                generate(out / task.benchmark.name, task.benchmark, rendered, model, seed, shard_prompts)
        if until != "generate":
            regrade(out, [task.benchmark.name for task in tasks], say=say)
        if until == "report":
            write_reports(out, say=say)


def render_prompts(task: Problems, model: Model) -> list[Prompt]:
    """Errors: UserError naming `model` (no chat template), or `prompt` or `max_tokens`, which exceed the context."""
    benchmark, prompts = task.benchmark, []
    for row in task.rows:
        messages = messages_for(row, benchmark.prompt, exemplars=task.exemplars, system=benchmark.system)
        ids = tuple((render if benchmark.chat else render_text)(model.tokenizer, messages))
        prompts.append(Prompt(row["id"], messages, ids, row["answer"]))
    _check_lengths(prompts, benchmark, model.engine.context)
    return prompts


def _check_lengths(prompts: Sequence[Prompt], benchmark: Benchmark, context: int) -> None:
    """By the longest prompt: what is made to fit it fits them all."""
    sampling = benchmark.sampling(0)
    lengths = [len(prompt.ids) for prompt in prompts]
    for length in (min(lengths), max(lengths)):
        prompt = prompts[lengths.index(length)]
        try:
            check_request(Request(0, prompt.ids, sampling), context, f"{benchmark.name} row {prompt.id!r}")
        except UserError as error:
            beyond = sum(not 0 < each <= context - sampling.max_tokens for each in lengths)
            longest = ", this is the longest" if length == max(lengths) else ""
            raise UserError(f"{error} ({beyond} of {len(prompts)} rows do not fit{longest})") from None


def generate(
    folder: Path,
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    model: Model,
    seed: int,
    shard_prompts: int | None = None,
) -> None:
    """The rollout table, and which stop text ended each completion."""
    table = collect(
        model.engine,
        model.tokenizer,
        prompts,
        samples=benchmark.n,
        sampling=benchmark.sampling(seed),
        out=folder / "rollouts",
        policy=model.name,
        settings=model.settings,
        beta=model.beta,
        guide=model.guide,
        shard_prompts=shard_prompts,
        resume=True,
    )
    if benchmark.stop:
        ended = zip(table.column("completion_ids"), table.column("finish_reason"), strict=True)
        texts = [
            model.tokenizer.decode(ids, skip_special_tokens=True) if reason == "stop" else "" for ids, reason in ended
        ]
        write_json(folder / "stops.json", [first_stop(text, benchmark.stop) for text in texts])


def regrade(
    out: Path, names: Sequence[str] | None = None, *, again: bool = False, say: Callable[[str], None] = print
) -> None:
    """Grades what is generated; no model is needed. Errors: UserError naming `dir` or `table`."""
    run = read_run(out)
    for name in names or run["benchmarks"]:
        with timed(out, name, "grade"):
            grade_benchmark(out / name, benchmark_of(run, name), again=again, say=say)

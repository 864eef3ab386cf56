"""From a model's name and a data set's to a graded rollout table, and a page that shows it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.data.load import Row, load_rows
from posttrain.data.prompts import shortened, template_for
from posttrain.decoding.guide import ValueGuide
from posttrain.decoding.vllm import VLLMGuide
from posttrain.errors import UserError
from posttrain.evaluation.arms import Arm, sampled_arms
from posttrain.evaluation.grades import grader_fingerprint
from posttrain.evaluation.metrics import MAX_SAMPLES, rates, token_stats
from posttrain.evaluation.plots import accuracy_curves, length_histogram
from posttrain.evaluation.report import Figure, write_report
from posttrain.models.load import Policy
from posttrain.pipelines.engines import Sampler
from posttrain.rollouts.collect import check_prompts, collect, prompts_for
from posttrain.rollouts.engine import LEAST_BETA, Sampling
from posttrain.rollouts.rollin import Prefix
from posttrain.rollouts.table import RolloutTable


@dataclass(frozen=True)
class RolloutConfig:
    """Which prompts, how many samples of each, how and by what they are sampled; `sampling.seed` draws generated problems too.

    least_samples: a prompt has as few as that, drawn evenly from there to `samples`; None: as many of each.
    """

    data: str
    split: str = "test"
    limit: int | None = None
    prompt: str | None = None
    samples: int = 8
    sampling: Sampling = field(default_factory=Sampling)
    slots: int = 64
    shard_prompts: int | None = None
    beta: float | None = None
    least_samples: int | None = None
    sampler: Sampler = field(default_factory=Sampler)

    def __post_init__(self) -> None:
        if self.beta is not None and not LEAST_BETA <= self.beta < math.inf:
            raise UserError(f"beta: must be at least {LEAST_BETA:g} and finite, got {self.beta}")
        for name in ("samples", "slots", "shard_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: must be at least 1, got {value}")
        if self.samples > MAX_SAMPLES:
            raise UserError(f"samples: at most {MAX_SAMPLES} per prompt, got {self.samples}")
        _ = self.template  # refused now, not after the model is loaded

    @property
    def template(self) -> str:
        return template_for(self.data, self.prompt)

    def rows(self) -> list[Row]:
        """The problems. Errors: UserError as `load_rows`."""
        return load_rows(self.data, self.split, self.limit, self.sampling.seed)


def rollout(
    policy: Policy,
    config: RolloutConfig,
    rows: Sequence[Row],
    out: Path,
    resume: bool,
    say: Callable[[str], None] = print,
    guide: ValueGuide | VLLMGuide | None = None,
    prefixes: Mapping[tuple[str, int], Prefix] | None = None,
) -> RolloutTable:
    """Shows one prompt as the model sees it, then collects; rows: those of the configuration.

    guide: of the configuration's engine, at its beta; prefixes: what was rolled in (see `collect`).
    Errors: UserError naming the field, before anything is sampled.
    """
    template = config.template
    prompts = prompts_for(rows, policy.tokenizer, template)
    grader = grader_fingerprint()[:16]
    with config.sampler.open(policy, config.slots, guide) as engine:
        check_prompts(prompts, engine, config.sampling, config.beta)
        say(f"prompt of row {prompts[0].id!r}, {len(prompts[0].ids)} tokens, as the model sees it:")
        say(shortened(policy.tokenizer.decode(prompts[0].ids, skip_special_tokens=False)))
        table = collect(
            engine,
            policy.tokenizer,
            prompts,
            samples=config.samples,
            least_samples=config.least_samples,
            sampling=config.sampling,
            out=out,
            policy=policy.name,
            settings={
                "source": f"{config.data}/{config.split}",
                "template": template,
                "grader": grader,
                **engine.settings,
            },
            beta=config.beta,
            guide=guide.name if guide else None,
            prefixes=prefixes,
            shard_prompts=config.shard_prompts,
            resume=resume,
        )
    if table.manifest["settings"].get("grader") != grader:
        say(f"{out} was graded by another version of the grader, and is kept; another folder would be graded anew")
    return table


def check_overlap(train: Sequence[Row], test: Sequence[Row]) -> None:
    """No test problem among the training ones: a file has no splits, and data sets have twins."""
    shared = {row["problem"] for row in train} & {row["problem"] for row in test}
    if shared:
        raise UserError(
            f"data: {len(shared)} test problems are training problems too, such as {min(shared)[:60]!r}; split them"
        )


def lengths_by_verdict(table: RolloutTable) -> dict[str, list[int]]:
    lengths: dict[str, list[int]] = {"right": [], "wrong": []}
    for ids, correct in zip(table.column("completion_ids"), table.column("correct"), strict=True):
        lengths["right" if correct else "wrong"].append(len(ids))
    return lengths


def figures_of(table: RolloutTable) -> dict[str, str]:
    """What one wants to know of a table first, as text."""
    shares = rates(
        finish_reasons=table.column("finish_reason"),
        answers=table.column("extracted"),
        verdicts=table.column("verdict"),
    )
    tokens = [len(ids) for ids in table.column("completion_ids")]
    stats = token_stats(tokens)
    return {
        "prompts": str(len(table.by_prompt("correct"))),
        "completions": str(len(table)),
        "accuracy": f"{sum(table.column('correct')) / len(table):.3f}",
        "truncated": f"{shares['truncation']:.3f}",
        "answer found": f"{shares['answer_found']:.3f}",
        "grader errors": f"{shares['grader_error']:.3f}",
        "tokens, mean": f"{stats['mean']:.1f}",
        "tokens, p95": f"{stats['p95']:.0f}",
        **({"KL, nats": _mean_kl(table)} if any(table.column("guide")) else {}),
        "tokens/s": f"{sum(tokens) / max(table.manifest['seconds'], 1e-9):.0f}",
    }


def _mean_kl(table: RolloutTable) -> str:
    return "not known" if table.is_lazy else f"{sum(table.column('kl')) / len(table):.3f}"


def _own_arm(table: RolloutTable, arm: Arm) -> Arm:
    """Of a table alone nothing says that its policy is a base, from which others differ."""
    if not any(table.column("guide")):
        return replace(arm, name="model")
    measures = {} if table.is_lazy else {"kl": sum(table.column("kl")) / len(table)}
    return replace(arm, name="guided", title="one sample, guided", measures=measures)


def publish(table: RolloutTable) -> Path:
    """`report.html` in the table's folder."""
    correct = table.rectangle("correct")
    lengths = [[len(ids) for ids in row] for row in table.rectangle("completion_ids")]
    arms = sampled_arms(correct, table.rectangle("extracted"), lengths, table.manifest["seconds"])
    arms["base"] = _own_arm(table, arms["base"])
    settings = table.manifest["settings"]
    path = table.folder / "report.html"
    write_report(
        path,
        title=f"{settings['policy'].partition('@')[0]} on {settings['source']}",
        lead=", ".join(f"{name} {value}" for name, value in figures_of(table).items()) + ".",
        arms=arms if len(correct[0]) > 1 else {"base": arms["base"]},
        figures=[
            *(
                [Figure(accuracy_curves(arms), "Accuracy against the number of samples.")]
                if len(correct[0]) > 1
                else []
            ),
            Figure(length_histogram(lengths_by_verdict(table)), "Completion lengths by verdict."),
        ],
        table=table,
        scores=None,
        definitions=(
            *("pass@1", "maj@k", "pass@k", "tokens", "seconds"),
            *(("KL",) if arms["base"].measures else ()),
            *("truncation", "answer found", "grader error", "interval"),
        ),
        manifest=table.manifest,
    )
    return path

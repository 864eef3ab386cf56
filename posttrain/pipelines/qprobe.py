"""Q-Probe from beginning to end: sample, grade, read hidden states, fit a probe, re-rank held-out prompts, measure.

A run's folder: `train/` and `test/` (rollout tables), `features/` (cached hidden states), `probe/`, `summary.json`, `report.html`.
Tables and features that are finished are not made again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain import record
from posttrain.errors import UserError
from posttrain.evaluation.arms import Arm, reranked_arm, sampled_arms
from posttrain.evaluation.calibrate import apply_logistic, fit_logistic
from posttrain.evaluation.plots import accuracy_curves, calibration, length_histogram
from posttrain.evaluation.report import Figure, write_report
from posttrain.models.features import FeatureSpec, Pooling, all_specs, cached_features
from posttrain.models.load import Policy, end_ids, load_model
from posttrain.models.probe import Probe
from posttrain.pipelines.engines import EngineName, Sampler
from posttrain.pipelines.ranks import one_process
from posttrain.pipelines.rollout import RolloutConfig, check_overlap, lengths_by_verdict, rollout
from posttrain.provenance import plain, versions, write_json
from posttrain.rollouts.collect import check_folder
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.table import RolloutTable
from posttrain.trainers.probe import ProbeConfig, ProbeResult, ProbeTrainer


@dataclass(frozen=True)
class QProbeConfig:
    """Settings of a run; the defaults are the embedded model's."""

    out: str = field(metadata={"help": "the run's folder"})
    model: str = field(default="tiny", metadata={"help": "tiny, a folder, a .gguf file or a hub id"})
    data: str = field(default="arithmetic", metadata={"help": "a data set or a file; see posttrain rollout --help"})
    prompt: str | None = field(default=None, metadata={"help": "the user turn, with a {problem} placeholder"})
    train_split: str = field(default="train", metadata={"help": "where the probe's prompts come from"})
    train_prompts: int = field(default=300, metadata={"help": "how many of them"})
    train_samples: int = field(default=8, metadata={"help": "completions per training prompt"})
    test_split: str = field(default="test", metadata={"help": "where re-ranking is measured"})
    test_prompts: int = field(default=500, metadata={"help": "how many of its prompts"})
    k: int = field(default=8, metadata={"help": "completions per test prompt, one of which is chosen"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    top_p: float = field(default=1.0, metadata={"help": "of sampling"})
    max_tokens: int = field(default=192, metadata={"help": "at most so many tokens per completion"})
    layers: tuple[int, ...] = field(
        default=(), metadata={"help": "candidate layers (0 = embeddings); none named: every one"}
    )
    poolings: tuple[Pooling, ...] = field(default=("last", "mean"), metadata={"help": "candidate poolings: last, mean"})
    probe: ProbeConfig = field(default_factory=ProbeConfig, metadata={"help": "the probe's own settings"})
    engine: EngineName = field(
        default="transformers", metadata={"help": "what samples: transformers, vllm, service or ray"}
    )
    urls: tuple[str, ...] = field(default=(), metadata={"help": "of the service: where posttrain rollout-service runs"})
    slots: int = field(default=64, metadata={"help": "requests in the running batch"})
    shard_prompts: int = field(default=50, metadata={"help": "prompts per shard: what is redone after an interruption"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one"})
    dtype: str | None = field(
        default=None, metadata={"help": "float32 or bfloat16; default: bfloat16 on cuda, else float32"}
    )
    seed: int = field(default=0, metadata={"help": "of problems and completions; the probe has its own"})

    def __post_init__(self) -> None:
        for name in ("train_prompts", "train_samples", "test_prompts", "k"):
            if getattr(self, name) < 2:
                raise UserError(f"{name}: must be at least 2, got {getattr(self, name)}")
        if self.train_split == self.test_split:
            raise UserError(f"test_split: {self.test_split} is the training split too; measure on another one")

    def plan(self, split: str, prompts: int, samples: int) -> RolloutConfig:
        """How one split is sampled."""
        sampling = Sampling(self.temperature, self.top_p, max_tokens=self.max_tokens, seed=self.seed)
        return RolloutConfig(
            self.data,
            split,
            prompts,
            self.prompt,
            samples,
            sampling,
            self.slots,
            self.shard_prompts,
            sampler=Sampler(self.engine, self.urls, self.dtype),
        )


@dataclass(frozen=True)
class QProbeRun:
    """What a run leaves: its tables, the fitted probe, test scores [prompts, k], and the arms."""

    config: QProbeConfig
    policy: Policy
    train: RolloutTable
    test: RolloutTable
    fitted: ProbeResult
    train_scores: torch.Tensor
    scores: torch.Tensor
    arms: dict[str, Arm]

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {
            "config": plain(self.config),
            "policy": {"name": self.policy.name, "fingerprint": self.policy.fingerprint},
            "probe": {"feature": str(self.fitted.spec), **self.fitted.metrics},
            "versions": versions(),
        }


def run(config: QProbeConfig, say: Callable[[str], None] = print, tables_in: Path | None = None) -> QProbeRun:
    """tables_in: the folder of `train` and `test`; default: the run's own.

    Errors: UserError naming the field, before anything is sampled where that is possible.
    """
    one_process("the probe is fitted in seconds; start it without a launcher")
    out, tables_in = Path(config.out), tables_in or Path(config.out)
    plans = {
        "train": config.plan(config.train_split, config.train_prompts, config.train_samples),
        "test": config.plan(config.test_split, config.test_prompts, config.k),
    }
    rows = {part: plan.rows() for part, plan in plans.items()}
    check_overlap(rows["train"], rows["test"])
    for part in plans:
        check_folder(tables_in / part, resume=True)
    policy = load_model(config.model, config.device, config.dtype)
    all_specs(policy.model, config.layers, config.poolings)  # before hours of sampling
    tables = {}
    for part, plan in plans.items():
        say(f"{plan.split}: {plan.samples} samples of each of {len(rows[part])} prompts")
        tables[part] = rollout(policy, plan, rows[part], tables_in / part, resume=True, say=say)
    train, test = tables["train"], tables["test"]
    started = time.perf_counter()
    fitted, train_scores = fit(policy, train, config, out / "features")
    fitted.probe.save_pretrained(out / "probe")
    for look, value in enumerate(fitted.curve):
        record.log(out / "probe", look * config.probe.eval_steps, {"held_out_reward": value})
    say(
        f"probe on {fitted.spec}; on {len(fitted.held_out)} held-out prompts, reward {fitted.metrics['base']:.3f} of one "
        f"sample -> {fitted.metrics['value']:.3f} of the best of {fitted.k} (of {config.train_samples} sampled)"
    )
    scores = score(policy, fitted.probe, test, out / "features")
    learned = time.perf_counter() - started

    correct = test.rectangle("correct")
    lengths = [[len(ids) for ids in row] for row in test.rectangle("completion_ids")]
    arms = sampled_arms(correct, test.rectangle("extracted"), lengths, test.manifest["seconds"])
    seconds = test.manifest["seconds"] + train.manifest["seconds"] + learned
    arms["qprobe"] = reranked_arm("qprobe", f"Q-Probe, best of {config.k}", scores.tolist(), correct, lengths, seconds)
    return QProbeRun(config, policy, train, test, fitted, train_scores, scores, arms)


def publish(run: QProbeRun, title: str, lead: str) -> None:
    """`summary.json` and `report.html` in the run's folder."""
    out = Path(run.config.out)
    summary = {name: arm.summary() for name, arm in run.arms.items()}
    write_json(out / "summary.json", {"arms": summary, "manifest": run.manifest})
    write_report(
        out / "report.html",
        title=title,
        lead=lead,
        arms=run.arms,
        figures=figures(run),
        table=run.test,
        scores=run.scores.tolist(),
        definitions=("pass@1", "maj@k", "best-of-k", "pass@k", "tokens", "seconds", "interval"),
        manifest=run.manifest,
    )


def figures(run: QProbeRun) -> list[Figure]:
    correct = np.array(run.test.rectangle("correct"), dtype=np.float64)
    held_out = list(run.fitted.held_out)
    held_out_correct = np.array(run.train.rectangle("correct"), dtype=np.float64)[held_out]
    platt = fit_logistic(run.train_scores[held_out].double().numpy().ravel(), held_out_correct.ravel())
    probabilities = apply_logistic(run.scores.double().numpy().ravel(), platt)
    return [
        Figure(
            accuracy_curves(run.arms), "Accuracy against the number of samples. The bar at the end is the interval."
        ),
        Figure(
            calibration(probabilities, correct.ravel()),
            "Calibration of the probe on test completions, after a logistic map fitted on prompts that it was not "
            "trained on.",
        ),
        Figure(length_histogram(lengths_by_verdict(run.test)), "Completion lengths by verdict."),
    ]


def fit(policy: Policy, table: RolloutTable, config: QProbeConfig, cache: Path) -> tuple[ProbeResult, torch.Tensor]:
    """A probe on the table's completions, and its scores of them [prompts, samples]."""
    table.expect_policy(policy.fingerprint)
    specs = all_specs(policy.model, config.layers, config.poolings)
    rewards = torch.tensor(table.rectangle("reward"))
    features = _features(policy, table, specs, cache)
    result = ProbeTrainer(config.probe).fit(
        features.view(*rewards.shape, len(specs), -1), rewards, specs=specs, policy=policy.fingerprint
    )
    return result, result.probe.score(features[:, specs.index(_spec(result.probe))]).view(rewards.shape)


def score(policy: Policy, probe: Probe, table: RolloutTable, cache: Path) -> torch.Tensor:
    """The probe's scores of a table's completions, [prompts, samples]."""
    table.expect_policy(policy.fingerprint)
    probe.check_policy(policy.fingerprint)
    features = _features(policy, table, [_spec(probe)], cache)
    return probe.score(features[:, 0]).view(len(table.rectangle("reward")), -1)


def _features(policy: Policy, table: RolloutTable, specs: list[FeatureSpec], cache: Path) -> torch.Tensor:
    rows = list(zip(table.column("prompt_ids"), table.column("completion_ids"), strict=True))
    name = f"{policy.fingerprint}/{policy.model.dtype}/{policy.model.device.type}"
    stop_ids = end_ids(policy.model, policy.tokenizer)
    return cached_features(cache, name, policy.model, rows, specs, stop_ids=sorted(stop_ids))


def _spec(probe: Probe) -> FeatureSpec:
    if probe.card.feature is None:
        raise UserError("probe: it reads embeddings from elsewhere, not a model's hidden states")
    return probe.card.feature

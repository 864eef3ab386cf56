"""The main job on the embedded model: every method of the toolkit on one task, one table, one report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.report import write_report
from posttrain.pipelines import baselines, dqo, qprobe, qsharp
from posttrain.pipelines.dqo import DQOTraining
from posttrain.pipelines.qprobe import QProbeConfig, QProbeRun
from posttrain.pipelines.qsharp import QSharpConfig, QSharpRun
from posttrain.pipelines.value_training import ValueTraining
from posttrain.provenance import write_json
from posttrain.trainers.baselines import BaselineTraining
from posttrain.trainers.probe import ProbeConfig

LEAD = (
    "The embedded model solves multi-step arithmetic. It learned from careful writers, who carry, and from hurried ones, who "
    "drop the carry the same wrong way every time: so a majority vote hardly helps. Q-Probe re-ranks its samples; Q# learns "
    "which token leads to a right answer and guides it there (CD: the same value model, by its mean); DQO writes what it learned into "
    "the weights, beside rejection sampling, which trains on the right samples alone."
)
# Half the policy's size, and well past what it takes to know which chains come out right.
VALUE = ValueTraining(head="v", layers=2, learning_rate=1e-3, head_learning_rate=3e-3, epochs=4.0)
TRAINED_SAMPLES = 2  # of a trained policy per test problem
ORDER = (
    *("base", "majority", "oracle", "qprobe", "qsharp", "qsharp_2", "cd", "qsharp_best", "qsharp_vote"),
    *("rejection", "dqo"),
)


@dataclass(frozen=True)
class DemoRun:
    """What the methods left; all of them learned from the completions of `out`/train and are measured on the same problems."""

    qprobe: QProbeRun
    qsharp: QSharpRun
    trained: dict[str, Arm]
    training: dict[str, dict[str, Any]]

    @property
    def arms(self) -> dict[str, Arm]:
        arms = {**self.qprobe.arms, **self.qsharp.arms, **self.trained}
        return {name: arms[name] for name in ORDER}

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {"qprobe": self.qprobe.manifest, "qsharp": self.qsharp.manifest, **self.training}


def demo(out: Path, seed: int = 0, say: Callable[[str], None] = print) -> DemoRun:
    """Samples, grades, learns, re-ranks, guides and measures; writes `summary.json` and `report.html` into `out`."""
    probe = qprobe.run(QProbeConfig(out=str(out), seed=seed, probe=ProbeConfig(seed=seed)), say)
    guided = qsharp.run(QSharpConfig(out=str(out), seed=seed, sweep=(0.3, 1.0), value=VALUE), say=say)
    assert guided is not None
    result = DemoRun(probe, guided, *train_policies(probe, out, seed, say))
    summary = {name: arm.summary() for name, arm in result.arms.items()}
    write_json(out / "summary.json", {"arms": summary, "frontier": guided.points, "manifest": result.manifest})
    write_report(
        out / "report.html",
        title="posttrain demo",
        lead=LEAD,
        arms=result.arms,
        figures=[*qprobe.figures(probe), *qsharp.figures(guided)],
        table=probe.test,
        scores=probe.scores.tolist(),
        definitions=(
            "pass@1",
            "maj@k",
            "pass@k",
            "Q#",
            "CD",
            "reward model",
            "best-of-k",
            "weighted majority",
            "KL",
            "tokens",
            "seconds",
            "interval",
        ),
        manifest=result.manifest,
    )
    return result


def train_policies(
    probe: QProbeRun, out: Path, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, Arm], dict[str, dict[str, Any]]]:
    """Rejection sampling and DQO on the probe's training table, measured on its test problems: arms, and how they were trained."""
    policy, table, settings = probe.policy, probe.train, DQOTraining()
    plan = probe.config.plan(probe.config.test_split, probe.config.test_prompts, TRAINED_SAMPLES)
    rows = plan.rows()
    beside = baselines.run_baseline(
        "rejection", policy, table, BaselineTraining(), out / "rejection", plan, rows, seed, say
    )
    made = dqo.train(policy, table, settings, out / "dqo" / "policy", seed, say)
    learned = table.manifest["seconds"] + made["seconds"]
    arm, _ = baselines.measure("dqo", dqo.title(settings), out / "dqo", policy, plan, rows, learned)
    return {"rejection": beside.arm, "dqo": arm}, {"rejection": beside.training, "dqo": made}

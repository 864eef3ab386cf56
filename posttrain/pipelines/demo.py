"""The main job on the embedded model: every method of the toolkit on one task, one table, one report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.evaluation.arms import Arm
from posttrain.evaluation.report import write_report
from posttrain.pipelines import qprobe, qsharp
from posttrain.pipelines.qprobe import QProbeConfig, QProbeRun
from posttrain.pipelines.qsharp import QSharpConfig, QSharpRun
from posttrain.pipelines.value_training import ValueTraining
from posttrain.provenance import write_json
from posttrain.trainers.probe import ProbeConfig

LEAD = (
    "The embedded model solves multi-step arithmetic. It learned from careful writers, who carry, and from hurried ones, who "
    "drop the carry the same wrong way every time: so a majority vote hardly helps. Q-Probe re-ranks its samples; Q# learns "
    "which token leads to a right answer and guides it there (CD: the same value model, by its mean)."
)
# Half the policy's size, and well past what it takes to know which chains come out right.
VALUE = ValueTraining(head="v", layers=2, learning_rate=1e-3, head_learning_rate=3e-3, epochs=4.0)
ORDER = ("base", "majority", "oracle", "qprobe", "qsharp", "qsharp_2", "cd", "qsharp_best", "qsharp_vote")


@dataclass(frozen=True)
class DemoRun:
    """What the methods left; all of them learned from the completions of `out`/train and are measured on the same problems."""

    qprobe: QProbeRun
    qsharp: QSharpRun

    @property
    def arms(self) -> dict[str, Arm]:
        arms = {**self.qprobe.arms, **self.qsharp.arms}
        return {name: arms[name] for name in ORDER}

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {"qprobe": self.qprobe.manifest, "qsharp": self.qsharp.manifest}


def demo(out: Path, seed: int = 0, say: Callable[[str], None] = print) -> DemoRun:
    """Samples, grades, learns, re-ranks, guides and measures; writes `summary.json` and `report.html` into `out`."""
    probe = qprobe.run(QProbeConfig(out=str(out), seed=seed, probe=ProbeConfig(seed=seed)), say)
    guided = qsharp.run(QSharpConfig(out=str(out), seed=seed, sweep=(0.3, 1.0), value=VALUE), say=say)
    assert guided is not None
    result = DemoRun(probe, guided)
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

"""The main job on the embedded model: every method of the toolkit on one task, one table, one report."""

from collections.abc import Callable
from pathlib import Path

from posttrain.pipelines.qprobe import QProbeConfig, QProbeRun, publish, run
from posttrain.trainers.probe import ProbeConfig

LEAD = (
    "The embedded model solves multi-step arithmetic. It learned from careful writers, who carry, and from hurried ones, who "
    "drop the carry the same wrong way every time: so a majority vote hardly helps, and knowing which chain to trust does."
)


def demo(out: Path, seed: int = 0, say: Callable[[str], None] = print) -> QProbeRun:
    """Samples, grades, learns, re-ranks and measures; writes `summary.json` and `report.html` into `out`."""
    result = run(QProbeConfig(out=str(out), seed=seed, probe=ProbeConfig(seed=seed)), say)
    publish(result, "posttrain demo", LEAD)
    return result

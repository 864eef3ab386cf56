"""Re-ranking 8 samples by the probe, one row per training loss: seeds x held-out prompts, with intervals over prompts.

    python benchmarks/qprobe.py --out runs/benchmark_qprobe

The paper (Li et al. 2024, table 1) finds policy > BCE > MSE on MBPP. Every loss here sees the same samples.
"""

import argparse
from pathlib import Path

import numpy as np

from posttrain.cli.tables import print_table
from posttrain.evaluation.intervals import mean_interval
from posttrain.pipelines.qprobe import QProbeConfig, run
from posttrain.trainers.probe import ProbeConfig

LOSSES = ("policy", "bce", "mse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_qprobe"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    scores: dict[str, list[np.ndarray]] = {}
    specs: dict[str, list[str]] = {}
    for seed in range(args.seeds):
        for loss in LOSSES:
            config = QProbeConfig(out=str(args.out / str(seed)), seed=seed, probe=ProbeConfig(loss=loss, seed=seed))
            result = run(config, say=lambda _: None)
            scores.setdefault(f"probe, {loss} loss", []).append(result.arms["qprobe"].per_problem)
            specs.setdefault(f"probe, {loss} loss", []).append(str(result.fitted.spec))
        for name in ("base", "majority", "oracle"):
            scores.setdefault(result.arms[name].title, []).append(result.arms[name].per_problem)
    rows = []
    for name, parts in scores.items():
        problems = np.concatenate(parts)
        low, high = mean_interval(problems)
        seeds = ", ".join(f"{100 * part.mean():.1f}" for part in parts)
        rows.append(
            (
                name,
                f"{100 * problems.mean():.1f} %",
                f"{100 * low:.1f} - {100 * high:.1f}",
                seeds,
                "; ".join(specs.get(name, [])),
            )
        )
    print_table(("arm", "accuracy", "95 % interval", "per seed", "features"), rows)


if __name__ == "__main__":
    main()

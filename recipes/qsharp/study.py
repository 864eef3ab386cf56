"""The recipe in several seeds: what each arm is right in, and what guidance gains over the model, its votes, CD and round one.

    python -m recipes.qsharp.study [--config recipes/qsharp/arithmetic.yaml] [--seeds 0 1 2] [--out FOLDER]

Every seed is a run of `posttrain qsharp` in its own folder, FOLDER/seed-N; what is finished there is kept. Prints two tables, by
seed and over all of them, and writes them into the folder as study.json. Intervals are over problems, of which every seed draws
its own; a difference is paired by problem. How far trainings of different seeds differ is seen by comparing the seeds.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.cli.tables import percent_range, print_differences, print_table
from posttrain.config import build, read_yaml
from posttrain.evaluation.arms import Arm
from posttrain.evaluation.intervals import mean_interval
from posttrain.models.value import read_value_model
from posttrain.pipelines.qsharp import QSharpConfig, QSharpRun, comparisons, guide_folder, publish, run
from posttrain.provenance import write_json


@dataclass(frozen=True)
class Result:
    """Of one arm: its score by problem [prompts], and its KL to the reference in nats, None where it is not guided."""

    accuracy: NDArray[np.float64]
    kl: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/qsharp/arithmetic.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="instead of the configuration's")
    args = parser.parse_args()
    config = build(QSharpConfig, read_yaml(args.config))
    out = args.out or Path(config.out)
    found = study(config, args.seeds, out)
    write_json(out / "study.json", found)
    print_study(found)


def study(config: QSharpConfig, seeds: Sequence[int], out: Path) -> dict[str, dict[str, Any]]:
    """Seed, and `all` -> figures. Writes a run for each seed into `out`."""
    results, sizes = {}, {}
    for seed in seeds:
        result = run(replace(config, out=str(out / f"seed-{seed}"), seed=seed))
        assert result is not None
        publish(result, f"Q#, seed {seed}", f"One of the seeds of {config.data}'s study.")
        results[str(seed)], sizes = measure(result.arms), parameters(result)
    results["all"] = {arm: pooled([arms[arm] for arms in results.values()]) for arm in results[str(seeds[0])]}
    return {seed: {**figures(arms), "parameters": sizes} for seed, arms in results.items()}


def measure(arms: Mapping[str, Arm]) -> dict[str, Result]:
    return {name: Result(arm.per_problem, arm.measures.get("kl")) for name, arm in arms.items()}


def parameters(result: QSharpRun) -> dict[str, int]:
    """How many the policy and the value model have."""
    folder = guide_folder(Path(result.config.out), result.config.history, result.config.rounds)
    models = {"policy": result.policy.model, "value": read_value_model(folder, result.policy)}
    return {name: sum(weights.numel() for weights in model.parameters()) for name, model in models.items()}


def pooled(results: Sequence[Result]) -> Result:
    """All seeds' problems together."""
    kls = [result.kl for result in results if result.kl is not None]
    return Result(np.concatenate([result.accuracy for result in results]), float(np.mean(kls)) if kls else None)


def figures(arms: Mapping[str, Result]) -> dict[str, Any]:
    """arms: accuracy, interval and KL; differences: of the last round to what it is measured against."""
    return {
        "arms": {
            name: {"accuracy": float(arm.accuracy.mean()), "interval": mean_interval(arm.accuracy), "kl": arm.kl}
            for name, arm in arms.items()
        },
        "differences": comparisons({name: arm.accuracy for name, arm in arms.items()}),
    }


def print_study(found: Mapping[str, Mapping[str, Any]]) -> None:
    for seed, of_seed in found.items():
        rows = [
            (
                name,
                f"{100 * arm['accuracy']:.1f} %",
                percent_range(*arm["interval"]),
                "" if arm["kl"] is None else f"{arm['kl']:.3f}",
            )
            for name, arm in of_seed["arms"].items()
        ]
        print_table((f"seed {seed}", "accuracy", "95 % interval", "KL, nats"), rows)
        print_differences(of_seed["differences"])
        print()
    sizes = next(iter(found.values()))["parameters"]
    print(f"parameters: policy {sizes['policy']}, value model {sizes['value']}")


if __name__ == "__main__":
    main()

"""Runs of one recipe in several seeds: what each arm is right in and how long it writes, and what DQO gains over every other.

    python -m recipes.dqo.study RUN RUN ... [--out study.json]

Every RUN is the folder of a finished `posttrain dqo`; they differ in their seeds alone. Prints a table by seed and over all of
them. Intervals are over problems, of which every seed draws its own; differences and ratios are paired by problem. How far
trainings of different seeds differ is seen by comparing the seeds.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.cli.tables import percent_range, points, print_table
from posttrain.errors import UserError
from posttrain.evaluation.intervals import mean_interval, paired_comparison, paired_ratio
from posttrain.provenance import write_json
from posttrain.rollouts.table import read_table

COLUMNS = (
    *("seed", "arm", "accuracy", "95 % interval", "tokens\nper answer", "of base's", "95 % interval"),
    *("DQO - it,\npoints", "95 % interval,\npaired", "p"),
)


@dataclass(frozen=True)
class Result:
    """Of one arm, by problem [prompts]: pass@1, and the mean length of its answers in tokens."""

    accuracy: NDArray[np.float64]
    tokens: NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, help="a JSON file of all figures")
    args = parser.parse_args()
    found = study(args.runs)
    if args.out:
        write_json(args.out, found)
    print_table(COLUMNS, [cells(seed, arm, row) for seed, arms in found.items() for arm, row in arms.items()])


def study(runs: Sequence[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Seed, and `all`, -> arm -> its figures. Errors: UserError naming `runs` that are of different recipes, or of one seed."""
    configs = [json.loads((run / "summary.json").read_text(encoding="utf-8"))["manifest"]["config"] for run in runs]
    recipes = [{name: value for name, value in config.items() if name not in ("out", "seed")} for config in configs]
    if any(recipe != recipes[0] for recipe in recipes) or len({config["seed"] for config in configs}) < len(runs):
        raise UserError("runs: they must be of one recipe, and differ in their seeds")
    results = {
        str(config["seed"]): measure(run, config["baselines"]) for run, config in zip(runs, configs, strict=True)
    }
    first = next(iter(results.values()))
    results["all"] = {arm: pooled([arms[arm] for arms in results.values()]) for arm in first}
    return {seed: figures(arms) for seed, arms in results.items()}


def measure(run: Path, baselines: Sequence[str]) -> dict[str, Result]:
    """The starting policy, DQO's, and every baseline's."""
    folders = {"base": "test", "dqo": "trained", **{name: f"{name}/trained" for name in baselines}}
    results = {}
    for name, folder in folders.items():
        table = read_table(run / folder)
        lengths = [[len(ids) for ids in row] for row in table.rectangle("completion_ids")]
        results[name] = Result(np.mean(table.rectangle("correct"), axis=1), np.mean(lengths, axis=1))
    return results


def pooled(results: Sequence[Result]) -> Result:
    """All seeds' problems together."""
    return Result(
        np.concatenate([result.accuracy for result in results]), np.concatenate([result.tokens for result in results])
    )


def figures(arms: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Accuracy and length of each; of all but the base, the length over the base's; of all but DQO, what DQO gains over it."""
    found = {}
    for name, arm in arms.items():
        found[name] = row = {
            "accuracy": float(arm.accuracy.mean()),
            "interval": mean_interval(arm.accuracy),
            "tokens": float(arm.tokens.mean()),
        }
        if name != "base":
            row["ratio"] = paired_ratio(arm.tokens, arms["base"].tokens)
        if name != "dqo":
            row["gain"] = paired_comparison(arms["dqo"].accuracy, arm.accuracy)
    return found


def cells(seed: str, arm: str, row: Mapping[str, Any]) -> list[str]:
    shown = [seed, arm, f"{100 * row['accuracy']:.1f} %", percent_range(*row["interval"]), f"{row['tokens']:.1f}"]
    if "ratio" in row:
        ratio, low, high = row["ratio"]
        shown += [f"{ratio:.3f}", f"{low:.3f} - {high:.3f}"]
    else:
        shown += ["", ""]
    return shown + ([*points(row["gain"]), f"{row['gain'].p_value:.2g}"] if "gain" in row else [""] * 3)


if __name__ == "__main__":
    main()

"""The recipe in several seeds: what each arm is right in, and how much of what can be removed is gone.

    python -m recipes.grpo_lambda.study [--config recipes/grpo_lambda/arithmetic.yaml] [--seeds 0 1 2]

Every seed is a run of `posttrain grpo-lambda` in its own folder; what is finished there is kept. Prints a table, by seed and
over all of them, and writes it into the folder as study.json. Intervals are over problems, of which every seed draws its own.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.cli.tables import percent_range, points, print_table
from posttrain.config import build, read_yaml
from posttrain.evaluation.intervals import mean_interval, paired_comparison
from posttrain.evaluation.removable import Removable, removable, removed
from posttrain.pipelines.grpo_lambda import GRPOLambdaRun, GRPOLambdaRunConfig, publish, run
from posttrain.provenance import plain, write_json

COLUMNS = (
    *("seed", "arm", "accuracy", "95 % interval", "tokens\nper answer", "tokens of\nright ones", "removable"),
    *("removed", "95 % interval", "accuracy\n- GRPO's", "95 % interval"),
)


@dataclass(frozen=True)
class Result:
    """Of one arm, by problem [prompts]."""

    accuracy: NDArray[np.float64]
    tokens: float
    lengths: Removable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/grpo_lambda/arithmetic.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="instead of the configuration's")
    args = parser.parse_args()
    config = build(GRPOLambdaRunConfig, read_yaml(args.config))
    out = args.out or Path(config.out)
    found = study(config, args.seeds, out)
    write_json(out / "study.json", found)
    print_table(COLUMNS, [_cells(seed, arm, row) for seed, arms in found.items() for arm, row in arms.items()])


def study(config: GRPOLambdaRunConfig, seeds: Sequence[int], out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Seed, and `all`, -> arm -> its figures. Writes a run for each seed into `out`."""
    results = {}
    for seed in seeds:
        result = run(replace(config, out=str(out / f"seed-{seed}"), seed=seed))
        assert result is not None  # of one process
        publish(result, f"GRPO-lambda, seed {seed}", f"One of the seeds of {config.data}'s study.")
        results[str(seed)] = measure(result)
    results["all"] = {arm: pooled([arms[arm] for arms in results.values()]) for arm in results[str(seeds[0])]}
    return {seed: figures(arms) for seed, arms in results.items()}


def measure(result: GRPOLambdaRun) -> dict[str, Result]:
    """The starting policy and every trained one."""
    return {
        name: Result(result.arms[name].per_problem, result.arms[name].tokens, removable(table, result.policy.tokenizer))
        for name, table in result.tables.items()
    }


def pooled(results: Sequence[Result]) -> Result:
    """All seeds' problems together."""
    lengths = [result.lengths for result in results]
    return Result(
        np.concatenate([result.accuracy for result in results]),
        float(np.mean([result.tokens for result in results])),
        Removable(*(np.concatenate([getattr(of, field.name) for of in lengths]) for field in fields(Removable))),
    )


def figures(arms: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Accuracy and lengths; for trained arms what they removed; where there is GRPO, the difference to it."""
    found = {}
    for name, arm in arms.items():
        found[name] = row = {
            "accuracy": float(arm.accuracy.mean()),
            "interval": mean_interval(arm.accuracy),
            "tokens": arm.tokens,
            "right_tokens": arm.lengths.mean_tokens,
            "removable": arm.lengths.mean,
        }
        if name != "base":
            row["removed"] = plain(removed(arm.lengths, arms["base"].lengths))
        if "grpo" in arms and name not in ("base", "grpo"):
            row["difference"] = paired_comparison(arm.accuracy, arms["grpo"].accuracy)
    return found


def _cells(seed: str, arm: str, row: Mapping[str, Any]) -> list[str]:
    cells = [seed, arm, f"{100 * row['accuracy']:.1f} %", percent_range(*row["interval"])]
    cells += [f"{row[name]:.1f}" for name in ("tokens", "right_tokens", "removable")]
    gone, against = row.get("removed"), row.get("difference")
    cells += [f"{100 * gone['share']:.1f} %", percent_range(gone["low"], gone["high"])] if gone else ["", ""]
    cells += points(against) if against else ("", "")
    return cells


if __name__ == "__main__":
    main()

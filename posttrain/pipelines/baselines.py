"""The baselines of DQO, from its own rollout table to a measured policy each (trainers/baselines.py).

METHOD/policy/      the trained policy, an ordinary folder
METHOD/trained/     its completions of the test problems
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.load import Row
from posttrain.errors import UserError
from posttrain.evaluation.arms import Arm, policy_arm
from posttrain.models.load import Policy, load_model, set_aside
from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.pipelines.ranks import Ranks, release
from posttrain.pipelines.rollout import RolloutConfig, rollout
from posttrain.pipelines.value_training import MADE_BY
from posttrain.provenance import hash_json, plain, read_json, versions, write_json
from posttrain.rollouts.table import RolloutTable
from posttrain.trainers.baselines import TRAINERS, BaselineTraining, Method
from posttrain.trainers.dqo_examples import check_vocabulary, examples_of

TITLES: dict[Method, str] = {"rejection": "rejection sampling, SFT", "dpo": "DPO", "kto": "KTO"}


@dataclass(frozen=True)
class Baseline:
    """One method's arm, what its training said of itself, and its completions of the test problems."""

    arm: Arm
    training: dict[str, Any]
    trained: RolloutTable


def measured(
    method: Method,
    made: dict[str, Any],
    policy: Policy,
    table: RolloutTable,
    out: Path,
    test_plan: RolloutConfig,
    test_rows: Sequence[Row],
) -> Baseline:
    """What a baseline's policy in `out`/policy does with the test problems; made: what `train` said of it."""
    learned = table.manifest.get("seconds", 0.0) + made["seconds"]
    arm, trained = measure(method, TITLES[method], out, policy, test_plan, test_rows, learned)
    return Baseline(arm, made, trained)


def measure(
    name: str, title: str, out: Path, start: Policy, plan: RolloutConfig, rows: Sequence[Row], seconds: float
) -> tuple[Arm, RolloutTable]:
    """What the policy in `out`/policy, trained from `start`, does with the test problems, in `out`/trained; seconds: to learn it."""
    after = load_model(str(out / "policy"), str(start.model.device), "float32")
    trained = rollout(after, plan, rows, out / "trained", resume=True, say=lambda _: None)
    return policy_arm(name, title, trained, seconds), trained


def train(
    method: Method,
    policy: Policy,
    table: RolloutTable,
    settings: BaselineTraining,
    folder: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Trains on a table of the policy's completions and saves; what was made by the same table and settings is kept.

    The policy's own model is left as it was. Returns what `made_by.json` says. ranks: those that train, all of which call
    this; default: this process alone, on the policy's device.
    Errors: UserError naming `policy` for a folder that something else made, or as the trainers and examples say.
    """
    key = hash_json([method, table.manifest["shards"], policy.fingerprint, seed, plain(settings)])
    if (folder / MADE_BY).is_file():
        made = read_json(folder / MADE_BY, "policy")
        if made["key"] != key:
            raise UserError(
                f"policy: {folder} was trained on other completions or with other settings; delete it, or give another out"
            )
        return made
    ranks = ranks or Ranks(str(policy.model.device))
    with set_aside(policy) if ranks.first else nullcontext():
        return _learn(method, policy, ranks, table, settings, folder, seed, key, say)


def _learn(
    method: Method,
    policy: Policy,
    ranks: Ranks,
    table: RolloutTable,
    settings: BaselineTraining,
    folder: Path,
    seed: int,
    key: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    from posttrain.trainers.follow import follow

    started = time.perf_counter()
    start = load_model(policy.name, ranks.device, "float32")
    check_vocabulary(table, start.tokenizer, start.model.get_input_embeddings().num_embeddings)
    scratch = folder.with_name(f"{folder.name}-checkpoints-{hash_json([key, *ranks.launch])[:12]}")
    trainer = TRAINERS[method](
        start.model, start.tokenizer, examples_of([table], policy.fingerprint, weighted=False), settings, scratch, seed
    )
    say(f"{TITLES[method]} on {len(trainer.train_dataset)} {'pairs' if method == 'dpo' else 'completions'}")
    with follow(trainer, folder) as clock:
        trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    rows = len(trainer.train_dataset)
    trainer.save_model(str(folder))
    if ranks.first:
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs: the settings stand below
    release(trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    made = {
        "key": key,
        "method": method,
        "policy": policy.fingerprint,
        "config": plain(settings),
        "seed": seed,
        "rows": rows,
        "last": {name: value for name, value in log[-1].items() if value == value} if log else {},
        "seconds": clock.earlier + time.perf_counter() - started,
        "processes": ranks.count,
        "versions": versions(),
    }
    if ranks.first:
        write_json(folder / MADE_BY, made)
        shutil.rmtree(scratch, ignore_errors=True)
    return made

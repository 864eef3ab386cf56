"""Several methods on one base, from one file: both tables once, every method on them, and all beside each other.

    train/, test/               rollout tables of the base, which the methods share
    STAGE/                      what a method's own command leaves
    STAGE/stage.json            what it was made from, as a fingerprint, and at its end what came out
    summary.json, report.html   every arm of every stage

A stage is run again only where its fingerprint has changed: that of its settings, of the files that these name, of the base,
of the tables, and of the problems where a method draws its own. What it had left is then set aside under the old fingerprint,
STAGE-FINGERPRINT/, and taken back when the change is undone. Killed at any moment, the same file goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from posttrain import record
from posttrain.config import build, within
from posttrain.data.load import Row
from posttrain.errors import UserError, nearest
from posttrain.evaluation.arms import SAMPLED, Arm, sampled_arms
from posttrain.evaluation.intervals import paired_comparison
from posttrain.evaluation.plots import token_plane
from posttrain.evaluation.report import Figure, write_report
from posttrain.models.load import load_model
from posttrain.pipelines import dqo, grpo_lambda, qprobe, qsharp
from posttrain.pipelines.ranks import one_process
from posttrain.pipelines.rollout import RolloutConfig, check_overlap, rollout
from posttrain.provenance import hash_json, plain, versions, write_json
from posttrain.record import STAGE
from posttrain.rollouts.collect import check_folder, reserved
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.table import RolloutTable, is_finished

# By the name of its command: where a method is, and the class of its configuration.
METHODS: dict[str, tuple[ModuleType, type]] = {
    "qprobe": (qprobe, qprobe.QProbeConfig),
    "qsharp": (qsharp, qsharp.QSharpConfig),
    "dqo": (dqo, dqo.DQORunConfig),
    "grpo-lambda": (grpo_lambda, grpo_lambda.GRPOLambdaRunConfig),
}
# Those draw their own training problems, which this gives, and no table of completions.
ONLINE: dict[str, Callable[[Any], list[Row]]] = {"grpo-lambda": grpo_lambda.problems}
# Fields of how the shared tables are sampled that the methods' own commands have, and a pipeline has not.
OF_TABLES = ("top_p", "least_train_samples", "engine", "urls")
DEFINED = ("pass@1", "maj@k", "pass@k", *(name for name in qsharp.DEFINED if name not in ("pass@1", "maj@k", "pass@k")))


@dataclass(frozen=True)
class PipelineConfig:
    """What the stages share, and the stages: each a mapping of `method`, `name` (default: the method) and any other field of
    that method's own configuration."""

    out: str = field(metadata={"help": "the run's folder; a stage's is OUT/NAME"})
    stages: tuple[dict[str, Any], ...] = field(metadata={"help": "method, name, and the method's own fields"})
    title: str | None = field(default=None, metadata={"help": "the report's; default: model and data"})
    about: str = field(default="", metadata={"help": "the report's first paragraph"})
    model: str = field(default="tiny", metadata={"help": "the base: tiny, a folder, a .gguf file or a hub id"})
    data: str = field(default="arithmetic", metadata={"help": "a data set or a file; see posttrain rollout --help"})
    prompt: str | None = field(default=None, metadata={"help": "the user turn, with a {problem} placeholder"})
    train_split: str = field(default="train", metadata={"help": "where training prompts come from"})
    train_prompts: int = field(default=300, metadata={"help": "how many of them the offline methods have"})
    train_samples: int = field(default=8, metadata={"help": "completions per training prompt"})
    test_split: str = field(default="test", metadata={"help": "where everything is measured"})
    test_prompts: int = field(default=500, metadata={"help": "how many of its prompts"})
    k: int = field(default=8, metadata={"help": "completions of the base per test prompt"})
    temperature: float = field(default=1.0, metadata={"help": "of all sampling"})
    max_tokens: int = field(default=192, metadata={"help": "at most so many tokens per completion"})
    slots: int = field(default=64, metadata={"help": "requests in the running batch"})
    shard_prompts: int = field(default=50, metadata={"help": "prompts per shard: what is redone after an interruption"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one"})
    dtype: str | None = field(
        default=None, metadata={"help": "of a base that is only read; default: bfloat16 on cuda, else float32"}
    )
    seed: int = field(default=0, metadata={"help": "of problems, completions and training; a probe has its own"})

    def __post_init__(self) -> None:
        for name in ("train_prompts", "train_samples", "test_prompts", "k"):
            if getattr(self, name) < 2:
                raise UserError(f"{name}: must be at least 2, got {getattr(self, name)}")
        if not self.stages:
            raise UserError(f"stages: name at least one, such as {{method: {next(iter(METHODS))}}}")
        if self.train_split == self.test_split:
            raise UserError(f"test_split: {self.test_split} is the training split too; measure on another one")
        stages_of(self)

    def plan(self, part: str) -> RolloutConfig:
        """How the table `train` or `test` is sampled."""
        split, prompts, samples = (
            (self.train_split, self.train_prompts, self.train_samples)
            if part == "train"
            else (self.test_split, self.test_prompts, self.k)
        )
        sampling = Sampling(self.temperature, max_tokens=self.max_tokens, seed=self.seed)
        return RolloutConfig(self.data, split, prompts, self.prompt, samples, sampling, self.slots, self.shard_prompts)


@dataclass(frozen=True)
class Stage:
    """One method; `config` is what its own command would be given."""

    name: str
    method: str
    config: Any


def stages_of(config: PipelineConfig) -> list[Stage]:
    """Errors: UserError naming the stage's field, as the method's command says it."""
    stages: list[Stage] = []
    for i, given in enumerate(config.stages):
        here = f"stages[{i}]"
        if not isinstance(given, dict):
            raise UserError(f"{here}: must be a mapping of field to value, got {given!r}")
        own = dict(given)
        method = own.pop("method", None)
        if method not in METHODS:
            raise UserError(
                f"{here}.method: must be one of {', '.join(METHODS)}, got {method!r}{nearest(str(method), METHODS)}"
            )
        name = own.pop("name", method)
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"{here}.name: must be a word of letters, digits, - and _, got {name!r}")
        if name in ("train", "test", *(stage.name for stage in stages)):
            raise UserError(f"{here}.name: {name} is another folder of the run; name it otherwise")
        shared = _shared(config, method)
        for taken in own.keys() & {"out", *shared}:
            raise UserError(f"{here}.{taken}: is the same for all stages; give it once, outside of them")
        for taken in own.keys() & {*OF_TABLES} if method not in ONLINE else ():
            raise UserError(f"{here}.{taken}: the stages share tables that the pipeline has sampled; leave it out")
        if "test_data" in own:
            raise UserError(f"{here}.test_data: all stages are measured on the same problems; leave it out")
        try:
            built: Any = build(METHODS[method][1], {**shared, **own, "out": str(Path(config.out) / name)})
            if method == "qsharp":
                qsharp.check_measured(built)
        except UserError as error:
            field = str(error).partition(":")[0]
            raise (error if field in shared else UserError(f"{here}.{error}")) from None
        stages.append(Stage(name, method, built))
    return stages


def _shared(config: PipelineConfig, method: str) -> dict[str, Any]:
    """What a method's configuration takes from the pipeline's: all fields that both have."""
    theirs = {field.name for field in dataclasses.fields(METHODS[method][1])} - {"out"}
    if method in ONLINE:
        theirs -= {"train_prompts"}
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in theirs}


@dataclass(frozen=True)
class Outcome:
    """What is known of a finished stage: its arms, its figures, points of accuracy against KL, a score of every test
    completion [prompts, k] where it has one, and what made it."""

    arms: dict[str, Arm]
    figures: list[Figure]
    points: list[dict[str, Any]]
    scores: list[list[float]] | None
    manifest: dict[str, Any]


@dataclass(frozen=True)
class PipelineRun:
    """policy: the base's fingerprint; arms: the base's, then those of every stage; tables: `test`, and `train` where one was
    needed."""

    config: PipelineConfig
    policy: str
    arms: dict[str, Arm]
    outcomes: dict[str, Outcome]
    tables: dict[str, RolloutTable]

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {
            "config": plain(self.config),
            "policy": {"name": self.config.model, "fingerprint": self.policy},
            "stages": {name: outcome.manifest for name, outcome in self.outcomes.items()},
            "versions": versions(),
        }


def run(config: PipelineConfig, say: Callable[[str], None] = print) -> PipelineRun:
    """Errors: UserError naming the field, before anything is sampled where that is possible."""
    one_process("the stages that train have commands of their own, which a launcher takes")
    out, stages = Path(config.out), stages_of(config)
    with reserved(out):
        policy, tables = _collect(config, stages, say)
        outcomes = {stage.name: _outcome(stage, policy, tables, say) for stage in stages}
    test = tables["test"]
    lengths = [[len(ids) for ids in row] for row in test.rectangle("completion_ids")]
    arms = sampled_arms(test.rectangle("correct"), test.rectangle("extracted"), lengths, test.manifest["seconds"])
    for outcome in outcomes.values():
        arms |= outcome.arms
    return PipelineRun(config, policy, arms, outcomes, tables)


def _collect(
    config: PipelineConfig, stages: list[Stage], say: Callable[[str], None]
) -> tuple[str, dict[str, RolloutTable]]:
    """The base's fingerprint and the tables. The base itself is let go: every stage loads what it needs, one after the other."""
    out = Path(config.out)
    parts = ["test"] if all(stage.method in ONLINE for stage in stages) else ["train", "test"]
    plans = {part: config.plan(part) for part in parts}
    rows = {part: plan.rows() for part, plan in plans.items()}
    if "train" in rows:
        check_overlap(rows["train"], rows["test"])
    for i, stage in enumerate(stages):
        if stage.method in ONLINE:
            with within(f"stages[{i}]."):
                asked = ONLINE[stage.method](stage.config)
            check_overlap(asked, rows["test"])
    for part in parts:
        check_folder(out / part, resume=True)
    policy = load_model(config.model, config.device, config.dtype)
    tables = {}
    for part, plan in plans.items():
        kept = is_finished(out / part)
        say(f"{part}: {'kept' if kept else f'{plan.samples} completions of each of {len(rows[part])} prompts'}")
        tables[part] = rollout(policy, plan, rows[part], out / part, True, _silent if kept else say)
    return policy.fingerprint, tables


def _outcome(stage: Stage, policy: str, tables: Mapping[str, RolloutTable], say: Callable[[str], None]) -> Outcome:
    """A stage's, as it was left or anew."""
    folder, module = Path(stage.config.out), METHODS[stage.method][0]
    used = {part: table.manifest["shards"] for part, table in tables.items()}
    if stage.method in ONLINE:
        used["train"] = hash_json(grpo_lambda.asked(ONLINE[stage.method](stage.config)))
    files = named_files(stage.config)
    made_from = {
        "method": stage.method,
        "config": {**plain(stage.config), "out": None},
        "policy": policy,
        "tables": used,
        **({"files": files} if files else {}),
    }
    key = hash_json(made_from)
    _settle(folder, key, say)
    made = _made(folder)
    if "outcome" in made:
        say(f"{stage.name}: kept")
        return _read(made["outcome"])
    say(f"{stage.name}:")
    folder.mkdir(exist_ok=True)
    write_json(folder / STAGE, {"key": key, **made_from})
    result = module.run(stage.config, say=say, tables_in=folder.parent)
    module.publish(result, f"{stage.name}: {stage.config.model} on {stage.config.data}", "")
    outcome = Outcome(
        arms=dict(_named(stage, arm) for name, arm in result.arms.items() if name not in SAMPLED),
        figures=[replace(figure, caption=_titled(stage, figure.caption)) for figure in module.figures(result)],
        points=plain(getattr(result, "points", [])),
        scores=result.scores.tolist() if stage.method == "qprobe" else None,
        manifest=plain(result.manifest),
    )
    write_json(folder / STAGE, {"key": key, **made_from, "outcome": _written(outcome)})
    return outcome


def named_files(config: Any, prefix: str = "") -> dict[str, str]:
    """Fingerprints of the files that a configuration names, by the fields whose metadata say how. Errors: UserError naming one."""
    found: dict[str, str] = {}
    for entry in dataclasses.fields(config):
        value, name = getattr(config, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            found |= named_files(value, f"{name}.")
        elif value is not None and "fingerprint" in entry.metadata:
            with within(prefix):
                found[name] = entry.metadata["fingerprint"](value)
    return found


def _settle(folder: Path, key: str, say: Callable[[str], None]) -> None:
    """Sets aside what other settings left in a stage's folder, and takes back what these once left."""
    before = _made(folder).get("key", key)
    if before != key:
        aside = folder.with_name(f"{folder.name}-{before[:12]}")
        say(f"{folder.name}: its settings, the base or what it learns from changed; what was there is now {aside}")
        _move(folder, aside)
    kept = folder.with_name(f"{folder.name}-{key[:12]}")
    if not folder.exists() and kept.exists():
        _move(kept, folder)


def _move(folder: Path, to: Path) -> None:
    folder.rename(to)
    if run := record.current():
        run.move(folder, to)


def _made(folder: Path) -> dict[str, Any]:
    path = folder / STAGE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise UserError(f"out: {path} is damaged; delete the file, and the stage is looked at anew") from None


def _written(outcome: Outcome) -> dict[str, Any]:
    arms = [{**plain(arm), "per_problem": arm.per_problem.tolist()} for arm in outcome.arms.values()]
    return {**plain(replace(outcome, arms={})), "arms": arms}


def _read(written: dict[str, Any]) -> Outcome:
    arms = [
        Arm(**{**arm, "per_problem": np.array(arm["per_problem"]), "curve": tuple(arm["curve"])})
        for arm in written["arms"]
    ]
    figures = [Figure(**figure) for figure in written["figures"]]
    return Outcome(**{**written, "arms": {arm.name: arm for arm in arms}, "figures": figures})


def _named(stage: Stage, arm: Arm) -> tuple[str, Arm]:
    """Where a stage has a name of its own, its arms have it too: two stages may be of one method."""
    name = arm.name if stage.name == stage.method else f"{stage.name}/{arm.name}"
    return name, replace(arm, name=name, title=_titled(stage, arm.title))


def _titled(stage: Stage, title: str) -> str:
    return title if stage.name == stage.method else f"{stage.name}: {title}"


def publish(result: PipelineRun) -> None:
    """`summary.json` and `report.html` in the run's folder."""
    config, out = result.config, Path(result.config.out)
    base = result.arms["base"]
    write_json(
        out / "summary.json",
        {
            "arms": {name: arm.summary() for name, arm in result.arms.items()},
            "comparisons": {
                f"{name} - base": {
                    **plain(paired_comparison(arm.per_problem, base.per_problem)),
                    "token_ratio": arm.tokens / base.tokens,
                }
                for name, arm in result.arms.items()
                if arm is not base
            },
            "frontier": {name: outcome.points for name, outcome in result.outcomes.items() if outcome.points},
            "manifest": result.manifest,
        },
    )
    write_report(
        out / "report.html",
        title=config.title or f"{config.model} on {config.data}",
        lead=config.about,
        arms=result.arms,
        figures=[
            Figure(token_plane(result.arms), "Accuracy against what an answer costs. The bars are the intervals."),
            *(figure for outcome in result.outcomes.values() for figure in outcome.figures),
        ],
        table=result.tables["test"],
        scores=next((outcome.scores for outcome in result.outcomes.values() if outcome.scores), None),
        definitions=DEFINED,
        manifest=result.manifest,
    )


def _silent(_: str) -> None:
    """The table is there already."""

"""GRPO-lambda from beginning to end: train online on problems with answers, and measure the policy before and after.

    test/             rollout table of the starting policy on test problems
    ARM/              a trained policy, an ordinary folder: `grpo_lambda`, and what one compares it with: `grpo` (no length
                      term), `plain` (its alpha on every group, without floors; or the peer that `training.trl.length_reward` names)
    ARM-test/         its rollout table on the same problems
    summary.json, report.html

What is finished is not made again; an interrupted training continues from its last checkpoint as if it had not been
interrupted (but see the trainer's `eval_on_start`: a resumed run looks at the validation problems once more). Of several
processes (`accelerate launch`) the first measures, and all sample and train.
"""

import dataclasses
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

from posttrain.config import convert
from posttrain.data.load import Row
from posttrain.data.prompts import messages_for
from posttrain.errors import UserError, nearest
from posttrain.evaluation.arms import Arm, policy_arm, sampled_arms
from posttrain.evaluation.intervals import paired_comparison
from posttrain.evaluation.plots import length_histogram, step_curves
from posttrain.evaluation.report import Figure, write_report
from posttrain.model_card import write_card
from posttrain.models.load import Policy, load_model, load_tokenizer, set_aside
from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.pipelines.engines import KEY, Sampler
from posttrain.pipelines.ranks import Ranks, release
from posttrain.pipelines.rollout import RolloutConfig, check_overlap, lengths_by_verdict, rollout
from posttrain.provenance import hash_json, plain, read_json, versions, write_json
from posttrain.rewards.math import grade
from posttrain.rollouts.collect import prompts_for, reserved
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.table import RolloutTable, read_table

MADE_BY = "made_by.json"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> title, what differs from the training's settings
    "grpo": ("GRPO", {"gate_fraction": 0.0}),
    "plain": (
        "GRPO, plain length penalty",
        {"gate_fraction": 1.0, "min_group_accuracy": 0.0, "length_std_floor": 0.0, "guard_drop": None},
    ),
    "grpo_lambda": ("GRPO-lambda", {}),
}
ArmName = Literal["grpo", "plain", "grpo_lambda"]
RENAMED = {  # our setting -> TRL's
    "steps": "max_steps",
    "samples": "num_generations",
    "batch_size": "per_device_train_batch_size",
    "max_tokens": "max_completion_length",
}


# What only TRL's own ways of sampling would heed.
TRL_SAMPLES = ("min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs")
LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo", "luspo", "sapo", "vespo")  # TRL's


@dataclass(frozen=True)
class GRPOLambdaTraining:
    """How the policy is trained; the defaults are the embedded model's, those of the gate our own for all."""

    gate_fraction: float = field(default=0.2, metadata={"help": "part of a step's prompts whose lengths are rewarded"})
    alpha: float = field(default=0.2, metadata={"help": "a correct completion's reward is above 1 - alpha"})
    min_group_accuracy: float = field(default=0.5, metadata={"help": "below it no group is gated"})
    length_std_floor: float = field(default=0.05, metadata={"help": "least spread of lengths, as a part of their mean"})
    penalty_warmup_steps: int = field(default=10, metadata={"help": "steps without a penalty"})
    alpha_ramp_steps: int = field(default=0, metadata={"help": "steps in which alpha then grows"})
    gate_ramp_steps: int = field(default=0, metadata={"help": "steps in which the gated part then grows"})
    guard_drop: float | None = field(
        default=0.05, metadata={"help": "fall of the validation accuracy that ends the penalty"}
    )
    guard_steps: int = field(default=100, metadata={"help": "within how many steps it falls"})
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="none", metadata={"help": "what divides advantages"}
    )
    loss_type: str = field(default="dr_grpo", metadata={"help": "TRL's: dr_grpo, grpo, dapo, bnpo, cispo, ..."})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient, in units of the reward"})
    learning_rate: float = field(default=1e-4, metadata={"help": "AdamW"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "of the learning rate"})
    steps: int = field(default=60, metadata={"help": "optimiser steps"})
    prompts_per_step: int = field(default=32, metadata={"help": "groups per step"})
    samples: int = field(default=8, metadata={"help": "completions per group"})
    batch_size: int = field(default=64, metadata={"help": "completions per forward and device"})
    temperature: float = field(default=1.0, metadata={"help": "of training's completions"})
    max_tokens: int = field(default=192, metadata={"help": "at most so many per completion"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 forward"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a second forward"})
    lora_rank: int = field(default=0, metadata={"help": "train an adapter on all linear layers; 0: all weights"})
    trl: dict[str, Any] = field(default_factory=dict, metadata={"help": "any other argument of TRL's GRPOConfig"})

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "samples", "batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}: must be positive and finite, got {getattr(self, name)}")
        if self.loss_type not in LOSSES:
            raise UserError(f"loss_type: must be one of {', '.join(LOSSES)}, got {self.loss_type!r}")
        if not 0 <= self.beta < math.inf:
            raise UserError(f"beta: must be 0 (no KL) or positive, and finite, got {self.beta}")
        if self.samples < 2:
            raise UserError("samples: must be at least 2; a completion is compared with its group")
        if self.prompts_per_step * self.samples % self.batch_size:
            raise UserError(
                f"batch_size: must divide prompts_per_step * samples, {self.prompts_per_step * self.samples}, "
                f"got {self.batch_size}"
            )
        if self.lora_rank < 0:
            raise UserError(f"lora_rank: must not be negative, got {self.lora_rank}")
        if not isinstance(self.trl, dict):
            raise UserError(f"trl: must be a mapping, got {self.trl!r}")


@dataclass(frozen=True)
class GRPOLambdaRunConfig:
    """Settings of a run; the defaults are the embedded model's."""

    out: str = field(metadata={"help": "the run's folder"})
    model: str = field(default="tiny", metadata={"help": "tiny, a folder, a .gguf file or a hub id"})
    data: str = field(default="arithmetic", metadata={"help": "a data set or a file; see posttrain rollout --help"})
    prompt: str | None = field(default=None, metadata={"help": "the user turn, with a {problem} placeholder"})
    arms: tuple[ArmName, ...] = field(default=("grpo_lambda",), metadata={"help": "what is trained"})
    train_split: str = field(default="train", metadata={"help": "where the training prompts come from"})
    train_prompts: int = field(default=2000, metadata={"help": "how many of them"})
    validation_split: str = field(default="val", metadata={"help": "what the collapse guard looks at"})
    validation_prompts: int = field(default=256, metadata={"help": "how many of its prompts; 0: no guard"})
    validation_samples: int = field(default=4, metadata={"help": "completions per validation prompt"})
    validation_steps: int = field(default=20, metadata={"help": "steps from one look to the next"})
    test_data: str | None = field(default=None, metadata={"help": "what the policy is measured on; default: data"})
    test_split: str = field(default="test", metadata={"help": "where the policy is measured"})
    test_prompts: int = field(default=500, metadata={"help": "how many of its prompts"})
    test_samples: int = field(default=4, metadata={"help": "completions per test prompt"})
    temperature: float = field(default=1.0, metadata={"help": "of the test's completions"})
    max_tokens: int = field(default=192, metadata={"help": "at most so many tokens per test completion"})
    training: GRPOLambdaTraining = field(default_factory=GRPOLambdaTraining, metadata={"help": "gate and optimiser"})
    engine: Literal["transformers", "service"] = field(
        default="transformers", metadata={"help": "what samples: transformers or service"}
    )
    urls: tuple[str, ...] = field(default=(), metadata={"help": "of the service: where posttrain rollout-service runs"})
    slots: int = field(default=64, metadata={"help": "requests in the running batch"})
    shard_prompts: int = field(default=50, metadata={"help": "prompts per shard: what is redone after an interruption"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one"})
    seed: int = field(default=0, metadata={"help": "of problems, completions and training"})

    def __post_init__(self) -> None:
        for name in ("train_prompts", "validation_samples", "validation_steps", "test_prompts", "test_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.validation_prompts < 0:
            raise UserError(f"validation_prompts: must not be negative, got {self.validation_prompts}")
        if self.engine == "service" and self.training.trl.get("use_vllm"):
            raise UserError("training.trl.use_vllm: with engine: service the service samples; leave it out")
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise UserError(f"arms: must be different ones of {', '.join(ARMS)}, got {list(self.arms)}")
        if "length_reward" in self.training.trl and "plain" not in self.arms:
            raise UserError("training.trl.length_reward: stands in the place of the plain penalty; add plain to arms")
        for name in ("train_split", "validation_split") if self.measured_on == self.data else ():
            if getattr(self, name) == self.test_split and (name == "train_split" or self.validation_prompts):
                raise UserError(f"test_split: {self.test_split} is the {name} too; measure on another one")

    @property
    def measured_on(self) -> str:
        return self.test_data or self.data


@dataclass(frozen=True)
class GRPOLambdaRun:
    config: GRPOLambdaRunConfig
    policy: Policy
    arms: dict[str, Arm]
    training: dict[str, dict[str, Any]]
    tables: dict[str, RolloutTable]

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {
            "config": plain(self.config),
            "policy": {"name": self.policy.name, "fingerprint": self.policy.fingerprint},
            "training": {name: {**made, "log": None} for name, made in self.training.items()},
            "versions": versions(),
        }


def correctness(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion whose answer is right, else 0: a reward function in TRL's signature."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(found.correct) for found in grade(completions=texts, golds=list(answer))]


def run(
    config: GRPOLambdaRunConfig, say: Callable[[str], None] = print, tables_in: Path | None = None
) -> GRPOLambdaRun | None:
    """What the first process measured; None in the others. tables_in: the folder of a `test` that may have more completions
    of each prompt; default: the run's own.

    Errors: UserError naming the field, before anything is sampled where that is possible.
    """
    ranks = Ranks(config.device)
    say = say if ranks.first else _silent
    out = Path(config.out)
    rows, held_out = training_rows(config), validation_rows(config)
    plan = replace(_plan(config, config.test_split, config.test_prompts), data=config.measured_on)
    test_rows = plan.rows()
    check_overlap([*rows, *held_out], test_rows)
    for arm in config.arms:
        arguments(config, arm, out, ranks.use_cpu, ranks.count)  # refused now, not after a minute of sampling
    if ranks.first and (idle := _without_penalty(config)):
        warnings.warn(idle, stacklevel=2)
    policy = load_model(config.model, ranks.device, "float32") if ranks.first else load_tokenizer(config.model)
    _check_room(config, policy, [*rows, *held_out])
    say(f"{config.test_split}: {config.test_samples} completions of each of {len(test_rows)} prompts")
    base = ranks.alone(
        lambda: (
            read_table(tables_in / "test")
            if tables_in
            else rollout(policy, plan, test_rows, out / "test", resume=True, say=say)
        )
    )
    training: dict[str, dict[str, Any]] = {}
    trained: dict[str, RolloutTable | None] = {}
    for arm in config.arms:
        say(f"{ARMS[arm][0]}: {config.training.steps} steps")
        with reserved(out / arm) if ranks.first else nullcontext():
            training[arm] = train(policy, config, arm, rows, held_out, ranks)
        trained[arm] = ranks.alone(partial(_measured, config, ranks, arm, plan, test_rows))
    if base is None:
        return None
    tables = {"base": base} | {name: table for name, table in trained.items() if table is not None}
    lengths = [[len(ids) for ids in row] for row in base.rectangle("completion_ids")]
    arms = sampled_arms(base.rectangle("correct"), base.rectangle("extracted"), lengths, base.manifest["seconds"])
    for name, made in training.items():
        arms[name] = policy_arm(name, ARMS[name][0], tables[name], made["seconds"])
    return GRPOLambdaRun(config, policy, arms, training, tables)


def _without_penalty(config: GRPOLambdaRunConfig) -> str | None:
    """Why no step of this training has the penalty that it is configured for; None where some have."""
    training = config.training
    penalised = [arm for arm in config.arms if (own := _settings(config, arm)).gate_fraction * own.alpha > 0]
    if not penalised or training.penalty_warmup_steps < training.steps:
        return None
    return (
        f"training.penalty_warmup_steps: {training.penalty_warmup_steps} steps without a penalty are all of the "
        f"{training.steps} steps, so that lengths are never rewarded; give fewer"
    )


def _check_room(config: GRPOLambdaRunConfig, policy: Policy, rows: Sequence[Row]) -> None:
    """Errors: UserError unless training's completions fit into the model's context behind each of these prompts."""
    prompts = prompts_for(rows, policy.tokenizer, _plan(config, config.train_split, 1).template)
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest + config.training.max_tokens > policy.context:
        raise UserError(
            f"training.max_tokens: {config.training.max_tokens} do not fit into the model's context of {policy.context} "
            f"behind the longest prompt, of {longest} tokens; at most {max(policy.context - longest, 0)} do"
        )


def _measured(
    config: GRPOLambdaRunConfig, ranks: Ranks, arm: str, plan: RolloutConfig, rows: Sequence[Row]
) -> RolloutTable:
    policy = load_model(str(Path(config.out) / arm), ranks.device, "float32")
    return rollout(policy, plan, rows, Path(config.out) / f"{arm}-test", resume=True, say=_silent)


def training_rows(config: GRPOLambdaRunConfig) -> list[Row]:
    """The problems that the policy is trained on."""
    return _plan(config, config.train_split, config.train_prompts).rows()


def validation_rows(config: GRPOLambdaRunConfig) -> list[Row]:
    """The problems that the collapse guard looks at."""
    return _plan(config, config.validation_split, config.validation_prompts).rows() if config.validation_prompts else []


def problems(config: GRPOLambdaRunConfig) -> list[Row]:
    """All that a training asks."""
    return [*training_rows(config), *validation_rows(config)]


def asked(rows: Sequence[Row]) -> list[list[str]]:
    """What a training depends on of its problems."""
    return [[row["problem"], row["answer"]] for row in rows]


def train(
    policy: Policy,
    config: GRPOLambdaRunConfig,
    arm: str,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Trains one arm and saves it; what was made by the same settings is kept. The policy's own model is left as it was.

    ranks: those that train, all of which call this; default: this process alone, on the policy's device.
    Returns what `made_by.json` says. Errors: UserError naming `out` for a folder that other settings made.
    """
    folder = Path(config.out) / arm
    settings = plain(_settings(config, arm))
    guard = {name: value for name, value in plain(config).items() if name.startswith("validation")}
    key = hash_json([policy.fingerprint, config.seed, config.prompt, settings, guard, asked([*rows, *held_out])])
    if (folder / MADE_BY).is_file():
        made = read_json(folder / MADE_BY, "policy")
        if made["key"] != key:
            raise UserError(
                f"out: {folder} was trained on other problems or with other settings; delete it, or give another out"
            )
        return made
    ranks = ranks or Ranks(str(policy.model.device))
    with set_aside(policy) if ranks.first else nullcontext():  # a GPU has room for training's model, not for two
        return _learn(policy, ranks, config, arm, rows, held_out, key)


def _learn(
    policy: Policy,
    ranks: Ranks,
    config: GRPOLambdaRunConfig,
    arm: str,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    key: str,
) -> dict[str, Any]:
    folder = Path(config.out) / arm
    from datasets import Dataset  # with the trainer below, seconds of import
    from transformers.integrations import is_deepspeed_zero3_enabled

    from posttrain.trainers.follow import follow
    from posttrain.trainers.grpo_lambda import GRPOLambdaTrainer

    started = time.perf_counter()
    template = _plan(config, config.train_split, 1).template
    train_set, eval_set = (
        Dataset.from_list([{"prompt": messages_for(row, template), "answer": row["answer"]} for row in part])
        for part in (rows, held_out)
    )
    launch = ranks.launch if ranks.deepspeed else []  # otherwise a checkpoint goes on in any number of processes
    scratch = folder.with_name(f"{folder.name}-checkpoints-{hash_json([key, *launch])[:12]}")
    start = load_model(policy.name, ranks.device, "float32")
    with _rollouts(config, ranks.device == "cpu") as rollouts:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            trainer = GRPOLambdaTrainer(
                start.model,
                correctness,
                arguments(config, arm, scratch, ranks.use_cpu, ranks.count),
                train_set,
                eval_set if held_out else None,
                processing_class=start.tokenizer,
                peft_config=_adapter(config.training),
                rollout_func=rollouts,
            )
        with follow(trainer, folder) as clock:
            trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    # Of all ranks together, where each has but a part of the weights, whether or not the launcher thought of saving.
    whole = trainer.model_wrapped._zero3_consolidated_16bit_state_dict() if is_deepspeed_zero3_enabled() else None
    model = trainer.accelerator.unwrap_model(trainer.model)
    release(trainer)
    made = {
        "key": key,
        "policy": policy.fingerprint,
        "settings": plain(_settings(config, arm)),
        "seed": config.seed,
        "log": trainer.state.log_history,
        "seconds": clock.earlier + time.perf_counter() - started,
        "processes": trainer.args.world_size,
        "versions": versions(),
    }
    if ranks.first:
        if config.training.lora_rank:
            model = model.merge_and_unload()
        model.save_pretrained(folder, state_dict=whole)
        start.tokenizer.save_pretrained(folder)
        write_json(folder / MADE_BY, made)
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def publish(result: GRPOLambdaRun, title: str, lead: str) -> None:
    """`summary.json` and `report.html` in the run's folder, and a card for each policy that was trained."""
    out = Path(result.config.out)
    summary = {name: arm.summary() for name, arm in result.arms.items()}
    write_json(out / "summary.json", {"arms": summary, "comparisons": comparisons(result), "manifest": result.manifest})
    last = result.tables[result.config.arms[-1]]
    write_report(
        out / "report.html",
        title=title,
        lead=lead,
        arms=result.arms,
        figures=[
            *figures(result),
            Figure(length_histogram(lengths_by_verdict(last)), "Test completion lengths by verdict, after."),
        ],
        table=last,
        scores=None,
        definitions=("pass@1", "maj@k", "pass@k", "tokens", "seconds", "interval"),
        manifest=result.manifest,
    )
    shown = {arm.title: arm.summary() for name, arm in result.arms.items() if name in ("base", *result.config.arms)}
    config = result.config
    measured: dict[str, Any] = {
        "data": f"{config.data}/{config.train_split}",
        "measured_on": f"{config.measured_on}/{config.test_split}",
        "figures": shown,
    }
    for name in config.arms:
        own, settings = result.arms[name].title, result.training[name]["settings"]
        write_card(out / name, own, config.model, tags=["grpo"], own=own, settings=settings, **measured)


def figures(result: GRPOLambdaRun) -> list[Figure]:
    """Accuracy and mean length of training's completions against the step."""
    logs = {ARMS[name][0]: made["log"] for name, made in result.training.items()}
    return [
        Figure(step_curves(_curves(logs, "accuracy"), "accuracy"), "Accuracy of training's completions, by step."),
        Figure(step_curves(_curves(logs, "completions/mean_length"), "tokens"), "Their mean length, by step."),
    ]


def comparisons(result: GRPOLambdaRun) -> dict[str, dict[str, Any]]:
    """Every trained arm against the starting policy and, where it was trained, against plain GRPO: the paired difference
    of accuracy with its 95 % interval, and the ratio of tokens."""
    found = {}
    for name in result.config.arms:
        for other in ("base", "grpo"):
            if other in result.arms and other != name:
                ours, theirs = result.arms[name], result.arms[other]
                paired = paired_comparison(ours.per_problem, theirs.per_problem)
                found[f"{name} - {other}"] = {**plain(paired), "token_ratio": ours.tokens / theirs.tokens}
    return found


def _settings(config: GRPOLambdaRunConfig, arm: str) -> GRPOLambdaTraining:
    training = replace(config.training, **ARMS[arm][1])
    if arm != "plain":  # a peer stands in its place alone
        own = {name: value for name, value in training.trl.items() if not name.startswith("length_reward")}
        training = replace(training, trl=own)
    return training


def arguments(config: GRPOLambdaRunConfig, arm: str, folder: Path, use_cpu: bool, processes: int = 1) -> Any:
    """The trainer's configuration in each of so many processes. Errors: UserError naming the field."""
    from posttrain.trainers.grpo_lambda import GRPOLambdaConfig

    settings = _settings(config, arm)
    completions, together = settings.prompts_per_step * settings.samples, settings.batch_size * processes
    if completions % together:
        raise UserError(
            f"training.batch_size: in {processes} processes {together} completions go forward at once; that must divide "
            f"prompts_per_step * samples, {completions}"
        )
    hints = get_type_hints(GRPOLambdaConfig)
    names = {
        entry.name: RENAMED.get(entry.name, entry.name)
        for entry in dataclasses.fields(settings)
        if entry.name not in ("prompts_per_step", "lora_rank", "trl")
    }
    own = {
        theirs: convert(hints[theirs], getattr(settings, name), f"training.{name}") for name, theirs in names.items()
    }
    own |= {
        "output_dir": str(folder),
        "gradient_accumulation_steps": completions // together,
        "seed": config.seed,
        "use_cpu": use_cpu,
    }
    if config.validation_prompts:
        samples = config.validation_samples
        share, limit = math.ceil(config.validation_prompts / processes), max(1, settings.batch_size // samples)
        # Even batches: TRL's mean is over batches, however small the last one.
        prompts = math.ceil(share / math.ceil(share / limit))
        own |= {"eval_strategy": "steps", "eval_steps": config.validation_steps, "eval_on_start": True}
        own |= {
            "num_generations_eval": samples,
            "per_device_eval_batch_size": samples * prompts,  # as training's: TRL puts all of them through one forward
        }
    known = {entry.name for entry in dataclasses.fields(GRPOLambdaConfig) if entry.init} - set(own)
    for name in settings.trl:
        if name not in known:
            told = "is a setting of ours" if name in own else f"no argument of TRL's GRPOConfig{nearest(name, known)}"
            raise UserError(f"training.trl.{name}: {told}")
        if name in TRL_SAMPLES and _samples_here(config, use_cpu):
            raise UserError(
                f"training.trl.{name}: our engine and the service sample by temperature, top_p and top_k alone; leave it out"
            )
    others = {name: convert(hints[name], value, f"training.trl.{name}") for name, value in settings.trl.items()}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 2}
    try:
        made = GRPOLambdaConfig(**{**quiet, **saving, **own, **others})
    except (UserError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        name = re.split(r"\W", text, maxsplit=1)[0]
        part = "training.trl." if name in known else "training." if name in names else "training: "
        raise UserError(f"{part}{text}") from None
    if settings.lora_rank and made.deepspeed_plugin is not None and made.deepspeed_plugin.zero_stage == 3:
        raise UserError("training.lora_rank: adapters cannot be merged under ZeRO-3; use ZeRO-2")
    return made


def _samples_here(config: GRPOLambdaRunConfig, cpu: bool) -> bool:
    """Whether the service or our engine samples in training, not TRL."""
    return config.engine == "service" or (cpu and not config.training.trl.get("use_vllm"))


@contextmanager
def _rollouts(config: GRPOLambdaRunConfig, cpu: bool) -> Iterator[Any]:
    """The service, or our engine on CPU; elsewhere, and with vLLM, TRL's own ways."""
    if not _samples_here(config, cpu):
        yield None
    elif config.engine == "service":
        from posttrain.trainers.service_rollouts import ServiceRollouts

        with closing(ServiceRollouts(config.urls, config.slots, os.environ.get(KEY))) as service:
            yield service
    else:
        from posttrain.trainers.engine_rollouts import engine_rollouts

        yield engine_rollouts(config.slots)


def _adapter(config: GRPOLambdaTraining) -> Any:
    if not config.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")


def _curves(logs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, tuple[list[int], list[float]]]:
    found = {}
    for title, log in logs.items():
        points = [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]
        found[title] = ([step for step, _ in points], [value for _, value in points])
    return found


def _plan(config: GRPOLambdaRunConfig, split: str, limit: int) -> RolloutConfig:
    sampling = Sampling(config.temperature, max_tokens=config.max_tokens, seed=config.seed)
    sampler = Sampler(config.engine, config.urls, own=True)
    return RolloutConfig(
        config.data,
        split,
        limit,
        config.prompt,
        config.test_samples,
        sampling,
        config.slots,
        config.shard_prompts,
        sampler=sampler,
    )


def _silent(_: str) -> None:
    """The prompt has been shown already."""

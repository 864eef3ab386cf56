"""DQO from beginning to end: collect completions of the policy, learn from them offline, measure the policy that came out.

    train/            rollout table of the starting policy, or of the completions that were given
    policy/           the trained policy, an ordinary folder; its value model in policy/critic
    test/, trained/   rollout tables of the starting and the trained policy on test problems
    METHOD/           the same of every baseline that the configuration names (pipelines/baselines.py)
    summary.json, report.html

What is finished is not made again; an interrupted training continues from its last checkpoint. Of several processes
(`accelerate launch`) the first collects and measures, and all train.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.data.load import Row
from posttrain.errors import UserError
from posttrain.evaluation.arms import Arm, sampled_arms
from posttrain.evaluation.plots import length_histogram
from posttrain.evaluation.report import Figure, write_report
from posttrain.model_card import write_card
from posttrain.models.actor_critic import ActorCritic, new_critic
from posttrain.models.load import Policy, load_model, load_tokenizer, set_aside
from posttrain.models.probe import Probe
from posttrain.pipelines import baselines
from posttrain.pipelines.baselines import Baseline
from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.pipelines.engines import EngineName, Sampler
from posttrain.pipelines.ranks import Ranks, release
from posttrain.pipelines.rollout import RolloutConfig, check_overlap, lengths_by_verdict, rollout
from posttrain.provenance import hash_files, hash_json, plain, read_json, versions, write_json
from posttrain.rollouts.collect import reserved
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.given import given_table
from posttrain.rollouts.table import RolloutTable, read_table
from posttrain.trainers.baselines import BaselineTraining, Method
from posttrain.trainers.dqo_card import write_dqo_card

MADE_BY = "made_by.json"


def completions_fingerprint(path: str) -> str:
    """Of a rollout table, or of a file of completions. Errors: UserError naming `completions`."""
    given = Path(path)
    if given.is_dir():
        return hash_json(read_table(given).manifest["shards"])
    _check_given(given)
    return hash_files([given])


def probe_fingerprint(folder: str) -> str:
    return hash_files(Path(folder).glob("*.*"))


@dataclass(frozen=True)
class DQOTraining:
    """How the policy and its value model are trained; the defaults are the embedded model's."""

    beta: float = field(default=0.03, metadata={"help": "KL coefficient, in units of the reward"})
    lam: float = field(default=1.0, metadata={"help": "of the lambda-returns; 1 never bootstraps"})
    importance_cap: float | None = field(default=math.e, metadata={"help": "cap of a completion's weight pi / mu"})
    normalisation: Literal["token", "seq"] = field(
        default="seq", metadata={"help": "what a loss is a mean over: token, or of each completion first"}
    )
    full_gradient: bool = field(default=False, metadata={"help": "differentiate the returns too"})
    truncated: Literal["keep", "drop"] = field(
        default="keep",
        metadata={"help": "completions that were cut at a length: keep, with no reward above 0, or drop"},
    )
    process: Literal["additive", "shaping"] = field(
        default="additive",
        metadata={"help": "what scores of steps are, where the table has any: rewards, or a potential"},
    )
    process_scale: float = field(default=1.0, metadata={"help": "of those scores"})
    learning_rate: float = field(default=2e-4, metadata={"help": "of the policy, AdamW"})
    value_learning_rate: float = field(default=3e-4, metadata={"help": "of the value model"})
    critic_warmup_steps: int = field(default=10, metadata={"help": "steps in which only the value model learns"})
    epochs: float = field(default=2.0, metadata={"help": "passes over the completions"})
    batch_size: int = field(default=32, metadata={"help": "completions per forward and device"})
    accumulation: int = field(default=1, metadata={"help": "forwards per step"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 forward; weights stay float32"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a second forward"})
    packing: bool = field(default=False, metadata={"help": "no padding; for flash attention"})
    value_layers: int | None = field(
        default=None, metadata={"help": "so many of the value model's last layers learn, and its head; default: all"}
    )
    probe: str | None = field(
        default=None,
        metadata={
            "help": "folder of a linear probe (last layer, last token, mse) that the value model starts from; default: 0",
            "fingerprint": probe_fingerprint,
        },
    )
    lora_rank: int | None = field(default=None, metadata={"help": "LoRA on the policy; default: full fine-tuning"})
    value_lora_rank: int | None = field(
        default=None, metadata={"help": "LoRA on the value model; with lora_rank on the same frozen base"}
    )

    def __post_init__(self) -> None:
        for name in ("lora_rank", "value_lora_rank"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: must be positive, got {value}; leave it out for full fine-tuning")
        for name in ("beta", "importance_cap", "learning_rate", "value_learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}: must be positive and finite, got {value}")
        for name, least in (("batch_size", 1), ("accumulation", 1), ("critic_warmup_steps", 0), ("value_layers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: must be at least {least}, got {value}")
        if not 0 <= self.lam <= 1:
            raise UserError(f"lam: must be between 0 and 1, got {self.lam}")

    def steps(self, completions: int, ranks: int = 1) -> int:
        """Of a training on so many completions, as transformers' Trainer counts them: the last forward of a pass may be a smaller
        one, and so may its last step."""
        forwards = math.ceil(completions / (self.batch_size * ranks))
        return math.ceil(self.epochs * math.ceil(forwards / self.accumulation))


DPO = BaselineTraining(batch_size=16)
KTO = BaselineTraining(learning_rate=1e-4)


@dataclass(frozen=True)
class DQORunConfig:
    """Settings of a run; the defaults are the embedded model's."""

    out: str = field(metadata={"help": "the run's folder"})
    model: str = field(default="tiny", metadata={"help": "tiny, a folder, a .gguf file or a hub id"})
    data: str = field(default="arithmetic", metadata={"help": "a data set or a file; see posttrain rollout --help"})
    prompt: str | None = field(default=None, metadata={"help": "the user turn, with a {problem} placeholder"})
    completions: str | None = field(
        default=None,
        metadata={
            "help": "learn from these: a rollout table, or a file (posttrain.rollouts.given); default: sample them",
            "fingerprint": completions_fingerprint,
        },
    )
    train_split: str = field(default="train", metadata={"help": "where the training prompts come from"})
    train_prompts: int = field(default=300, metadata={"help": "how many of them"})
    train_samples: int = field(default=8, metadata={"help": "completions per training prompt"})
    least_train_samples: int | None = field(
        default=None,
        metadata={"help": "as few on some prompts, drawn evenly up to train_samples; default: as many of each"},
    )
    test_split: str = field(default="test", metadata={"help": "where the policy is measured"})
    test_prompts: int = field(default=500, metadata={"help": "how many of its prompts"})
    test_samples: int = field(default=4, metadata={"help": "completions per test prompt"})
    temperature: float = field(default=1.0, metadata={"help": "of all sampling"})
    max_tokens: int = field(default=192, metadata={"help": "at most so many tokens per completion"})
    training: DQOTraining = field(default_factory=DQOTraining, metadata={"help": "the objective and the optimiser"})
    baselines: tuple[Method, ...] = field(default=(), metadata={"help": "what stands beside DQO: rejection, dpo, kto"})
    rejection: BaselineTraining = field(default_factory=BaselineTraining, metadata={"help": "SFT on right completions"})
    dpo: BaselineTraining = field(default=DPO, metadata={"help": "DPO on pairs of better and worse completions"})
    kto: BaselineTraining = field(default=KTO, metadata={"help": "KTO on all completions"})
    engine: EngineName = field(
        default="transformers", metadata={"help": "what samples: transformers, vllm, service or ray"}
    )
    urls: tuple[str, ...] = field(default=(), metadata={"help": "of the service: where posttrain rollout-service runs"})
    slots: int = field(default=64, metadata={"help": "requests in the running batch"})
    shard_prompts: int = field(default=50, metadata={"help": "prompts per shard: what is redone after an interruption"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one"})
    seed: int = field(default=0, metadata={"help": "of problems, completions and training"})

    def __post_init__(self) -> None:
        for name in ("train_prompts", "train_samples", "test_prompts", "test_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.least_train_samples is not None and not 1 <= self.least_train_samples <= self.train_samples:
            raise UserError(
                f"least_train_samples: must be between 1 and train_samples ({self.train_samples}), got {self.least_train_samples}"
            )
        if self.train_split == self.test_split:
            raise UserError(f"test_split: {self.test_split} is the training split too; measure on another one")
        for name in self.baselines:
            if self.baselines.count(name) > 1:
                raise UserError(f"baselines: {name} stands twice; name each once")
        if not self.completions:
            _check_warmup(self.training, self.train_prompts * self.train_samples)


@dataclass(frozen=True)
class DQORun:
    config: DQORunConfig
    policy: Policy
    arms: dict[str, Arm]
    training: dict[str, Any]
    trained: RolloutTable
    baselines: dict[Method, Baseline]

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {
            "config": plain(self.config),
            "policy": {"name": self.policy.name, "fingerprint": self.policy.fingerprint},
            "training": self.training,
            "baselines": {name: baseline.training for name, baseline in self.baselines.items()},
            "versions": versions(),
        }


def run(config: DQORunConfig, say: Callable[[str], None] = print, tables_in: Path | None = None) -> DQORun | None:
    """What the first process measured; None in the others.

    tables_in: the folder of a finished `train`, and of a `test` that may have more completions of each prompt; default: the run's
    own, which it samples.
    Errors: UserError naming the field, before anything is sampled where that is possible.
    """
    ranks = Ranks(config.device)
    say = say if ranks.first else _silent
    check_launch(config, ranks.count, ranks.deepspeed)
    out = Path(config.out)
    test_plan = _plan(config, config.test_split, config.test_prompts, config.test_samples)
    test_rows = test_plan.rows()
    collected = (out if config.completions else tables_in or out) / "train"
    collect = _collection(config, test_rows, collected, say, ranks.count)
    policy = load_model(config.model, ranks.device, "float32") if ranks.first else load_tokenizer(config.model)
    if config.training.probe:
        Probe.from_pretrained(config.training.probe, policy.fingerprint)  # refused now, not after hours of sampling
    if ranks.first:
        _check_layers(config.training, policy)
    if config.completions or not tables_in:
        ranks.alone(lambda: collect(policy))
    table = read_table(_named_table(config) or collected)
    with reserved(out / "policy") if ranks.first else nullcontext():
        made = train(policy, table, config.training, out / "policy", config.seed, say, ranks)
        beside = {
            method: baselines.train(
                method, policy, table, getattr(config, method), out / method / "policy", config.seed, say, ranks
            )
            for method in config.baselines
        }

    def measured() -> DQORun:
        say(
            f"{config.test_split}: {config.test_samples} completions of each of {len(test_rows)} prompts, before and after"
        )
        test = (
            read_table(tables_in / "test")
            if tables_in
            else rollout(policy, test_plan, test_rows, out / "test", resume=True, say=_silent)
        )
        lengths = [[len(ids) for ids in row] for row in test.rectangle("completion_ids")]
        arms = sampled_arms(test.rectangle("correct"), test.rectangle("extracted"), lengths, test.manifest["seconds"])
        learned = table.manifest.get("seconds", 0.0) + made["seconds"]
        arms["dqo"], trained = baselines.measure(
            "dqo", title(config.training), out, policy, test_plan, test_rows, learned
        )
        found = {
            method: baselines.measured(method, learned_by, policy, table, out / method, test_plan, test_rows)
            for method, learned_by in beside.items()
        }
        arms |= {method: baseline.arm for method, baseline in found.items()}
        return DQORun(config, policy, arms, made, trained, found)

    return ranks.alone(measured)


def _named_table(config: DQORunConfig) -> Path | None:
    """The rollout table that the configuration names, where it is one."""
    given = Path(config.completions) if config.completions else None
    return given if given and given.is_dir() else None


def _check_given(path: Path) -> None:
    if not path.exists():
        raise UserError(f"completions: no such rollout table or file: {path}")


def check_launch(config: DQORunConfig, processes: int, deepspeed: bool) -> None:
    """Errors: UserError for what so many processes cannot train."""
    if config.baselines and deepspeed:
        raise UserError(
            "baselines: are trained in one process or under DDP; leave them out under DeepSpeed, and add them in another run: what "
            "is finished is kept"
        )
    if not config.completions:
        _check_warmup(config.training, config.train_prompts * config.train_samples, processes)


def _check_warmup(training: DQOTraining, completions: int, ranks: int = 1) -> None:
    """completions: that it learns from, at most. Errors: UserError where all steps are the value model's alone."""
    steps, warmup = training.steps(completions, ranks), training.critic_warmup_steps
    if steps <= warmup:
        shared = training.batch_size * training.accumulation * ranks
        raise UserError(
            f"training.critic_warmup_steps: must be less than the run's {steps} steps ({completions} completions, {shared} a step, "
            f"epochs {training.epochs:g}), got {warmup}: the policy would not learn"
        )


def _check_layers(training: DQOTraining, policy: Policy) -> None:
    layers = len(policy.model.get_decoder().layers)
    if (training.value_layers or 0) > layers:
        raise UserError(f"training.value_layers: {policy.name} has {layers} layers, got {training.value_layers}")


def _collection(
    config: DQORunConfig, test_rows: Sequence[Row], folder: Path, say: Callable[[str], None], ranks: int
) -> Callable[[Policy], Any]:
    """What makes the table in `folder`, once there is a policy. Errors: all that can be refused without one."""
    if config.completions:
        given = Path(config.completions)
        _check_given(given)
        return lambda policy: None if given.is_dir() else given_table(given, policy.tokenizer, folder)
    plan = replace(
        _plan(config, config.train_split, config.train_prompts, config.train_samples),
        least_samples=config.least_train_samples,
    )
    rows = plan.rows()
    check_overlap(rows, test_rows)
    _check_warmup(config.training, len(rows) * config.train_samples, ranks)

    def collect(policy: Policy) -> RolloutTable:
        say(f"{config.train_split}: {per_prompt(config)} completions of each of {len(rows)} prompts")
        return rollout(policy, plan, rows, folder, resume=True, say=say)

    return collect


def train(
    policy: Policy,
    table: RolloutTable,
    config: DQOTraining,
    folder: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Trains on a table of the policy's completions and saves; what was made by the same table and settings is kept.

    The policy's own model is left as it was. Returns what `made_by.json` says. ranks: those that train, all of which call
    this; default: this process alone, on the policy's device.
    Errors: UserError naming `policy` for a folder that something else made, or as the examples say.
    """
    probe = [probe_fingerprint(config.probe)] if config.probe else []
    key = hash_json([table.manifest["shards"], policy.fingerprint, seed, plain(config), *probe])
    if (folder / MADE_BY).is_file():
        made = read_json(folder / MADE_BY, "policy")
        if made["key"] != key:
            raise UserError(
                f"policy: {folder} was trained on other completions or with other settings; delete it, or give another out"
            )
        return made
    ranks = ranks or Ranks(str(policy.model.device))
    with set_aside(policy) if ranks.first else nullcontext():  # a GPU has room for training's two models, not for three
        return _learn(policy, ranks, table, config, folder, seed, key, say)


def _learn(
    policy: Policy,
    ranks: Ranks,
    table: RolloutTable,
    config: DQOTraining,
    folder: Path,
    seed: int,
    key: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    from posttrain.trainers.dqo import SHOWN, DQOConfig, DQOTrainer, labelled, launch_of  # seconds of import
    from posttrain.trainers.dqo_examples import check_vocabulary, examples_of
    from posttrain.trainers.follow import follow

    started = time.perf_counter()
    shared = None not in (config.lora_rank, config.value_lora_rank)
    start = load_model(policy.name, ranks.device, "float32")
    check_vocabulary(table, policy.tokenizer, start.model.get_input_embeddings().num_embeddings)
    probe = Probe.from_pretrained(config.probe).to(ranks.device) if config.probe else None
    model = ActorCritic(start.model, new_critic(start.model, policy.fingerprint, shared, probe))
    found = examples_of(
        [table],
        policy.fingerprint,
        config.truncated,
        process=config.process,
        process_scale=config.process_scale,
        weighted=config.importance_cap is not None,
    )
    scratch = folder.with_name(f"{folder.name}-checkpoints-{key[:12]}")
    checkpoint = last_checkpoint(scratch)
    if not checkpoint:  # else the launch that wrote it has passed
        _check_warmup(config, len(found), ranks.count)
    examples = labelled(model, found, policy.fingerprint, folder.parent, config.batch_size)
    cut = sum(not example["ended"] for example in examples)
    say(f"DQO on {len(examples)} completions{f', {cut} of them cut at a length' if cut else ''}")
    rows, accumulation = config.batch_size, config.accumulation
    if checkpoint:
        rows, accumulation = _shared(launch_of(checkpoint)["completions"], ranks.count, rows)
    arguments = {
        name: value for name, value in plain(config).items() if name in {field.name for field in fields(DQOConfig)}
    }
    trainer = DQOTrainer(
        model,
        DQOConfig(
            output_dir=str(scratch),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            use_cpu=ranks.use_cpu,
            logging_steps=10,
            save_strategy="steps",
            save_steps=50,
            disable_tqdm=True,
            seed=seed,
            **arguments,
        ),
        examples,
        processing_class=policy.tokenizer,
        peft_config=_lora(config.lora_rank),
        value_peft_config=_lora(config.value_lora_rank),
    )
    with follow(trainer, folder, SHOWN) as clock:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save(folder)
    release(trainer)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    made = {
        "key": key,
        "policy": policy.fingerprint,
        "config": plain(config),
        "seed": seed,
        "completions": len(examples),
        "truncated": cut,
        "last": log[-1] if log else {},
        "seconds": clock.earlier + time.perf_counter() - started,
        "processes": trainer.args.world_size,
        "versions": versions(),
    }
    if ranks.first:
        write_json(folder / MADE_BY, made)
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def _shared(completions: int, ranks: int, most: int) -> tuple[int, int]:
    """What a step of an interrupted training takes, for each of so many processes: rows per forward, at most `most`, and forwards.

    Errors: UserError where it cannot be shared evenly.
    """
    forwards = -(-completions // (ranks * most))
    rows, rest = divmod(completions, ranks * forwards)
    if rest:
        raise UserError(
            f"launch: a step of the interrupted training takes {completions} completions, which {ranks} processes cannot share in "
            f"forwards of at most {most} (batch_size); launch as many as before"
        )
    return rows, forwards


def _lora(rank: int | None) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def publish(result: DQORun, title: str, lead: str) -> None:
    """`summary.json` and `report.html` in the run's folder, and a card for each policy that was trained."""
    out = Path(result.config.out)
    summary = {name: arm.summary() for name, arm in result.arms.items()}
    write_json(out / "summary.json", {"arms": summary, "manifest": result.manifest})
    write_report(
        out / "report.html",
        title=title,
        lead=lead,
        arms=result.arms,
        figures=figures(result),
        table=result.trained,
        scores=None,
        definitions=("pass@1", "maj@k", "pass@k", "tokens", "seconds", "interval"),
        manifest=result.manifest,
    )
    _write_cards(result, out)


def _write_cards(result: DQORun, out: Path) -> None:
    config, arms = result.config, [result.arms[name] for name in ("base", "dqo", *result.baselines)]
    model = config.model
    measured: dict[str, Any] = {
        "data": config.completions or f"{config.data}/{config.train_split}",
        "measured_on": f"{config.data}/{config.test_split}",
        "figures": {arm.title: arm.summary() for arm in arms},
    }
    write_dqo_card(out / "policy", model, result.training["config"], own=result.arms["dqo"].title, **measured)
    for method, baseline in result.baselines.items():
        own, settings = baseline.arm.title, baseline.training["config"]
        write_card(out / method / "policy", own, model, tags=[method], own=own, settings=settings, **measured)


def figures(result: DQORun) -> list[Figure]:
    return [Figure(length_histogram(lengths_by_verdict(result.trained)), "Completion lengths by verdict, after.")]


def title(config: DQOTraining) -> str:
    return f"DQO, beta {config.beta:g}"


def lead(config: DQORunConfig) -> str:
    """What the policy learned from, for the report."""
    if config.completions:
        return f"Trained offline on the completions in {config.completions}."
    return f"Trained offline on {per_prompt(config)} completions of each of {config.train_prompts} prompts."


def per_prompt(config: DQORunConfig) -> str:
    """How many completions a training prompt has."""
    least, most = config.least_train_samples, config.train_samples
    return f"{least} to {most}" if least not in (None, most) else str(most)


def _plan(config: DQORunConfig, split: str, limit: int, samples: int) -> RolloutConfig:
    sampling = Sampling(config.temperature, max_tokens=config.max_tokens, seed=config.seed)
    sampler = Sampler(config.engine, config.urls, own=True)
    return RolloutConfig(
        config.data,
        split,
        limit,
        config.prompt,
        samples,
        sampling,
        config.slots,
        config.shard_prompts,
        sampler=sampler,
    )


def _silent(_: str) -> None:
    """The prompt has been shown already."""

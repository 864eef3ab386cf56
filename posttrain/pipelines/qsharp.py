"""Q# from beginning to end: collect, train, (repeat), evaluate (algorithm 1 of arXiv 2502.20548).

Round one labels every token of whole completions of pi_ref with their outcome: the law of cutting and rolling out again, at
half the sampling. A later round rolls in with the guided policy, cuts, rolls out with pi_ref, and trains anew on all rounds.

    train/                  rollout table of pi_ref: round one
    round-N/rollin/         (N > 1) completions of the policy that round N - 1 guides
    round-N/rollouts/       (N > 1) those, cut and completed by pi_ref
    round-N/value/          the value model
    round-N/cd_beta.json    (of the last) where CD has the KL of Q#
    round-N/history/        (`history` > 1) the mean of the last rounds' value models, which is then what guides
    test/, guided/NAME/     what is measured: pi_ref, and guided policies
    summary.json, report.html

What is finished is not made again; a stage can be run alone. Of several processes (`accelerate launch`) the first collects and
evaluates, and all train.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

from numpy.typing import ArrayLike

from posttrain.config import within
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import ValueGuide, load_guide
from posttrain.decoding.reward_model import token_values, value_scores
from posttrain.decoding.vllm import VLLMGuide, load_vllm_guide
from posttrain.errors import UserError
from posttrain.evaluation.arms import Arm, policy_arm, reranked_arm, sampled_arms, weighted_vote_arm
from posttrain.evaluation.intervals import Comparison, mean_interval, paired_comparison
from posttrain.evaluation.plots import frontier, length_histogram
from posttrain.evaluation.report import SHOWN, Figure, TokenValues, write_report
from posttrain.models.load import Policy, load_model
from posttrain.models.value import average_heads, base_fingerprint, check_layers, read_value_model
from posttrain.objectives.qsharp import history_weights
from posttrain.pipelines.engines import EngineName, Sampler
from posttrain.pipelines.matching import beta_of_kl
from posttrain.pipelines.ranks import Ranks
from posttrain.pipelines.rollout import RolloutConfig, check_overlap, lengths_by_verdict, rollout
from posttrain.pipelines.value_training import MADE_BY, ValueTraining, train_value
from posttrain.provenance import hash_json, plain, read_json, versions, write_json
from posttrain.rollouts.collect import completion_seed, prompts_for
from posttrain.rollouts.engine import LEAST_BETA, Request, Sampling
from posttrain.rollouts.rollin import cut_completions
from posttrain.rollouts.table import RolloutTable, is_finished, read_table
from posttrain.rollouts.transformers import TransformersEngine

Stage = Literal["collect", "train", "evaluate"]
Law = Literal["qsharp", "cd"]
STAGES: tuple[Stage, ...] = get_args(Stage)
MATCHING_PROMPTS = 64  # at most, and no more than of the test: training prompts on which CD's beta is found
DEFINED = (
    *("pass@1", "maj@k", "pass@k", "Q#", "CD", "reward model", "best-of-k", "weighted majority"),
    *("KL", "tokens", "seconds", "interval"),
)


@dataclass(frozen=True)
class QSharpConfig:
    """Settings of a run; the defaults are the embedded model's, but for `value` (see recipes/qsharp/arithmetic.yaml)."""

    out: str = field(metadata={"help": "the run's folder"})
    model: str = field(default="tiny", metadata={"help": "pi_ref: tiny, a folder, a .gguf file or a hub id"})
    data: str = field(default="arithmetic", metadata={"help": "a data set or a file; see posttrain rollout --help"})
    prompt: str | None = field(default=None, metadata={"help": "the user turn, with a {problem} placeholder"})
    train_split: str = field(default="train", metadata={"help": "where the value model's prompts come from"})
    train_prompts: int = field(default=300, metadata={"help": "how many of them"})
    train_samples: int = field(default=8, metadata={"help": "completions of pi_ref per training prompt, round one"})
    rounds: int = field(default=2, metadata={"help": "rounds of collecting and training"})
    history: int = field(
        default=1,
        metadata={"help": "value models of so many last rounds guide, by their mean; more than 1: head shared"},
    )
    rollin_samples: int = field(default=4, metadata={"help": "completions per training prompt in each later round"})
    test_data: str | None = field(default=None, metadata={"help": "what guidance is measured on; default: data"})
    test_split: str = field(default="test", metadata={"help": "where guidance is measured"})
    test_prompts: int = field(default=500, metadata={"help": "how many of its prompts"})
    k: int = field(default=8, metadata={"help": "completions of pi_ref per test prompt"})
    guided_samples: int = field(default=4, metadata={"help": "guided completions per test prompt"})
    temperature: float = field(default=1.0, metadata={"help": "of all sampling"})
    top_p: float = field(default=1.0, metadata={"help": "of all sampling; after the tilt"})
    max_tokens: int = field(default=192, metadata={"help": "at most so many tokens per completion"})
    beta: float = field(default=0.1, metadata={"help": "KL coefficient, for rolling in and for measuring"})
    sweep: tuple[float, ...] = field(
        default=(), metadata={"help": "more betas, one completion each, for accuracy against KL"}
    )
    guidance: Guidance = field(default_factory=Guidance, metadata={"help": "candidates, delta, outside, order"})
    value: ValueTraining = field(default_factory=ValueTraining, metadata={"help": "the value model and its training"})
    engine: EngineName = field(
        default="transformers", metadata={"help": "what samples: transformers, vllm, service or ray"}
    )
    urls: tuple[str, ...] = field(default=(), metadata={"help": "of the service: where posttrain rollout-service runs"})
    slots: int = field(default=64, metadata={"help": "requests in the running batch"})
    shard_prompts: int = field(default=50, metadata={"help": "prompts per shard: what is redone after an interruption"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: cuda where there is one"})
    dtype: str | None = field(default=None, metadata={"help": "of the policy; default: bfloat16 on cuda, else float32"})
    seed: int = field(default=0, metadata={"help": "of problems, completions, cuts and training"})

    def __post_init__(self) -> None:
        for name in ("train_prompts", "train_samples", "test_prompts", "k"):
            if getattr(self, name) < 2:
                raise UserError(f"{name}: must be at least 2, got {getattr(self, name)}")
        for name in ("rounds", "history", "rollin_samples", "guided_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.history > 1 and self.value.head != "shared":
            raise UserError(
                f"history: value.head is {self.value.head}, and only shared heads can be averaged; leave history out"
            )
        if self.rounds > 1 and self.value.loss == "ipl":
            raise UserError("rounds: must be 1 with value.loss ipl: what was rolled in differs, and makes no pairs")
        for beta in (self.beta, *self.sweep):
            if not LEAST_BETA <= beta < math.inf:
                raise UserError(f"beta: must be at least {LEAST_BETA:g} and finite, got {beta}")
        if self.engine != "transformers" and self.value.head == "v":
            raise UserError(
                "value.head: a v head reads every candidate as one more token, which vLLM does not; take q or shared"
            )
        if self.engine != "transformers" and self.guidance.outside != "mask":
            raise UserError("guidance.outside: must be mask in vLLM, which gives no account of other tokens")
        if self.guidance.law != "qsharp":
            raise UserError("guidance.law: a run measures both laws; leave it out")
        if self.guidance.lazy:
            raise UserError("guidance.lazy: a run measures the KL of guidance, which is then not known; leave it out")
        if self.train_split == self.test_split and self.test_data in (None, self.data):
            raise UserError(f"test_split: {self.test_split} is the training split too; measure on another one")


@dataclass(frozen=True)
class Point:
    """A guided policy in the plane of accuracy and KL."""

    law: str
    beta: float
    kl: float
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class QSharpRun:
    """What an evaluation leaves: the arms, the points of the frontier, what the rounds' trainings said of themselves, and
    the tables of pi_ref and of the last round's guided policy."""

    config: QSharpConfig
    policy: Policy
    arms: dict[str, Arm]
    points: list[Point]
    rounds: list[dict[str, Any]]
    test: RolloutTable
    guided: RolloutTable
    values: TokenValues  # of the guided completions of the first problems, by the last round's value model

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the numbers."""
        return {
            "config": plain(self.config),
            "policy": {"name": self.policy.name, "fingerprint": self.policy.fingerprint},
            "rounds": self.rounds,
            "versions": versions(),
        }


def check_measured(config: QSharpConfig) -> None:
    """Errors: UserError for a value model that an evaluation, and so a whole run, cannot measure."""
    if config.value.loss == "ipl":
        raise UserError(
            "value.loss: a whole run measures the law of the return; with ipl collect and train alone (posttrain qsharp "
            "--stage collect, --stage train), and measure by posttrain eval --guide"
        )


def run(
    config: QSharpConfig,
    stage: Stage | None = None,
    number: int | None = None,
    say: Callable[[str], None] = print,
    tables_in: Path | None = None,
) -> QSharpRun | None:
    """All stages, or one of them; of all rounds, or of round `number`. None where nothing was evaluated, and in all processes
    but the first.

    tables_in: the folder of `train` and `test`; default: the run's own.
    Errors: UserError naming the field, before anything is sampled where that is possible.
    """
    if number is not None and not 1 <= number <= config.rounds:
        raise UserError(f"round: must be between 1 and the configuration's rounds, {config.rounds}, got {number}")
    if stage in (None, "evaluate"):
        check_measured(config)
    work = Work(config, say, tables_in)
    for each in range(1, config.rounds + 1) if number is None else (number,):
        if stage in (None, "collect"):
            work.ranks.alone(partial(work.collect, each))
        if stage in (None, "train"):
            work.train(each)
    return work.ranks.alone(work.evaluate) if stage in (None, "evaluate") else None


class Work:
    """The stages, on what lies in the run's folder."""

    def __init__(self, config: QSharpConfig, say: Callable[[str], None] = print, tables_in: Path | None = None) -> None:
        self.ranks = Ranks(config.device)
        self.config, self.out = config, Path(config.out)
        self.say = say if self.ranks.first else _silent
        self.tables_in = tables_in or self.out
        self.train_plan = self._plan(config.data, config.train_split, config.train_prompts, config.train_samples)
        test_data = config.test_data or config.data
        self.test_plan = self._plan(test_data, config.test_split, config.test_prompts, config.k)
        self.train_rows, self.test_rows = self.train_plan.rows(), self.test_plan.rows()
        check_overlap(self.train_rows, self.test_rows)
        self.matching_rows = self.train_rows[: min(MATCHING_PROMPTS, len(self.test_rows))]
        if config.value.base:
            with within("value."):
                base_fingerprint(config.value.base)  # refused now, not after the first round is collected
        self.policy = load_model(config.model, self.ranks.device, config.dtype)
        if config.value.layers:
            with within("value."):
                check_layers(config.value.base or config.model, config.value.layers)
        self.guide = cache(self._guide)

    def _plan(self, data: str, split: str, limit: int, samples: int) -> RolloutConfig:
        config = self.config
        sampling = Sampling(config.temperature, config.top_p, max_tokens=config.max_tokens, seed=config.seed)
        return RolloutConfig(
            data,
            split,
            limit,
            config.prompt,
            samples,
            sampling,
            config.slots,
            config.shard_prompts,
            sampler=Sampler(config.engine, config.urls, config.dtype, own=True),
        )

    def _guide(self, number: int, law: Law = "qsharp") -> ValueGuide:
        return load_guide(self._value(number), self.policy, replace(self.config.guidance, law=law))

    def sampling_guide(self, number: int, law: Law = "qsharp") -> ValueGuide | VLLMGuide:
        """The same, of the engine that samples: where that is another than ours, which may want the GPU, ours are let go."""
        if self.config.engine == "transformers":
            return self.guide(number, law)
        self.guide.cache_clear()
        return load_vllm_guide(self._value(number), self.policy, replace(self.config.guidance, law=law))

    def _value(self, number: int) -> Path:
        """What guides after a round."""
        folder = self.out / f"round-{number}" / "value"
        if not (folder / MADE_BY).is_file():  # written last: without it the training was interrupted
            raise UserError(f"stage: round {number} has no value model in {folder}; train it first (--stage train)")
        return folder if guide_folder(self.out, self.config.history, number) == folder else self._average(number)

    def _average(self, number: int) -> Path:
        """The mean of a round's value model and those before it, made anew: it costs nothing."""
        rounds = range(number, max(number - self.config.history, 0), -1)
        values = [read_value_model(self.out / f"round-{each}" / "value", self.policy) for each in rounds]
        folder = guide_folder(self.out, self.config.history, number)
        average_heads(values, history_weights(len(values))).save_pretrained(folder)
        return folder

    def _completions(self, number: int) -> Path:
        """The table that a round's labels come from."""
        return self.tables_in / "train" if number == 1 else self.out / f"round-{number}" / "rollouts"

    def collect(self, number: int) -> None:
        """A round's completions, labelled by how pi_ref ends them."""
        kept = is_finished(self._completions(number))
        if kept:
            self.say(f"round {number}: collected already, in {self._completions(number)}")
        if number == 1:
            if not kept:
                count = f"{self.train_plan.samples} completions of each of {len(self.train_rows)} training prompts"
                self.say(f"round 1: {count}")
            say = _silent if kept else self.say
            rollout(self.policy, self.train_plan, self.train_rows, self._completions(1), resume=True, say=say)
            return
        if not kept:
            self.say(f"round {number}: rolling in with the guide of round {number - 1}, out without it")
        folder = self.out / f"round-{number}"
        # Each part has noise of its own: a roll-out that shared its roll-in's would be tied to it.
        first, second = (
            replace(self.train_plan.sampling, seed=self.config.seed + 1000 * number + part) for part in (0, 1)
        )
        plan = replace(self.train_plan, samples=self.config.rollin_samples)
        rollin = rollout(
            self.policy,
            replace(plan, sampling=first, beta=self.config.beta),
            self.train_rows,
            folder / "rollin",
            resume=True,
            say=_silent,
            guide=self.sampling_guide(number - 1),
        )
        rollout(
            self.policy,
            replace(plan, sampling=second),
            self.train_rows,
            self._completions(number),
            resume=True,
            say=_silent,
            prefixes=cut_completions(rollin, second.seed),
        )

    def train(self, number: int) -> dict[str, Any]:
        """A round's value model, from its start, on the completions of all rounds so far; what its training says of itself."""
        for each in range(1, number + 1):
            if not is_finished(self._completions(each)):
                raise UserError(
                    f"stage: round {each} is not collected, or not all of it, in {self._completions(each)}; "
                    f"collect it first (--stage collect --round {each})"
                )
        tables = [read_table(self._completions(each)) for each in range(1, number + 1)]
        for table in tables:
            table.expect_policy(self.policy.fingerprint)
        folder = self.out / f"round-{number}" / "value"
        new = not (folder / MADE_BY).is_file()
        if new:
            self.say(
                f"round {number}: a value model ({self.config.value.head}) from {sum(map(len, tables))} completions"
            )
        made = train_value(self.policy, tables, self.config.value, folder, self.config.seed, self.ranks)
        if new:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in made["metrics"].items())
            counted = "pairs" if self.config.value.loss == "ipl" else "prompts, per token"
            self.say(f"round {number}: on held-out {counted}: {shown}")
        return made

    def evaluate(self) -> QSharpRun:
        """pi_ref, its votes and re-rankings, every round's guided policy, and CD at the KL of the last one."""
        config = self.config
        for number in range(1, config.rounds + 1):
            self.sampling_guide(number)  # refused before anything is sampled
        trainings = [self.train(number) for number in range(1, config.rounds + 1)]  # made already, by these settings
        if not is_finished(self.tables_in / "test"):
            self.say(f"test: {config.k} completions of each of {len(self.test_rows)} prompts")
        self.say(f"test: {config.guided_samples} guided completions of each prompt, and what they are compared with")
        test = rollout(self.policy, self.test_plan, self.test_rows, self.tables_in / "test", resume=True, say=_silent)
        correct, answers = test.rectangle("correct"), test.rectangle("extracted")
        lengths = [[len(ids) for ids in row] for row in test.rectangle("completion_ids")]
        sampled = test.manifest["seconds"]
        arms = sampled_arms(correct, answers, lengths, sampled)
        learned, guided, points = read_table(self.tables_in / "train").manifest["seconds"], test, []
        for number, training in enumerate(trainings, 1):
            if number > 1:
                parts = [read_table(self.out / f"round-{number}" / part) for part in ("rollin", "rollouts")]
                learned += sum(part.manifest["seconds"] for part in parts)
            learned += training["seconds"]
            guided = self._guided(number, "qsharp", config.beta)
            name = "qsharp" if number == 1 else f"qsharp_{number}"
            title = f"Q#, round {number}, beta {config.beta:g}"
            arms[name] = policy_arm(name, title, guided, learned)
        points.append(_point("Q#", config.beta, guided))
        beta = self.matched_beta(config.rounds)
        matched = self._guided(config.rounds, "cd", beta)
        arms["cd"] = policy_arm("cd", f"CD at the KL of Q#, beta {beta:.3g}", matched, learned)
        points.append(_point("CD", beta, matched))
        for beta in config.sweep:
            points.append(_point("Q#", beta, self._guided(config.rounds, "qsharp", beta, 1)))
            points.append(_point("CD", beta, self._guided(config.rounds, "cd", beta, 1)))
        scores = self.scores(test)
        arms["qsharp_best"] = reranked_arm(
            "qsharp_best", f"Q# as reward model, best of {config.k}", scores, correct, lengths, sampled + learned
        )
        arms["qsharp_vote"] = weighted_vote_arm(
            "qsharp_vote",
            f"majority of {config.k} weighted by Q#",
            scores,
            answers,
            correct,
            lengths,
            sampled + learned,
            self.guide(config.rounds).value.least,
        )
        return QSharpRun(config, self.policy, arms, points, trainings, test, guided, self.values(guided))

    def scores(self, table: RolloutTable) -> list[list[float]]:
        """E[R] of a table's completions [prompts, samples] by the last round's value model."""
        rows = list(zip(table.column("prompt_ids"), table.column("completion_ids"), strict=True))
        value = self.guide(self.config.rounds).value
        found = value_scores(value, rows, self.policy.model)
        return found.view(len(table.rectangle("reward")), -1).tolist()

    def values(self, table: RolloutTable) -> TokenValues:
        """What the last round's value model expects after every token of a table's first completions."""
        prompts, completions = (table.by_prompt(name)[:SHOWN] for name in ("prompt_ids", "completion_ids"))
        rows = [row for group in zip(prompts, completions, strict=True) for row in zip(*group, strict=True)]
        found = iter(token_values(self.guide(self.config.rounds).value, rows, self.policy.model))
        return [
            [list(zip(pieces(self.policy.tokenizer, ids), next(found), strict=True)) for ids in group]
            for group in completions
        ]

    def matched_beta(self, number: int) -> float:
        """The beta at which CD, with the same value model, moves as far from pi_ref as Q# does, on training prompts."""
        kept = self.out / f"round-{number}" / "cd_beta.json"
        guide, cd = self.guide(number), self.guide(number, "cd")
        prompts = hash_json(self.matching_rows)
        asked = plain({"guide": guide.settings, "beta": self.config.beta, "prompts": prompts})
        made = read_json(kept, "out") if kept.is_file() else {}
        if made.get("asked") != asked:
            self.say(f"round {number}: looking for the beta at which CD has the KL of Q#")
            target = self.mean_kl(guide, self.config.beta)
            # However small its beta, Q# tilts by ratios of values, some nats; CD by differences over beta, as much at some 0.3
            # where values differ by a half.
            beta, kl = beta_of_kl(partial(self.mean_kl, cd), target, start=max(self.config.beta, 0.3))
            if abs(kl - target) > 0.1 * target:
                self.say(f"round {number}: CD's KL comes to {kl:.3g} nats at best, that of Q# is {target:.3g}")
            made = {"asked": asked, "beta": beta, "kl": kl, "kl_of_qsharp": target}
            write_json(kept, made)
        found: float = made["beta"]
        return found

    def mean_kl(self, guide: ValueGuide, beta: float) -> float:
        """KL per completion, in nats, on a few training prompts."""
        policy, sampling = self.policy, self.train_plan.sampling
        engine = TransformersEngine(
            policy.model, policy.tokenizer, fingerprint=policy.fingerprint, slots=self.config.slots, guide=guide
        )
        prompts = prompts_for(self.matching_rows, policy.tokenizer, self.train_plan.template)
        requests = [
            Request(i, prompt.ids, replace(sampling, seed=completion_seed(sampling.seed, prompt.id, 0)), beta)
            for i, prompt in enumerate(prompts)
        ]
        kls = [done.kl for done in engine.generate(requests) if done.kl is not None]  # all: a run is not lazy
        return sum(kls) / len(kls)

    def _guided(self, number: int, law: Law, beta: float, samples: int | None = None) -> RolloutTable:
        samples = samples or self.config.guided_samples
        plan = replace(self.test_plan, samples=samples, beta=beta)
        folder = self.out / "guided" / f"{law}-{number}-beta-{beta!r}-x{samples}"
        return rollout(
            self.policy, plan, self.test_rows, folder, resume=True, say=_silent, guide=self.sampling_guide(number, law)
        )


def guide_folder(run: Path, history: int, number: int) -> Path:
    """What guides after a round of a run in that folder."""
    return run / f"round-{number}" / ("value" if min(history, number) == 1 else "history")


def publish(result: QSharpRun, title: str, lead: str) -> None:
    """`summary.json` and `report.html` in the run's folder."""
    out = Path(result.config.out)
    summary = {name: arm.summary() for name, arm in result.arms.items()}
    paired = comparisons({name: arm.per_problem for name, arm in result.arms.items()})
    made = {"arms": summary, "comparisons": paired, "frontier": result.points, "manifest": result.manifest}
    write_json(out / "summary.json", made)
    write_report(
        out / "report.html",
        title=title,
        lead=lead,
        arms=result.arms,
        figures=figures(result),
        table=result.guided,
        scores=None,
        definitions=DEFINED,
        manifest=result.manifest,
        values=result.values,
    )


def comparisons(scores: Mapping[str, ArrayLike]) -> dict[str, Comparison]:
    """The last round, one sample each, against the model, its votes, CD at the same KL and the round before; scores: of every
    arm by problem [prompts]."""
    rounds = [name for name in scores if re.fullmatch(r"qsharp(_\d+)?", name)]
    last, *before = reversed(rounds)
    others = ("base", "majority", "cd", *before[:1])
    return {f"{last} - {other}": paired_comparison(scores[last], scores[other]) for other in others}


def figures(result: QSharpRun) -> list[Figure]:
    laws: dict[str, list[Point]] = {}
    for point in sorted(result.points, key=lambda point: point.kl):
        laws.setdefault(point.law, []).append(point)
    base = result.arms["base"]
    return [
        Figure(
            frontier(laws, base.accuracy, base.interval),
            "Accuracy of one sample against the KL that guidance spends; the same value model, labelled with beta.",
        ),
        Figure(length_histogram(lengths_by_verdict(result.guided)), "Lengths of guided completions by verdict."),
    ]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token, where it stands."""
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=False) for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def _point(law: str, beta: float, table: RolloutTable) -> Point:
    per_problem = [sum(row) / len(row) for row in table.rectangle("correct")]
    kl = table.column("kl")
    accuracy = sum(per_problem) / len(per_problem)
    return Point(law, beta, sum(kl) / len(kl), accuracy, mean_interval(per_problem))


def _silent(_: str) -> None:
    """The prompt has been shown already."""

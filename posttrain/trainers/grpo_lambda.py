"""GRPO-lambda on TRL: group-relative policy optimisation whose length penalty is gated by how often a group is right.

One method of TRL's GRPOTrainer is overridden for it, `_calculate_rewards`: rewards arrive there gathered for the whole
generation batch, groups contiguous even where ranks share one, and lengths are gathered beside them. (Another, the sampler,
so that a resumed training goes on as it would have.) So everything else is TRL's own: losses, vLLM, adapters, several weighted
rewards, two-sided masks. Whatever reads rewards later, filters among them, sees the shaped ones.
"""

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer

from posttrain.errors import UserError, nearest
from posttrain.objectives import length
from posttrain.objectives.advantages import group_advantages
from posttrain.objectives.length import gate, group_gated
from posttrain.trainers.resumable import Resumable
from posttrain.trainers.verifiers import Verifier, tolerant

logger = logging.getLogger(__name__)

PEERS: dict[str, Callable[..., Tensor]] = {
    name: getattr(length, name)
    for name in (
        *("sigmoid_length", "kimi", "l1_exact", "l1_max", "soft_overlong"),
        *("shorter_better", "alp", "difficulty_linear", "gr3", "cosine"),
    )
}
PATIENCE = 10  # generation batches without a finished completion, before it is said


@dataclass
class GRPOLambdaConfig(GRPOConfig):
    """Arguments of TRL's GRPOTrainer, and the gate's own. The paper's constants are not known; these are ours.

    Two-sided masks of ratios are TRL's: `delta` bounds the ratio of the update from above where the advantage is negative
    too (`epsilon` and `epsilon_high` clip it one side at a time); `vllm_importance_sampling_clip_min` and `_clip_max` with
    the modes `token_mask` and `sequence_mask` drop what vLLM's law and the trainer's disagree on, both ways;
    `off_policy_mask_threshold` drops completions of negative advantage that the policy has moved away from.

    A peer in place of the gate (`length_reward`) uses its paper's settings, or those of `length_reward_options`; of the
    gate's it has the warm-up, `alpha_ramp_steps` (its term grows to its whole) and the guard, and gate_fraction 0
    switches it off.
    """

    scale_rewards: str = field(
        default="none", metadata={"help": "group, batch or none; under group, alpha is inert where all are right"}
    )
    correctness_reward: str | None = field(
        default=None, metadata={"help": "the reward function that is shaped, by name; default: the first"}
    )
    length_reward: str = field(
        default="group_gated", metadata={"help": f"group_gated, or a peer in its place: {', '.join(PEERS)}"}
    )
    length_reward_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "settings of a peer, such as {target: 500} for l1_exact; default: its paper's"}
    )
    gate_fraction: float = field(
        default=0.2, metadata={"help": "part of the prompts, the most often right, whose lengths are rewarded"}
    )
    alpha: float = field(default=0.2, metadata={"help": "a correct completion's reward is above 1 - alpha"})
    min_group_accuracy: float = field(default=0.5, metadata={"help": "below it no group is gated, whatever its rank"})
    length_std_floor: float = field(default=0.05, metadata={"help": "least spread of lengths, as a part of their mean"})
    penalty_warmup_steps: int = field(default=50, metadata={"help": "steps without a penalty"})
    alpha_ramp_steps: int = field(default=0, metadata={"help": "steps in which alpha then grows to its value"})
    gate_ramp_steps: int = field(default=0, metadata={"help": "steps in which the gated part then grows to its value"})
    guard_drop: float | None = field(
        default=0.02,
        metadata={
            "help": "a fall of the evaluation's accuracy that switches the penalty off, if lengths fall; none: never"
        },
    )
    guard_steps: int = field(default=100, metadata={"help": "within how many steps it falls"})

    def __post_init__(self) -> None:
        for name in ("gate_fraction", "alpha", "min_group_accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.length_std_floor < math.inf:
            raise UserError(f"length_std_floor: must not be negative, got {self.length_std_floor}")
        for name in ("penalty_warmup_steps", "alpha_ramp_steps", "gate_ramp_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.guard_drop is not None and not self.guard_drop > 0:
            raise UserError(f"guard_drop: must be positive, got {self.guard_drop}; leave it empty for no guard")
        if self.guard_steps < 1:
            raise UserError(f"guard_steps: must be at least 1, got {self.guard_steps}")
        if self.length_reward != "group_gated" and self.length_reward not in PEERS:
            known = ("group_gated", *PEERS)
            raise UserError(f"length_reward: no {self.length_reward!r}{nearest(self.length_reward, known)}")
        if self.num_generations is not None and self.num_generations < 2:
            raise UserError(
                f"num_generations: must be at least 2, got {self.num_generations}; a group is compared within"
            )
        if self.scale_rewards not in ("group", "batch", "none", True, False):
            raise UserError(f"scale_rewards: must be group, batch or none, got {self.scale_rewards!r}")
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from None
        self._check_options()
        if (
            self.scale_rewards == "group"
            and self.length_reward == "group_gated"
            and self.gate_fraction * self.alpha > 0
        ):
            warnings.warn(
                "scale_rewards: under 'group' alpha is inert in groups that are all right, the ones the gate prefers; "
                "'none' makes the length gradient proportional to alpha",
                stacklevel=2,
            )

    @property
    def device(self) -> torch.device:
        """A processor without the number that accelerate gives it on each rank, and torch's loader of checkpoints does not know."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found

    def _check_options(self) -> None:
        options = self.length_reward_options or {}
        if not isinstance(options, dict):
            raise UserError(f"length_reward_options: must be a mapping, got {options!r}")
        if self.length_reward == "group_gated":
            if options:
                raise UserError("length_reward_options: group_gated has none; its settings are fields of their own")
            return
        peer, example = PEERS[self.length_reward], torch.ones(1, 2)
        known = list(inspect.signature(peer).parameters)[3:]
        for name, value in options.items():
            if name not in known:
                raise UserError(f"length_reward_options.{name}: {self.length_reward} has {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"length_reward_options.{name}: must be a number, got {value!r}")
        try:
            peer(example, example, example.bool(), **options)
        except (TypeError, ValueError) as error:  # one that it cannot do without, or out of range
            raise UserError(f"length_reward_options: {self.length_reward}: {error}") from None


class EpochOrder(Sampler):
    """TRL's order of the problems in every epoch, in a resumed training too, whose first pass TRL would draw as epoch 0."""

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self.sampler, self.epoch = sampler, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            generator = self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=generator)
        return iter(self.sampler)


class GRPOLambdaTrainer(Resumable, GRPOTrainer):
    """As TRL's, except that the correctness reward's column is shaped while training: r * `group_gated` where r > 1/2,
    or r + (what a peer gives - c), c = 1 where r > 1/2.

    A completion that the token limit cut off is incorrect: its r is 0 at most. A reward function that raises marks that
    completion as not scored (None), and the run goes on. Evaluation is not shaped: its accuracy is the accuracy.

    What it logs, besides TRL's: `accuracy`; `reward_unshaped`, the weighted reward without the length term;
    `gate/alpha` (of a peer: the part of its term), `gate/fraction` (of prompts gated; a peer takes all), `gate/accuracy`
    (of theirs), `gate/negative_correct` (correct
    completions per batch whose advantage is negative; in a group that is all right, the long half always is);
    `completions/mean_length_right`, `completions/mean_length_wrong`;
    `verifier_errors` per batch, and in the completions table what each was.

    A resumed training continues bit for bit, in any epoch, where checkpoints fall between generation batches (always, unless
    num_iterations or steps_per_generation let several optimiser steps share one: let save_steps be a multiple of these).
    Weights, optimiser, schedule, random states and the log are the checkpoint's, the steps and the guard follow from
    the log; the count of batches without a finished completion begins anew.

    Errors: UserError for args that are not a GRPOLambdaConfig, a correctness_reward that is no reward function, a reward
    function that returns the wrong number of rewards, or one that raises on the whole first batch.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GRPOLambdaConfig | None = None, *others: Any, **kwargs: Any
    ) -> None:
        if args is None:  # as TRL's, with our own arguments
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GRPOLambdaConfig(f"{name.rstrip('/').rpartition('/')[2]}-GRPO-lambda")
        if not isinstance(args, GRPOLambdaConfig):
            raise UserError(f"args: must be a GRPOLambdaConfig, got a {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        names, wanted = self.reward_func_names, self.args.correctness_reward
        if wanted is not None and wanted not in names:
            raise UserError(f"correctness_reward: no reward function {wanted!r}{nearest(wanted, names)}")
        self._correctness = 0 if wanted is None else names.index(wanted)
        self.reward_funcs: list[Any] = [
            function if isinstance(function, nn.Module) else tolerant(function, name)
            for function, name in zip(self.reward_funcs, names, strict=True)
        ]
        self._collapsed = False
        self._cut_off = 0  # generation batches in a row without a finished completion

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        errors = self._errors(len(prompts))
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}  # as TRL tells truncated ones
        facts = [
            (len(ids), ids[-1] in ends, error is not None)
            for ids, error in zip(completion_ids_list, errors, strict=True)
        ]
        lengths, finished, failed = self.accelerator.gather(torch.tensor(facts, device=rewards.device)).T
        self._report_errors(errors, failed)
        group = self.num_generations if self.model.training else self.num_generations_eval
        lengths, finished = lengths.reshape(-1, group), finished.reshape(-1, group).bool()
        outcomes = rewards[:, self._correctness].view(-1, group)
        correct = (outcomes > 0.5).to(rewards.dtype).masked_fill(outcomes.isnan(), math.nan)
        outcomes = outcomes.where(finished, outcomes.clamp(max=0))
        unshaped = rewards.clone()
        unshaped[:, self._correctness] = outcomes.flatten()
        shaped = unshaped.clone()
        args, (gate_fraction, alpha) = self.args, self._strength()
        right = (correct == 1) & finished
        if args.length_reward == "group_gated":
            factors = group_gated(
                *(correct, lengths, finished, gate_fraction, alpha, args.min_group_accuracy, args.length_std_floor)
            )
            column = torch.where(right, outcomes * factors, outcomes)
            gated = gate(correct, finished, gate_fraction, args.min_group_accuracy)
        else:
            found = PEERS[args.length_reward](correct, lengths, finished, **args.length_reward_options or {})
            column = outcomes + alpha * (found - right.to(found.dtype))
            gated = torch.full((len(correct),), alpha > 0, device=rewards.device)
        shaped[:, self._correctness] = column.flatten()
        self._measure(unshaped, shaped, lengths, right, outcomes.isnan(), gated, alpha)
        if self.model.training:
            self._watch_truncation(finished)
        return shaped

    def _strength(self) -> tuple[float, float]:
        """(gate fraction, alpha, or the part of a peer's term) at this step; 0 in evaluation, in the warm-up and after a
        collapse."""
        args, step = self.args, self.state.global_step - self.args.penalty_warmup_steps
        if not self.model.training or step < 0:
            return 0.0, 0.0
        if not self._collapsed and args.guard_drop is not None:
            found = collapse(self.state.log_history, args.guard_drop, args.guard_steps, args.penalty_warmup_steps)
            self._collapsed = found is not None
            if found is not None and self.accelerator.is_main_process:
                logger.warning(
                    "the length penalty is off from step %d on: accuracy fell from %.3f to %.3f while lengths fell from %.0f "
                    "to %.0f tokens; a smaller alpha, or a smaller gate_fraction, may hold",
                    *(self.state.global_step, *found),
                )
        if self._collapsed:
            return 0.0, 0.0
        alpha = args.alpha if args.length_reward == "group_gated" else float(args.gate_fraction > 0)
        return args.gate_fraction * _ramp(step, args.gate_ramp_steps), alpha * _ramp(step, args.alpha_ramp_steps)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return EpochOrder(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _errors(self, count: int) -> list[str | None]:
        """What was wrong with each of this rank's completions, of all reward functions."""
        found: list[list[str]] = [[] for _ in range(count)]
        for function in self.reward_funcs:
            if isinstance(function, Verifier):
                for own, error in zip(found, function.errors, strict=True):
                    own += [f"{function.name}: {error}"] if error is not None else []
        return ["; ".join(own) or None for own in found]

    def _report_errors(self, errors: Sequence[str | None], failed: Tensor) -> None:
        if self.log_completions:
            self._log_completion_extra("verifier_error", list(errors))
        self._metrics[self._mode]["verifier_errors"].append(float(failed.sum()))
        if not failed.any():
            return
        first = next((error for error in errors if error is not None), "on another rank")
        if failed.all() and self.state.global_step == 0:
            raise UserError(f"reward_funcs: every completion of the first batch failed, {first}")
        if self.accelerator.is_main_process:
            logger.warning("%d of %d completions could not be scored: %s", int(failed.sum()), len(failed), first)

    def _measure(
        self,
        unshaped: Tensor,
        shaped: Tensor,
        lengths: Tensor,
        right: Tensor,
        unscored: Tensor,
        gated: Tensor,
        alpha: float,
    ) -> None:
        """All of the whole generation batch; what there is nothing to average for is left out."""
        wrong, scored = ~right & ~unscored, ~unscored
        weights = self.reward_weights.to(shaped.device)
        measured: dict[str, Any] = {
            "accuracy": _mean(right, scored),
            "reward_unshaped": _mean((unshaped * weights).nansum(-1).view_as(right), scored),
            "completions/mean_length_right": _mean(lengths, right),
            "completions/mean_length_wrong": _mean(lengths, wrong),
        }
        if self.model.training:
            signs = self._centred(shaped, right.shape[1])
            measured |= {
                "gate/alpha": alpha,
                "gate/fraction": gated.float().mean(),
                "gate/accuracy": _mean(right, scored & gated[:, None]),
                "gate/negative_correct": (right & (signs < 0)).sum(),
            }
        for name, value in measured.items():
            if not math.isnan(value := float(value)):
                self._metrics[self._mode][name].append(value)

    def _centred(self, rewards: Tensor, group: int) -> Tensor:
        """What the advantages [prompts, samples] are before their last division, which changes no sign."""
        weights, unscored = self.reward_weights.to(rewards.device), rewards.isnan().all(-1)
        if self.multi_objective_aggregation == "sum_then_normalize":
            total = (rewards * weights).nansum(-1).masked_fill(unscored, torch.nan)
            return group_advantages(total.view(-1, group), "none")
        columns = [group_advantages(column.view(-1, group)) for column in rewards.T]
        total = sum(weight * column for weight, column in zip(weights, columns, strict=True))
        return total - total[~unscored.view_as(total)].mean()

    def _watch_truncation(self, finished: Tensor) -> None:
        self._cut_off = 0 if finished.any() else self._cut_off + 1
        if self._cut_off == PATIENCE and self.accelerator.is_main_process:
            logger.warning(
                "max_completion_length: all completions of the last %d batches were cut off at %d tokens, so that all are "
                "incorrect and nothing is learned; raise it, or see that the prompt lets the model end",
                *(PATIENCE, self.max_completion_length),
            )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"


def collapse(
    history: Sequence[dict[str, Any]], drop: float, steps: int, since: int = 0
) -> tuple[float, float, float, float] | None:
    """The first two evaluations, at most `steps` apart, between which accuracy fell by more than `drop` while lengths fell:
    (accuracy before, after, length before, after), or None.

    history: the trainer's log, in order; since: what was evaluated up to this step cannot be the penalty's doing.
    Several data sets evaluated at one step are averaged.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for entry in history:
        accuracy, length = entry.get("eval_accuracy"), entry.get("eval_completions/mean_length")
        if accuracy is not None and length is not None:
            found.setdefault(entry["step"], []).append((accuracy, length))
    points = [
        (step, *(sum(column) / len(column) for column in zip(*values, strict=True))) for step, values in found.items()
    ]
    for i, (step, accuracy, length) in enumerate(points):
        for earlier, before, longer in points[:i]:
            near = step > since and step - earlier <= steps
            if near and before - accuracy > drop and length < longer:
                return before, accuracy, longer, length
    return None


def _ramp(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps) if steps else 1.0


def _mean(values: Tensor, where: Tensor) -> float:
    return float(values[where].float().mean())  # NaN where there are none

"""Training a probe (Q-Probe, Li et al. 2024, arXiv 2402.14688, sections 4 and 5) on cached features, in seconds.

Prompts are split into training and held-out ones (the reference code holds out samples of the *same* prompts, which
flatters the probe by ten points). Every epoch permutes the prompts and each prompt's samples, and cuts the samples
into chunks of `k_train`: a chunk is one draw of the policy that the policy loss optimises.

What decides when to stop, and which layer and pooling to read, is the reward of re-ranking held-out prompts by
argmax: it is what one wants, it means the same for every layer, and the scale of the scores, on which the four losses
disagree, does not enter. It is exact over all subsets of half of a prompt's samples (`best_of_k`), at most k_train:
the best of *all* would see one sample per prompt, and choosing by so coarse a number costs accuracy on new prompts.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.decoding.rerank import best_of_k
from posttrain.errors import UserError, nearest
from posttrain.models.features import FeatureSpec
from posttrain.models.probe import Probe, ProbeCard
from posttrain.objectives.qprobe import dropout_penalty, policy_loss, preference_loss, reward_loss
from posttrain.progress import bar

Loss = Literal["policy", "bce", "mse", "preference"]


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the probe. The paper's: linear, lr 5e-5 on raw features for 13,800 steps, k_train 10, beta_train 1."""

    loss: Loss = field(default="policy", metadata={"help": "policy (best), bce or mse (pointwise), preference (pairs)"})
    k_train: int = field(default=10, metadata={"help": "samples per chunk: the k of the policy that is optimised"})
    beta_train: float = field(default=1.0, metadata={"help": "KL coefficient of the policy loss, in reward units"})
    hidden: int | None = field(default=None, metadata={"help": "units of a hidden layer; none is the linear probe"})
    standardise: bool = field(default=True, metadata={"help": "features to mean 0, std 1 over the training prompts"})
    learning_rate: float = field(default=3e-3, metadata={"help": "of AdamW; 3e-3 suits standardised features"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW; the reference code in effect has 0.01"})
    dropout: float = field(
        default=0.0, metadata={"help": "of a linear probe's features, in closed form; losses bce, mse, preference"}
    )
    batch_chunks: int = field(default=100, metadata={"help": "chunks per optimiser step"})
    max_steps: int = field(default=2000, metadata={"help": "optimiser steps at most"})
    eval_steps: int = field(default=20, metadata={"help": "look at the held-out value every so many steps"})
    patience: int = field(default=25, metadata={"help": "stop after so many looks without a better value"})
    validation_fraction: float = field(default=0.2, metadata={"help": "share of prompts to stop and choose by"})
    seed: int = field(default=0, metadata={"help": "of the split, the chunks and the initial weights"})

    def __post_init__(self) -> None:
        losses = get_args(Loss)
        if self.loss not in losses:
            hint = nearest(str(self.loss), losses)
            raise UserError(f"loss: must be one of {', '.join(losses)}, got {self.loss!r}{hint}")
        if self.k_train < 2:
            raise UserError(f"k_train: must be at least 2, got {self.k_train}; one sample leaves nothing to choose")
        for name in ("beta_train", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}: must be positive, got {getattr(self, name)}")
        for name in ("batch_chunks", "max_steps", "eval_steps", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden: must be at least 1, got {self.hidden}; leave it out for a linear probe")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"weight_decay: must not be negative, got {self.weight_decay}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: must be at least 0 and below 1, got {self.dropout}")
        if self.dropout and (self.hidden is not None or self.loss == "policy"):
            raise UserError("dropout: its closed form is of a linear probe with loss bce, mse or preference")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction: must be between 0 and 1, got {self.validation_fraction}")


@dataclass(frozen=True)
class ProbeResult:
    """The probe, where it reads, and how it did on held-out prompts.

    held_out: the prompts, as indices, that it was not trained on; only they tell what its scores mean elsewhere.
    curve: held-out value every `eval_steps` steps for the chosen features; curve[0] is the untrained probe: the mean
    reward. A value is the mean reward of the argmax of k samples, k = half of a prompt's samples but within 2 and k_train;
    `k` is that of the prompt with the most samples.
    values: the best held-out value of every candidate in `specs`. Choosing by them makes the best one a little
    optimistic: measure the probe on prompts of neither part. metrics: held-out `base` (mean reward), `value`
    (re-ranked) and `oracle` (the best reward, same k); `steps` taken, `best_step`, `prompts` trained on and
    `validation_prompts`, `seconds`.
    """

    probe: Probe
    spec: FeatureSpec | None
    held_out: tuple[int, ...]
    k: int
    curve: tuple[float, ...]
    values: tuple[float, ...]
    metrics: dict[str, float]


class ProbeTrainer:
    """Fits a probe to features of sampled completions and their rewards.

    The features may be hidden states of the policy (`models.features`) or the embeddings of any API: an array is all
    it takes, and the policy's weights and log-probabilities are never needed.
    """

    def __init__(self, config: ProbeConfig | None = None) -> None:
        self.config = config or ProbeConfig()

    def fit(
        self,
        features: Any,
        rewards: Any,
        *,
        mask: Any = None,
        specs: Sequence[FeatureSpec] | None = None,
        policy: str | None = None,
    ) -> ProbeResult:
        """Trains one probe per candidate feature and keeps the best on held-out prompts.

        features: [prompts, samples, d], or [prompts, samples, specs, d] with `specs` naming the candidates; rewards
        [prompts, samples]. Ragged groups: a boolean `mask` [prompts, samples], or lists with one array per prompt.
        Arrays are whatever torch.as_tensor takes, any float type; the device of the features is where training
        happens. policy: the fingerprint of the model whose hidden states these are, stored in the probe.

        Errors: UserError for shapes that do not fit, features or rewards that are not finite, rewards outside [0, 1]
        with bce, and fewer than two prompts whose samples have different rewards.
        """
        started = time.perf_counter()
        config = self.config
        groups = _Groups.of(features, rewards, mask, specs)
        if config.loss == "bce" and not ((groups.rewards >= 0) & (groups.rewards <= 1)).all():
            raise UserError("rewards: must be within [0, 1] for loss bce; use mse or policy")
        train, held_out = self._split(groups)

        candidates = groups.features.shape[1]
        fitted = []
        with bar("probe", candidates) as shown:
            for candidate in range(candidates):
                card = ProbeCard(
                    dim=groups.features.shape[-1],
                    hidden=config.hidden,
                    feature=specs[candidate] if specs else None,
                    policy=policy,
                    loss=config.loss,
                    beta=config.beta_train if config.loss == "policy" else None,
                )
                parts = groups.part(train, candidate), groups.part(held_out, candidate)
                fitted.append(self._fit_one(card, *parts))
                shown.advance()

        values = tuple(max(curve) for _, curve in fitted)
        probe, curve = fitted[values.index(max(values))]
        validation = groups.part(held_out, 0)
        metrics = {
            "base": curve[0],
            "value": max(values),
            "oracle": self._value(validation.rewards, validation),
            "steps": min((len(curve) - 1) * config.eval_steps, config.max_steps),
            "best_step": min(curve.index(max(curve)) * config.eval_steps, config.max_steps),
            "prompts": len(train),
            "validation_prompts": len(held_out),
            "seconds": time.perf_counter() - started,
        }
        k = int(self._sizes(validation).max())
        return ProbeResult(probe.eval(), probe.card.feature, tuple(held_out.tolist()), k, curve, values, metrics)

    def _split(self, groups: "_Groups") -> tuple[Tensor, Tensor]:
        """Prompts to train on and to hold out, each with its share of those whose samples differ in reward."""
        generator = torch.Generator().manual_seed(self.config.seed)
        contrast = groups.contrast(groups.index)
        if contrast.sum() < 2:
            raise UserError(
                f"rewards: {int(contrast.sum())} of {len(contrast)} prompts have samples with different rewards, "
                "at least 2 are needed; sample more prompts, or more per prompt"
            )
        train: list[Tensor] = []
        held_out: list[Tensor] = []
        for prompts in (contrast.nonzero().flatten(), (~contrast).nonzero().flatten()):
            prompts = prompts[torch.randperm(len(prompts), generator=generator)]
            count = round(len(prompts) * self.config.validation_fraction)
            if not train:  # of the prompts with a contrast, each part needs one
                count = min(max(count, 1), len(prompts) - 1)
            train.append(prompts[count:])
            held_out.append(prompts[:count])
        return torch.cat(train), torch.cat(held_out)

    def _fit_one(self, card: ProbeCard, train: "_Groups", validation: "_Groups") -> tuple[Probe, tuple[float, ...]]:
        """The best probe on one candidate feature, and its held-out value before training and every `eval_steps`."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            probe = Probe(card).to(train.features.device)
        if config.standardise:
            probe.standardise(train.features)
        optimiser = torch.optim.AdamW(probe.parameters(), config.learning_rate, weight_decay=config.weight_decay)

        curve = [self._value(probe.score(validation.features), validation)]
        best, best_value = copy.deepcopy(probe.state_dict()), curve[0]
        for step, chunks in enumerate(islice(self._batches(train, generator), config.max_steps), 1):
            rows, valid = chunks.clamp(min=0), chunks >= 0  # [chunks, k_train]
            loss = self._loss(probe, train.features[rows], train.rewards[rows], valid)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % config.eval_steps and step < config.max_steps:
                continue
            scores = probe.score(validation.features)
            if not scores.isfinite().all():
                raise UserError(f"learning_rate: training diverged at {config.learning_rate}; lower it, or standardise")
            curve.append(self._value(scores, validation))
            if curve[-1] > best_value:
                best, best_value = copy.deepcopy(probe.state_dict()), curve[-1]
            if len(curve) - 1 - curve.index(best_value) >= config.patience:
                break
        probe.load_state_dict(best)
        return probe, tuple(curve)

    def _batches(self, groups: "_Groups", generator: torch.Generator) -> Iterator[Tensor]:
        """One epoch after another without end, each cut into batches of equal size, `batch_chunks` at most."""
        while True:
            chunks = self._chunks(groups, generator)
            if not len(chunks):  # this order left every right sample in a chunk of its own: draw another
                continue
            yield from chunks.tensor_split(-(-len(chunks) // self.config.batch_chunks))

    def _chunks(self, groups: "_Groups", generator: torch.Generator) -> Tensor:
        """Row numbers [chunks, k_train] for one epoch, -1 where a chunk is short; both orders are drawn anew."""
        index = groups.index
        keys = torch.rand(index.shape, generator=generator).masked_fill(index < 0, 2)
        index = index.gather(1, keys.argsort(1))
        index = F.pad(index, (0, -index.shape[1] % self.config.k_train), value=-1)
        chunks = index.view(-1, self.config.k_train)
        # Without a contrast the losses that compare samples have no gradient.
        comparing = self.config.loss in ("policy", "preference")
        chunks = chunks[groups.contrast(chunks) if comparing else (chunks >= 0).any(1)]
        return chunks[torch.randperm(len(chunks), generator=generator)].to(groups.features.device)

    def _loss(self, probe: Probe, features: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
        """Scalar; features [chunks, k_train, d], the others [chunks, k_train]. Preferences are all pairs within a chunk that
        differ in reward."""
        config, scores = self.config, probe(features)
        if config.loss == "policy":
            return policy_loss(scores, rewards, config.beta_train, valid)
        if config.loss == "preference":
            better = (rewards[:, :, None] > rewards[:, None, :]) & valid[:, :, None] & valid[:, None, :]
            chunk, chosen, rejected = better.nonzero(as_tuple=True)
            loss = preference_loss(scores[chunk, chosen], scores[chunk, rejected])
            if config.dropout:  # one mask for both of a pair
                margins = scores[chunk, chosen] - scores[chunk, rejected]
                spread = probe.spread(features[chunk, chosen] - features[chunk, rejected])
                loss = loss + dropout_penalty(margins, spread, config.dropout, "bce")
            return loss
        loss = reward_loss(scores, rewards, config.loss, valid)
        if config.dropout:
            spread = probe.spread(features - probe.mean)
            loss = loss + dropout_penalty(scores, spread, config.dropout, config.loss, valid)
        return loss

    def _value(self, scores: Tensor, groups: "_Groups") -> float:
        """Re-ranked reward by scores [rows], as ProbeResult says."""
        index = groups.index.to(scores.device)
        rows, valid = index.clamp(min=0), index >= 0
        k = self._sizes(groups).to(scores.device)
        return best_of_k(scores[rows], groups.rewards[rows], k.clamp(min=1), valid).item()

    def _sizes(self, groups: "_Groups") -> Tensor:
        """How many samples of each prompt a value chooses among [prompts]."""
        samples = (groups.index >= 0).sum(1)
        return ((samples + 1) // 2).clamp(2, self.config.k_train).minimum(samples)


@dataclass(frozen=True)
class _Groups:
    """Ragged samples of prompts, one row each: features [rows, specs, d] or [rows, d], rewards [rows], and whose they
    are: `index` [prompts, samples] holds row numbers, -1 where a prompt has no further sample."""

    features: Tensor
    rewards: Tensor
    index: Tensor  # on the CPU, as the generator that shuffles it

    @classmethod
    def of(cls, features: Any, rewards: Any, mask: Any, specs: Sequence[FeatureSpec] | None) -> "_Groups":
        ragged = isinstance(features, (list, tuple))
        if ragged and mask is not None:
            raise UserError("mask: lists with one array per prompt are ragged already")
        flat, flat_rewards, valid = _ragged(features, rewards) if ragged else _padded(features, rewards, mask)
        if flat.dim() == 2:
            flat = flat[:, None]
        if flat.dim() != 3:
            raise UserError("features: must be [prompts, samples, d] or [prompts, samples, specs, d]")
        if flat.shape[1] != (len(specs) if specs else 1):
            raise UserError(f"specs: must name the {flat.shape[1]} candidate features, got {len(specs or ())}")
        if not flat_rewards.isfinite().all():
            raise UserError("rewards: must be finite; mask the samples that have none")
        if not all(flat[:, i].isfinite().all() for i in range(flat.shape[1])):
            raise UserError("features: must be finite")
        return cls(flat, flat_rewards.to(flat.device), _numbered(valid))

    def part(self, prompts: Tensor, candidate: int) -> "_Groups":
        """These prompts only, with one candidate's features [rows, d], widened once: every epoch reads them all."""
        index = self.index[prompts]
        valid = index >= 0
        rows = index[valid].to(self.features.device)
        return _Groups(self.features[:, candidate][rows].float(), self.rewards[rows], _numbered(valid))

    def contrast(self, index: Tensor) -> Tensor:
        """Which rows of `index` hold samples with different rewards."""
        rewards = self.rewards.cpu()[index.clamp(min=0)]
        low = rewards.masked_fill(index < 0, torch.inf).amin(1)
        high = rewards.masked_fill(index < 0, -torch.inf).amax(1)
        return high > low


def _numbered(valid: Tensor) -> Tensor:
    index = torch.full(valid.shape, -1)
    index[valid] = torch.arange(int(valid.sum()))
    return index


def _ragged(features: Sequence[Any], rewards: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Lists with one array per prompt as rows, their rewards, and which of [prompts, samples] they fill."""
    arrays = [_tensor("features", array) for array in features]
    reward_arrays = [_tensor("rewards", array, torch.float32) for array in rewards]
    if [array.shape[:1] for array in arrays] != [array.shape for array in reward_arrays] or not arrays:
        raise UserError("rewards: must have one entry for each sample of each prompt, as the features do")
    if len({array.shape[1:] for array in arrays}) > 1:
        raise UserError("features: must have the same size for every prompt")
    counts = torch.tensor([len(array) for array in arrays])
    return torch.cat(arrays), torch.cat(reward_arrays), torch.arange(int(counts.max())) < counts[:, None]


def _padded(features: Any, rewards: Any, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same for [prompts, samples, ...] with a mask, or without one: then nothing is copied."""
    features, rewards = _tensor("features", features), _tensor("rewards", rewards, torch.float32)
    if rewards.dim() != 2 or rewards.shape != features.shape[:2]:
        raise UserError(f"rewards: must be [prompts, samples] {list(features.shape[:2])}, got {list(rewards.shape)}")
    if mask is None:
        return features.flatten(0, 1), rewards.flatten(), torch.ones(rewards.shape, dtype=torch.bool)
    valid = _tensor("mask", mask, torch.bool).cpu()
    if valid.shape != rewards.shape:
        raise UserError(f"mask: must be [prompts, samples] {list(rewards.shape)}, got {list(valid.shape)}")
    return features[valid.to(features.device)], rewards[valid.to(rewards.device)], valid


def _tensor(name: str, array: Any, dtype: torch.dtype | None = None) -> Tensor:
    try:
        return torch.as_tensor(array, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: not an array of numbers: {error}") from None

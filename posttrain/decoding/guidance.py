"""From value logits to guided logits: the arithmetic of Q#, the same in every engine.

    pi(y | x) ∝ pi_ref(y | x) * exp(log_tilt(y)),      pi_ref = softmax(l / T)

A step has at most `candidates` tokens valued: the most likely ones, until they hold 1 - delta of pi_ref's mass. Log-tilts
are relative to the least return there is (a constant shift is the same law), so those of returns within a range of 1 lie
within [0, 1 / beta]: the tokens that are left out would have at most the relative mass delta * exp(1 / beta) / (1 - delta)
under the full tilt, and about delta where they are as good as the others.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.models.value import ValueModel


@dataclass(frozen=True)
class Guidance:
    """candidates, delta: which tokens are valued, as above; delta 0 values all `candidates`.

    outside: what becomes of the others: `mask`, they are never sampled; `zero_tilt`, they keep their reference weight, as
    if their return were the least there is: guidance never lifts what it has not valued above what it has.
    law: `qsharp`, or `cd`: controlled decoding with the same value model. order: `exact` is softmax(l / T + tilt);
    `released_code` is softmax((l + tilt) / T), kept for comparison.
    lazy: draw from the same law, but value only the candidates that could be drawn (`lazy.py`): of a V-type head in the
    transformers engine, where the law itself need not be known.

    Errors: UserError naming the field that is out of range.
    """

    candidates: int = 20
    delta: float = 1e-3
    outside: Literal["mask", "zero_tilt"] = "mask"
    law: Literal["qsharp", "cd"] = "qsharp"
    order: Literal["exact", "released_code"] = "exact"
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UserError(f"candidates: must be at least 1, got {self.candidates}")
        if not 0 <= self.delta < 1:
            raise UserError(f"delta: must be at least 0 and below 1, got {self.delta}")
        for name, choices in (
            ("outside", ("mask", "zero_tilt")),
            ("law", ("qsharp", "cd")),
            ("order", ("exact", "released_code")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.lazy and self.outside != "mask":
            raise UserError("outside: must be mask where guidance is lazy, which draws among the candidates only")
        if self.lazy and self.order != "exact":
            raise UserError(
                "order: must be exact where guidance is lazy; the released code's tilts need all candidates"
            )

    def settings(self, fingerprint: str, head: str) -> dict[str, Any]:
        """What decides how a value model of this fingerprint guides: for manifests, and to name rows by."""
        known = {"value_model": fingerprint, "head": head, **asdict(self)}
        if not self.lazy:  # named as before there was this choice: tables go on
            del known["lazy"]
        return known


@dataclass(frozen=True)
class Candidates:
    """The most likely tokens of each row, best first: ids, log-probabilities under softmax(scores), and which of them
    count, all [rows, k]; those that count stand first, and there is always one. total: logsumexp of scores, [rows]."""

    ids: Tensor
    logprobs: Tensor
    valid: Tensor
    total: Tensor

    @classmethod
    def of(cls, scores: Tensor, guidance: Guidance) -> "Candidates":
        """scores: float32 [rows, vocab], logits over temperature."""
        top = scores.topk(min(guidance.candidates, scores.shape[-1]), dim=-1)
        best = top.values[:, :1]
        # Relative to the best, and summed in float64: a float32 total of logits near 20 is 1e-6 off, and where the mass stands so
        # near to 1 - delta two engines would have different candidates.
        rest = (scores - best).exp().sum(-1, keepdim=True, dtype=torch.float64).log()
        total = (best.double() + rest).squeeze(-1).to(scores.dtype)
        logprobs = (top.values - best).double() - rest
        mass = logprobs.exp()
        above = mass.cumsum(-1) - mass
        # A mass of 1 by rounding is not all: a tilt can lift what is below the precision of the logits.
        reached = above >= 1 - guidance.delta if guidance.delta else torch.zeros_like(above, dtype=torch.bool)
        valid = ~reached & (top.values > -torch.inf)
        valid[:, 0] = True
        return cls(top.indices, logprobs, valid, total)

    def at_most(self, counts: Tensor) -> "Candidates":
        """Only the first counts[r] >= 1 of row r count. counts: int64 [rows]."""
        rank = torch.arange(self.valid.shape[1], device=self.valid.device)
        return replace(self, valid=self.valid & (rank < counts.unsqueeze(-1)))

    @property
    def contested(self) -> Tensor:
        """Rows [rows] that have more than one candidate; the others are never tilted, and need no values."""
        return self.valid.sum(-1) > 1


def log_tilts(
    value: ValueModel,
    logits: Tensor,
    beta: Tensor,
    valid: Tensor,
    temperature: Tensor | None,
    guidance: Guidance,
) -> Tensor:
    """A step's log-tilts [rows, k], float64, of value logits [rows, k(, atoms)]; beta and temperature [rows, 1], None: 1."""
    # In float64: at a small beta what tells candidates apart is the last digits of tilts near 1 / beta.
    tilt = value.log_tilt(logits.double(), beta.double(), guidance.law)
    if guidance.order == "exact":
        return tilt
    # What the released code adds: tilts before the temperature; of histograms, relative to the worst candidate.
    if value.config.atoms and guidance.law == "qsharp":
        tilt = tilt - tilt.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    return tilt if temperature is None else tilt / temperature


@dataclass(frozen=True)
class Tilted:
    """The guided law where it differs from the reference: log-probabilities of the candidates [rows, k] (-inf where they do
    not count), log Z = log E_pi_ref[exp(tilt)] over what can be sampled [rows, 1], and KL(guided || reference) [rows], in
    float64."""

    logprobs: Tensor
    log_z: Tensor
    kl: Tensor

    @classmethod
    def of(cls, candidates: Candidates, log_tilt: Tensor, outside: Literal["mask", "zero_tilt"]) -> "Tilted":
        """log_tilt: [rows, k], read where candidates.valid. The KL is exact, over the whole vocabulary; the reference is
        never truncated."""
        valid = candidates.valid
        tilt = log_tilt.double().masked_fill(~valid, -torch.inf)
        weights = candidates.logprobs + tilt
        log_z = weights.logsumexp(-1, keepdim=True)
        kl = torch.zeros_like(log_z)
        if outside == "zero_tilt":  # what the candidates leave of pi_ref keeps its weight
            left = torch.log1p(-candidates.logprobs.exp().masked_fill(~valid, 0).sum(-1, keepdim=True).clamp(max=1))
            log_z = torch.logaddexp(log_z, left)
            kl = (left - log_z).exp() * -log_z
        logprobs = weights - log_z
        kl = kl + (logprobs.exp() * (tilt - log_z).masked_fill(~valid, 0)).sum(-1, keepdim=True)
        return cls(logprobs, log_z, kl.squeeze(-1).clamp(min=0))


def guided_scores(
    scores: Tensor, candidates: Candidates, tilted: Tilted, outside: Literal["mask", "zero_tilt"]
) -> Tensor:
    """Guided logits [rows, vocab], over temperature already, of the reference's scores [rows, vocab]."""
    inside = tilted.logprobs.to(scores.dtype)
    if outside == "mask":
        return torch.full_like(scores, -torch.inf).scatter_(1, candidates.ids, inside)
    guided = scores - (candidates.total.unsqueeze(-1) + tilted.log_z).to(scores.dtype)
    kept = torch.where(candidates.valid, inside, guided.gather(1, candidates.ids))
    return guided.scatter_(1, candidates.ids, kept)


def guide(
    scores: Tensor, candidates: Candidates, log_tilt: Tensor, outside: Literal["mask", "zero_tilt"]
) -> tuple[Tensor, Tensor]:
    """From a step's log-tilts [rows, k] to guided logits [rows, vocab] and their KL [rows]: all that an engine needs."""
    tilted = Tilted.of(candidates, log_tilt, outside)
    return guided_scores(scores, candidates, tilted, outside), tilted.kl

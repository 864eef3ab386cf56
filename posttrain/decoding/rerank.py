"""Re-ranking k sampled completions, and what it is worth: reward against k, for any scorer, from one set of samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.models.actor_critic import prefix_values
from posttrain.models.features import hidden_features
from posttrain.models.load import end_ids
from posttrain.models.probe import Probe
from posttrain.models.value import ValueModel
from posttrain.objectives.qprobe import policy_value, select

if TYPE_CHECKING:
    from posttrain.models.load import Policy


class Reranker:
    """A policy and the probe that reads its hidden states. Errors: UserError if the probe is for another policy."""

    def __init__(self, policy: "Policy", probe: Probe) -> None:
        probe.check_policy(policy.fingerprint)
        self.policy = policy
        self.probe = probe
        self.stop_ids = end_ids(policy.model, policy.tokenizer)

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
        """Scores [samples] of one prompt's completions, as token ids (a final stop token is ignored)."""
        assert self.probe.card.feature is not None
        rows = [(prompt_ids, completion) for completion in completions]
        features = hidden_features(self.policy.model, rows, [self.probe.card.feature], stop_ids=self.stop_ids)
        return self.probe(features[:, 0].to(self.probe.mean.device)).cpu()

    def choose(
        self,
        prompt_ids: Sequence[int],
        completions: Sequence[Sequence[int]],
        beta: float,
        generator: torch.Generator | None = None,
    ) -> tuple[int, Tensor]:
        """Which completion to keep (drawn by softmax at `beta`; 0 is the argmax, ties to the first), and all scores."""
        scores = self.score(prompt_ids, completions)
        return int(select(scores[None], beta, generator)), scores


class CriticReranker(Reranker):
    """A policy and DQO's value model: a completion's score is V before its end token, which is what it will be paid there."""

    def __init__(self, policy: "Policy", critic: ValueModel) -> None:
        self.policy = policy
        self.critic = critic
        self.stop_ids = end_ids(policy.model, policy.tokenizer)

    def score(self, prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
        values = prefix_values(self.critic, [(prompt_ids, completion) for completion in completions])
        ended = [bool(completion) and completion[-1] in self.stop_ids for completion in completions]
        return torch.stack([row[-2 if end else -1] for row, end in zip(values, ended, strict=True)])


def chunked_value(
    scores: Tensor,
    rewards: Tensor,
    k: int,
    beta: float,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The paper's estimate of the reward of re-ranking k samples: sum_i rho_i r_i over disjoint chunks of k.

    Each prompt's samples are permuted by `generator` (None: left in order) and cut into floor(n / k) chunks, the
    remainder dropped; mean over chunks, then over prompts. scores, rewards, mask: [prompts, samples]; prompts without
    samples do not count. Errors: UserError for a prompt with fewer than k samples.
    """
    mask = _checked(scores, rewards, k, mask)
    values = []
    for row, reward, valid in zip(scores, rewards, mask, strict=True):
        row, reward = row[valid], reward[valid]
        if not len(row):
            continue
        if generator is not None:
            order = torch.randperm(len(row), generator=generator).to(row.device)
            row, reward = row[order], reward[order]
        whole = len(row) // k * k
        values.append(policy_value(row[:whole].view(-1, k), reward[:whole].view(-1, k), beta))
    return torch.stack(values).mean()


def best_of_k(scores: Tensor, rewards: Tensor, k: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Expected reward of the best-scored of k samples: the mean of `best_of_each`."""
    return best_of_each(scores, rewards, k, mask).mean()


def best_of_each(scores: Tensor, rewards: Tensor, k: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Expected reward of the best-scored of k samples, exact over all C(n, k) subsets of a prompt's n, [prompts that have samples].

    The best of k has score s with probability [C(#{<= s}, k) - C(#{< s}, k)] / C(n, k), shared by all of score s.
    With scores = rewards this is the oracle (pass@k for 0/1 rewards); with equal scores, or k = 1, the mean reward.
    scores, rewards, mask: [prompts, samples]; k: one number, or one per prompt [prompts].
    Errors: UserError for a prompt with fewer than k samples.
    """
    mask = _checked(scores, rewards, k, mask)
    counted = mask.any(-1)
    ks = torch.as_tensor(k, device=scores.device).expand(len(scores))[counted, None]
    scores, rewards, mask = scores[counted], rewards[counted], mask[counted]
    scores = scores.double().masked_fill(~mask, -torch.inf)
    masked = (~mask).sum(-1, keepdim=True)
    ranked = scores.sort(-1).values
    below = (torch.searchsorted(ranked, scores) - masked).clamp(min=0)
    upto = torch.searchsorted(ranked, scores, right=True) - masked
    n = mask.sum(-1, keepdim=True).double()  # or the divisions below were float32
    within, under = torch.ones_like(scores), torch.ones_like(scores)  # C(upto, k) / C(n, k), C(below, k) / C(n, k)
    for i in range(int(ks.max())):
        within *= torch.where(i < ks, (upto - i).clamp(min=0) / (n - i), 1)
        under *= torch.where(i < ks, (below - i).clamp(min=0) / (n - i), 1)
    weights = (within - under) / (upto - below)
    return (weights * rewards).masked_fill(~mask, 0).sum(-1)


def _checked(scores: Tensor, rewards: Tensor, k: int | Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    samples = mask.sum(-1)
    if not samples.any():
        raise UserError("scores: no prompt has a sample")
    wanted = torch.as_tensor(k, device=scores.device).expand(len(scores))
    if (wanted < 1).any():
        raise UserError(f"k: must be at least 1, got {int(wanted.min())}")
    short = (samples > 0) & (samples < wanted)
    if short.any():
        raise UserError(f"k: {int(wanted[short][0])} is more than the {int(samples[short][0])} samples of a prompt")
    if scores[mask].isnan().any() or rewards[mask].isnan().any():
        raise UserError("scores: neither scores nor rewards may be NaN; mask the samples that have none")
    return mask

"""Rolling in: where a later round of Q# leaves the guided policy and follows pi_ref (algorithm 1 of arXiv 2502.20548).

A whole completion of the guided policy is cut at a uniformly random token; what stands up to that token, itself included, is
the prefix, pi_ref completes it, and the outcome labels the tokens from the cut on. As in the released code: the token at the
cut is the guided policy's own. (The paper's algorithm draws it from pi_ref; both give unbiased labels.)
"""

import hashlib
from dataclasses import dataclass, replace

from posttrain.errors import UserError
from posttrain.rollouts.engine import Completion, FinishReason
from posttrain.rollouts.table import RolloutTable


@dataclass(frozen=True)
class Prefix:
    """Tokens that were rolled in, with their log-probabilities under the law that drew them.

    cut: index of the first labelled token; finish_reason: None where the completion goes on.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    cut: int = 0
    finish_reason: FinishReason | None = None

    def before(self, rest: Completion | None) -> Completion:
        """The whole completion; without a rest the prefix is all of it."""
        if rest is None:
            assert self.finish_reason is not None
            return Completion(-1, self.ids, self.logprobs, self.finish_reason)
        known = self.logprobs + rest.logprobs if rest.logprobs else ()
        return replace(rest, ids=self.ids + rest.ids, logprobs=known)


NO_PREFIX = Prefix()


def cut_completions(table: RolloutTable, seed: int) -> dict[tuple[str, int], Prefix]:
    """A prefix of every completion of a table, by prompt id and sample; a cut is a function of seed, prompt and sample.

    Errors: UserError naming `table` for one without log-probabilities.
    """
    prefixes = {}
    for row in table.rows():
        if row["logprobs"] is None:
            raise UserError(f"table: {table.folder} has no log-probabilities; collect it anew, without lazy guidance")
        ids, logprobs = tuple(row["completion_ids"]), tuple(row["logprobs"])
        cut = cut_index(seed, row["prompt_id"], row["sample"], len(ids))
        last = cut + 1 == len(ids)
        prefixes[row["prompt_id"], row["sample"]] = Prefix(
            ids[: cut + 1], logprobs[: cut + 1], cut, row["finish_reason"] if last else None
        )
    return prefixes


def cut_index(seed: int, prompt_id: str, sample: int, length: int) -> int:
    """floor(u * length) for a uniform u that is a hash."""
    digest = hashlib.sha256(f"cut\0{seed}\0{sample}\0{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * length >> 64

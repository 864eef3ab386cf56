"""A value model beside a running batch: what it has read of every request, in a key-value cache of its own.

A V-type value model values candidates beside each other, each seeing its row's prefix and itself; the keys and values of the
one that is sampled are kept, so a sampled token is never fed again. Tokens that were not valued when they were sampled wait,
and are read beside the next candidates that are valued of their row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from posttrain.decoding.guidance import Candidates
from posttrain.models.cache import SlotCache, Tree, read_length, tree_attention
from posttrain.rollouts.engine import Candidate, Request

if TYPE_CHECKING:
    from posttrain.decoding.guide import ValueGuide

MOST_WAITING = 16  # tokens of a row that may wait to be read: attention is padded to the longest queue


@dataclass
class Row:
    """A guided request: `length` tokens stand in the cache, `waiting` ones were sampled (or end the prompt) and do not.

    tilt: the log-tilt of its last token that was valued, where the session keeps it.
    """

    request: Request
    beta: float
    length: int
    waiting: list[int] = field(default_factory=list)
    tilt: float = math.inf

    @classmethod
    def of(cls, request: Request) -> "Row":
        *read, last = request.prompt_ids
        assert request.beta is not None
        return cls(request, request.beta, len(read), [last])

    @property
    def end(self) -> int:
        """The position of the token that is sampled next."""
        return self.length + len(self.waiting)


class Guided(NamedTuple):
    """What a step samples from: scores [rows, columns]; which tokens the columns are, [rows, columns] (None: the whole
    vocabulary); the KL to the reference [rows], exactly 0 without guidance, NaN where it is not known; and logsumexp of the
    reference's scores [rows].
    """

    scores: Tensor
    ids: Tensor | None
    kl: Tensor
    total: Tensor


@dataclass(frozen=True)
class Seen:
    """What a step's forwards left in the cache: the waiting tokens of rows `read` (bool), and of the candidates ids [rows, k]
    those that were `valued` (bool [rows, k]), None: none."""

    ids: Tensor
    read: Sequence[bool]
    valued: Tensor | None


class Session:
    """rows[r] lives in slot r, beside the engine's own; None is a request without guidance."""

    def __init__(self, guide: "ValueGuide", slots: int, context: int) -> None:
        self.guide = guide
        self.value = guide.value
        self.cache = SlotCache(slots, context + guide.guidance.candidates)
        self.rows: list[Row | None] = []
        self._seen: Seen | None = None  # by the last step

    def add(self, requests: Sequence[Request], padded: Tensor, copies: Tensor | None) -> None:
        """Requests take the next slots. padded: int64 [distinct prompts, width], right-padded, without their last tokens;
        copies: which of them each request has, None: one each."""
        first = len(self.rows)
        self.rows += [None if request.beta is None else Row.of(request) for request in requests]
        if self.guide.reads_policy or padded.shape[1] == 0 or not any(self.rows[first:]):
            return
        self.cache.fill(first, padded.shape[1], copies)
        positions = torch.arange(padded.shape[1], device=padded.device).unsqueeze(0)
        self.value.backbone(
            input_ids=padded, position_ids=positions, attention_mask=None, past_key_values=self.cache, use_cache=True
        )

    def guide_step(self, scores: Tensor, temperature: Tensor | None, states: Tensor | None) -> Guided:
        """The law to sample from; rows without guidance stay as they are.

        scores: float32 [rows, vocab], over temperature [rows, 1] (None: 1); states [rows, d]: the policy's, where read.
        """
        raise NotImplementedError

    def explain(self, slots: Sequence[int]) -> list[tuple[Candidate, ...]]:
        """The last step's candidates of guided rows, which are still where they were; not of a lazy session."""
        raise NotImplementedError

    def advance(self, tokens: Tensor, sampled: Sequence[int]) -> None:
        """After a step: tokens int64 [rows], and the same as a list."""
        seen = self._seen
        assert seen is not None
        chosen = [-1] * len(sampled)
        if seen.valued is not None:
            hits = (seen.ids == tokens.unsqueeze(-1)) & seen.valued
            chosen = torch.where(hits.any(-1), hits.byte().argmax(-1), -1).tolist()
        moved: list[tuple[int, int, int]] = []
        for slot, (row, token, number) in enumerate(zip(self.rows, sampled, chosen, strict=True)):
            if row is None or self.guide.reads_policy:
                continue
            if seen.read[slot]:
                row.length, row.waiting = row.end, []
            if number < 0:
                row.waiting.append(token)
                continue
            if number > 0:
                moved.append((slot, row.length + number, row.length))
            row.length += 1
        if moved:
            self.cache.keep(*torch.tensor(moved, device=tokens.device).unbind(1))

    def move(self, sources: Sequence[int], targets: Sequence[int], left: int) -> None:
        """Slots `sources` become slots `targets`; then only the first `left` are in use."""
        length = max((row.length for row in (self.rows[slot] for slot in sources) if row), default=0)
        if length and not self.guide.reads_policy:
            self.cache.move(sources, targets, length)
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[left:]

    def _candidates(self, scores: Tensor) -> Candidates:
        """As many of each row as its request asks for; of rows without guidance one, which is never contested."""
        most = self.guide.guidance.candidates
        counts = [1 if row is None else row.request.candidates or most for row in self.rows]
        candidates = Candidates.of(scores, self.guide.guidance)
        return candidates if min(counts) >= most else candidates.at_most(torch.tensor(counts, device=scores.device))

    def _to_read(self, asked: Sequence[bool]) -> list[bool]:
        """The rows whose waiting tokens are read: those of which a value is asked, and those with the longest queues."""
        return [
            row is not None and (is_asked or len(row.waiting) >= MOST_WAITING)
            for row, is_asked in zip(self.rows, asked, strict=True)
        ]

    def _value(self, ids: Tensor, asked: Tensor, read: Sequence[bool]) -> Tensor:
        """V-type: value logits [asked(, atoms)] of the candidates ids [rows, k] where `asked`, and the waiting tokens of rows
        `read` are read."""
        rows, places, tokens = self._waiting(read, ids.device)
        slots, order = asked.nonzero().unbind(1)
        ends = torch.tensor([row.end if row else 0 for row in self.rows], device=ids.device)
        before = torch.tensor(
            [len(row.waiting) if row and reads else 0 for row, reads in zip(self.rows, read, strict=True)],
            device=ids.device,
        )
        end, rank = ends[slots], (asked.cumsum(1) - 1)[slots, order]
        hidden = self._read(
            torch.cat((tokens, ids[slots, order])),
            torch.cat((rows, slots)),
            torch.cat((places, end + order)),
            torch.cat((places, end)),
            torch.cat((places, end - 1)),
            torch.cat((places - (ends - before)[rows], before[slots] + rank)),
        )
        return self.value.after(hidden[len(tokens) :])

    def _waiting(self, read: Sequence[bool], device: torch.device) -> tuple[Tensor, ...]:
        """The waiting tokens of rows `read`: slots, places and tokens, int64 [tokens] each."""
        chains = [
            (slot, place, token)
            for slot, (row, reads) in enumerate(zip(self.rows, read, strict=True))
            if row is not None and reads
            for place, token in enumerate(row.waiting, row.length)
        ]
        return torch.tensor(chains, dtype=torch.long, device=device).view(-1, 3).unbind(1)

    def _read(
        self, tokens: Tensor, rows: Tensor, places: Tensor, positions: Tensor, ends: Tensor, index: Tensor
    ) -> Tensor:
        """States [tokens, d] of one flat forward; every argument int64 [tokens], as in `SlotCache` and `DecodeMasks.tree`."""
        assert self.guide.masks is not None
        longest, tree = read_length(int(places.max()) + 1), Tree.of(rows, index)
        self.cache.tree(tree, places, longest)
        with tree_attention(self.value.backbone):
            return self.value.backbone(
                input_ids=tokens.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                attention_mask=self.guide.masks.tree(tree, positions, ends, places, longest),
                past_key_values=self.cache,
                use_cache=True,
                tree=tree,
            ).last_hidden_state[0]

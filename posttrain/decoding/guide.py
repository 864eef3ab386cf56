"""The guide of the transformers engine: a value model with its own key-value cache by request slot.

A step costs one forward of the value model. With a V-type head the k candidates of every row are scored in it, each seeing
the row's prefix and itself; the keys and values of the one that is sampled are kept, so a sampled token is never fed again.
With a candidate head the forward feeds the last token only, and a shared head needs none.

Tokens that were not scored when they were sampled (the row's top token held nearly all the mass, or a token outside the
candidates was drawn) wait, and are read beside the candidates of the row's next scored step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.decoding.guidance import Candidates, Guidance, Tilted, guided_scores, log_tilts
from posttrain.errors import UserError
from posttrain.models.cache import DecodeMasks, SlotCache, Tree, read_length, tree_attention
from posttrain.models.load import Policy
from posttrain.models.value import ValueModel, load_value_model, value_fingerprint
from posttrain.objectives.qsharp import expected_return
from posttrain.provenance import hash_json
from posttrain.rollouts.engine import Candidate, Request

MOST_WAITING = 16  # tokens of a row that may wait to be read: attention is padded to the longest queue


class ValueGuide:
    """A value model and how it guides.

    fingerprint: of the value model's folder; `settings` go into the manifest of what is sampled.
    policy: the model that is guided, whose states and embeddings a `shared` head reads.
    Errors: UserError for a policy of another vocabulary or, with a shared head, of another size.
    """

    def __init__(self, value: ValueModel, policy: Any, fingerprint: str, guidance: Guidance | None = None) -> None:
        self.value = value
        self.guidance = guidance or Guidance()
        self.fingerprint = fingerprint
        self.settings = self.guidance.settings(fingerprint, value.config.head)
        self.reads_policy = value.config.head == "shared"
        text = policy.config.get_text_config()
        if value.config.vocab_size != text.vocab_size:
            raise UserError(
                f"guide: it knows {value.config.vocab_size} tokens, the policy {text.vocab_size}; they must be the same"
            )
        if self.reads_policy and value.config.hidden_size != text.hidden_size:
            raise UserError(
                f"guide: its shared head reads states of size {value.config.hidden_size}, the policy's have {text.hidden_size}"
            )
        # None: no shorter than the policy's own.
        self.context: int | None = None if self.reads_policy else value.config.backbone.max_position_embeddings
        decoder = policy.get_decoder() if self.reads_policy else value.backbone
        self.masks = None if self.reads_policy else DecodeMasks(decoder)
        if self.masks and decoder.config._attn_implementation == "eager":
            raise UserError(
                "guide: its value model needs eager attention (soft caps or sinks), which a tree of candidates has not"
            )
        self.projected: Tensor | None = None  # of every token, [vocab, width]: a candidate costs one row
        if value.config.head != "v":
            with torch.inference_mode():
                self.projected = value.head.project(decoder.get_input_embeddings().weight)

    @property
    def name(self) -> str:
        """What rows are labelled with: this value model, guiding in this way."""
        return hash_json(self.settings)

    def session(self, slots: int, context: int) -> "GuideSession":
        """The guide's state for one running batch."""
        return GuideSession(self, slots, context)


def load_guide(
    folder: str | Path, policy: Policy, guidance: Guidance | None = None, any_reference: bool = False
) -> ValueGuide:
    """A saved value model as a policy's guide. Errors: as `load_value_model`."""
    value = load_value_model(folder, policy, any_reference)
    return ValueGuide(value, policy.model, value_fingerprint(folder), guidance)


@dataclass
class _Row:
    """A guided request: `length` tokens stand in the cache, `waiting` ones were sampled (or end the prompt) and do not."""

    beta: float
    length: int
    waiting: list[int] = field(default_factory=list)
    candidates: int | None = None

    @classmethod
    def of(cls, request: Request) -> "_Row":
        *read, last = request.prompt_ids
        assert request.beta is not None
        return cls(request.beta, len(read), [last], request.candidates)

    @property
    def end(self) -> int:
        """The position of the token that is sampled next."""
        return self.length + len(self.waiting)


@dataclass(frozen=True)
class _Scored:
    """A step's candidates, and which rows (bool) had their waiting tokens read, and which their candidates scored."""

    candidates: Candidates
    read: list[bool]
    scored: list[bool]


class _Law(NamedTuple):
    """A step's guided law, and the value logits [scored rows, k(, atoms)] that it came of."""

    tilted: Tilted
    logits: Tensor | None


class Guided(NamedTuple):
    """What a step samples from: scores [rows, columns]; which tokens the columns are, [rows, columns] (None: the whole
    vocabulary); the KL to the reference [rows], exactly 0 without guidance; and logsumexp of the reference's scores [rows].
    """

    scores: Tensor
    ids: Tensor | None
    kl: Tensor
    total: Tensor


class GuideSession:
    """rows[r] lives in slot r, beside the engine's own; None is a request without guidance."""

    def __init__(self, guide: ValueGuide, slots: int, context: int) -> None:
        self.guide = guide
        self.value = guide.value
        self.cache = SlotCache(slots, context + guide.guidance.candidates)
        self.rows: list[_Row | None] = []
        self._step: _Scored | None = None
        self._law: _Law | None = None

    def add(self, requests: Sequence[Request], padded: Tensor, copies: Tensor | None) -> None:
        """Requests take the next slots. padded: int64 [distinct prompts, width], right-padded, without their last tokens;
        copies: which of them each request has, None: one each."""
        first = len(self.rows)
        self.rows += [None if request.beta is None else _Row.of(request) for request in requests]
        if self.guide.reads_policy or padded.shape[1] == 0 or not any(self.rows[first:]):
            return
        self.cache.fill(first, padded.shape[1], copies)
        positions = torch.arange(padded.shape[1], device=padded.device).unsqueeze(0)
        self.value.backbone(
            input_ids=padded, position_ids=positions, attention_mask=None, past_key_values=self.cache, use_cache=True
        )

    def guide_step(self, scores: Tensor, temperature: Tensor | None, states: Tensor | None) -> "Guided":
        """The law to sample from; rows without guidance stay as they are.

        scores: float32 [rows, vocab], over temperature [rows, 1] (None: 1); states [rows, d]: the policy's, where read.
        """
        guidance = self.guide.guidance
        candidates = Candidates.of(scores, guidance)
        fewer = [row.candidates if row and row.candidates else guidance.candidates for row in self.rows]
        if min(fewer) < guidance.candidates:
            candidates = candidates.at_most(torch.tensor(fewer, device=scores.device))
        contested = candidates.contested.tolist()
        scored = [row is not None and several for row, several in zip(self.rows, contested, strict=True)]
        read = [
            row is not None and (is_scored or len(row.waiting) >= MOST_WAITING)
            for row, is_scored in zip(self.rows, scored, strict=True)
        ]
        self._step = _Scored(candidates, read, scored)
        log_tilt, logits = torch.zeros_like(candidates.logprobs), None
        if any(scored) or (any(read) and not self.guide.reads_policy):
            betas = [row.beta if row else torch.inf for row in self.rows]
            which = torch.tensor(scored, device=scores.device).nonzero().squeeze(1)
            beta = torch.tensor(betas, dtype=torch.float64, device=scores.device)[which].unsqueeze(-1)
            logits = self._value_logits(which, states)
            if len(which):
                heat = None if temperature is None else temperature[which]
                log_tilt[which] = log_tilts(self.value, logits, beta, candidates.valid[which], heat, guidance)
        tilted = Tilted.of(candidates, log_tilt, guidance.outside)
        self._law = _Law(tilted, logits)
        if None not in self.rows:
            if guidance.outside == "mask":  # nothing else can be sampled: a draw among k tokens, not among them all
                ids, order = candidates.ids.sort(-1)  # in the vocabulary's order, so that a seed draws the same token
                return Guided(tilted.logprobs.gather(1, order).float(), ids, tilted.kl, candidates.total)
            return Guided(
                guided_scores(scores, candidates, tilted, guidance.outside), None, tilted.kl, candidates.total
            )
        free = torch.tensor([row is None for row in self.rows], device=scores.device)
        guided = guided_scores(scores, candidates, tilted, guidance.outside)
        guided = torch.where(free.unsqueeze(-1), scores, guided)
        return Guided(guided, None, tilted.kl.masked_fill(free, 0), candidates.total)

    def explain(self, slots: Sequence[int]) -> list[tuple[Candidate, ...]]:
        """The last step's candidates of guided rows, which are still where they were."""
        assert self._step is not None and self._law is not None
        candidates, scored = self._step.candidates, self._step.scored
        values: dict[int, list[float]] = {}
        if self._law.logits is not None:
            returns = expected_return(self._law.logits.float(), self.value.atoms).tolist()
            values = dict(zip((slot for slot, asked in enumerate(scored) if asked), returns, strict=True))
        explained = []
        for slot in slots:
            count = int(candidates.valid[slot].sum())
            columns = (candidates.ids, candidates.logprobs, self._law.tilted.logprobs)
            told = [column[slot, :count].tolist() for column in columns]
            told.append(values[slot][:count] if slot in values else [None])
            explained.append(tuple(map(Candidate, *told)))
        return explained

    def advance(self, tokens: Tensor, sampled: Sequence[int]) -> None:
        """After a step: tokens int64 [rows], and the same as a list."""
        assert self._step is not None
        keeps = self.value.config.head == "v"
        chosen = None
        if keeps and any(self._step.scored):
            hits = (self._step.candidates.ids == tokens.unsqueeze(-1)) & self._step.candidates.valid
            chosen = torch.where(hits.any(-1), hits.byte().argmax(-1), -1).tolist()
        moved: list[tuple[int, int, int]] = []
        for slot, (row, token) in enumerate(zip(self.rows, sampled, strict=True)):
            if row is None or self.guide.reads_policy:
                continue
            if self._step.read[slot]:
                row.length, row.waiting = row.end, []
            number = chosen[slot] if chosen is not None and self._step.scored[slot] else -1
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

    def _value_logits(self, which: Tensor, states: Tensor | None) -> Tensor:
        """Value logits [len(which), k(, atoms)] of the candidates of rows `which`; reads the waiting tokens as well."""
        assert self._step is not None
        candidates = self._step.candidates
        if self.guide.reads_policy:
            assert states is not None
            return self.value.of_candidates(states[which], self._projected(candidates.ids[which]))
        device = candidates.ids.device
        chains = [
            (slot, place, token)
            for slot, (row, read) in enumerate(zip(self.rows, self._step.read, strict=True))
            if row is not None and read
            for place, token in enumerate(row.waiting, row.length)
        ]
        rows, places, tokens = torch.tensor(chains, dtype=torch.long, device=device).view(-1, 3).unbind(1)
        ends = torch.tensor([row.end if row else 0 for row in self.rows], device=device)
        starts = torch.tensor([row.length if row else 0 for row in self.rows], device=device)
        if self.value.config.head == "q":
            hidden = self._read(tokens, rows, places, places, places, places - starts[rows])
            last = torch.zeros(len(self.rows), hidden.shape[-1], dtype=hidden.dtype, device=device)
            final = places == ends[rows] - 1
            last[rows[final]] = hidden[final]
            return self.value.of_candidates(last[which], self._projected(candidates.ids[which]))
        valid = candidates.valid[which]
        number, order = valid.nonzero().unbind(1)
        slots = which[number]
        end = ends[slots]
        hidden = self._read(
            torch.cat((tokens, candidates.ids[slots, order])),
            torch.cat((rows, slots)),
            torch.cat((places, end + order)),
            torch.cat((places, end)),
            torch.cat((places, end - 1)),
            torch.cat((places, end + order)) - starts[torch.cat((rows, slots))],
        )
        found = self.value.after(hidden[len(tokens) :])
        logits = found.new_zeros(*valid.shape, *found.shape[1:])
        logits[number, order] = found
        return logits

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

    def _projected(self, ids: Tensor) -> Tensor:
        assert self.guide.projected is not None
        return self.guide.projected[ids]

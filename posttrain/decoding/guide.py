"""The guide of the transformers engine: a value model that tilts the law of every token, and values every candidate for it.

A step costs one forward of the value model. With a V-type head the k candidates of every row are valued in it (`session.py`);
with a candidate head it feeds the last token only, and a shared head needs none. A row whose top token holds nearly all the
mass needs no values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.decoding.guidance import Candidates, Guidance, Tilted, guided_scores, log_tilts
from posttrain.decoding.lazy import LazySession
from posttrain.decoding.session import Guided, Seen, Session
from posttrain.errors import UserError
from posttrain.models.cache import DecodeMasks
from posttrain.models.load import Policy
from posttrain.models.value import ValueModel, load_value_model, value_fingerprint
from posttrain.provenance import hash_json
from posttrain.rollouts.engine import Candidate, Request


class ValueGuide:
    """A value model and how it guides.

    fingerprint: of the value model's folder; `settings` go into the manifest of what is sampled.
    policy: the model that is guided, whose states and embeddings a `shared` head reads.
    Errors: UserError for a policy of another vocabulary or, with a shared head, of another size, for lazy guidance by
    another head than V-type, and where values of preferences leave tokens outside untilted.
    """

    def __init__(self, value: ValueModel, policy: Any, fingerprint: str, guidance: Guidance | None = None) -> None:
        self.value = value
        self.guidance = guidance or Guidance()
        self.fingerprint = fingerprint
        self.settings = self.guidance.settings(fingerprint, value.config.head)
        if value.config.preferences:
            self.settings["law"] = "ipl"  # whatever was asked: Q / beta in both
        self.reads_policy = value.config.head == "shared"
        if self.guidance.lazy and value.config.head != "v":
            raise UserError(
                f"lazy: a {value.config.head} head values all candidates in one query, and has none to save; leave it out"
            )
        if value.config.preferences and self.guidance.outside != "mask":
            raise UserError(
                "outside: must be mask with values of preferences, which have no least one for other tokens to take"
            )
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

    def is_lazy(self, request: Request) -> bool:
        """Whether its tokens are drawn without the law being known."""
        return request.beta is not None and self.guidance.lazy

    def session(self, slots: int, context: int) -> Session:
        """The guide's state for one running batch."""
        return (LazySession if self.guidance.lazy else GuideSession)(self, slots, context)


def load_guide(
    folder: str | Path, policy: Policy, guidance: Guidance | None = None, any_reference: bool = False
) -> ValueGuide:
    """A saved value model as a policy's guide. Errors: as `load_value_model`."""
    value = load_value_model(folder, policy, any_reference)
    return ValueGuide(value, policy.model, value_fingerprint(folder), guidance)


class _Law(NamedTuple):
    """A step's candidates and guided law, which rows (bool) had theirs valued, and the value logits [valued rows, k(, atoms)]."""

    candidates: Candidates
    tilted: Tilted
    scored: list[bool]
    logits: Tensor | None


class GuideSession(Session):
    """Values every candidate of every step."""

    _law: _Law | None = None

    def guide_step(self, scores: Tensor, temperature: Tensor | None, states: Tensor | None) -> Guided:
        guidance = self.guide.guidance
        candidates = self._candidates(scores)
        scored = candidates.contested.tolist()
        read = self._to_read(scored)
        log_tilt, logits = torch.zeros_like(candidates.logprobs), None
        if any(scored) or (any(read) and not self.guide.reads_policy):
            betas = [row.beta if row else torch.inf for row in self.rows]
            which = torch.tensor(scored, device=scores.device).nonzero().squeeze(1)
            beta = torch.tensor(betas, dtype=torch.float64, device=scores.device)[which].unsqueeze(-1)
            logits = self._value_logits(candidates, which, read, states)
            if len(which):
                heat = None if temperature is None else temperature[which]
                log_tilt[which] = log_tilts(self.value, logits, beta, candidates.valid[which], heat, guidance)
        keeps = self.value.config.head == "v" and any(scored)
        self._seen = Seen(
            candidates.ids, read, candidates.valid & candidates.contested.unsqueeze(-1) if keeps else None
        )
        tilted = Tilted.of(candidates, log_tilt, guidance.outside)
        self._law = _Law(candidates, tilted, scored, logits)
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
        assert self._law is not None
        candidates, tilted, scored, logits = self._law
        values: dict[int, list[float]] = {}
        if logits is not None:
            returns = self.value.expected(logits.float()).tolist()
            values = dict(zip((slot for slot, asked in enumerate(scored) if asked), returns, strict=True))
        explained = []
        for slot in slots:
            count = int(candidates.valid[slot].sum())
            columns = (candidates.ids, candidates.logprobs, tilted.logprobs)
            told = [column[slot, :count].tolist() for column in columns]
            told.append(values[slot][:count] if slot in values else [None])
            explained.append(tuple(map(Candidate, *told)))
        return explained

    def _value_logits(
        self, candidates: Candidates, which: Tensor, read: Sequence[bool], states: Tensor | None
    ) -> Tensor:
        """Value logits [len(which), k(, atoms)] of the candidates of rows `which`; reads the waiting tokens of rows `read`."""
        ids = candidates.ids
        if self.guide.reads_policy:
            assert states is not None
            return self.value.of_candidates(states[which], self._projected(ids[which]))
        if self.value.config.head == "q":
            return self.value.of_candidates(self._last_states(read, ids.device)[which], self._projected(ids[which]))
        asked = candidates.valid & candidates.contested.unsqueeze(-1)
        found = self._value(ids, asked, read)
        logits = found.new_zeros(*asked.shape, *found.shape[1:])
        logits[asked] = found
        return logits[which]

    def _last_states(self, read: Sequence[bool], device: torch.device) -> Tensor:
        """States [rows, d] at the last tokens of rows `read`."""
        rows, places, tokens = self._waiting(read, device)
        starts, ends = torch.tensor([(row.length, row.end) if row else (0, 0) for row in self.rows], device=device).T
        hidden = self._read(tokens, rows, places, places, places, places - starts[rows])
        last = torch.zeros(len(self.rows), hidden.shape[-1], dtype=hidden.dtype, device=device)
        final = places == ends[rows] - 1
        last[rows[final]] = hidden[final]
        return last

    def _projected(self, ids: Tensor) -> Tensor:
        assert self.guide.projected is not None
        return self.guide.projected[ids]

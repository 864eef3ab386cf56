"""Several guides in one running batch, by name: every request says which one tilts its tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.decoding.guide import ValueGuide
from posttrain.decoding.session import Guided, Session
from posttrain.rollouts.engine import Candidate, Request


class Guides:
    """A guide for the engine made of several; a guided request's `guide` is one of the names."""

    def __init__(self, named: Mapping[str, ValueGuide]) -> None:
        self.named = dict(named)
        self.reads_policy = any(guide.reads_policy for guide in self.named.values())
        contexts = [guide.context for guide in self.named.values() if guide.context is not None]
        self.context = min(contexts, default=None)
        self.settings = {name: guide.settings for name, guide in self.named.items()}

    def is_lazy(self, request: Request) -> bool:
        return request.guide in self.named and self.named[request.guide].is_lazy(request)

    def session(self, slots: int, context: int) -> "GuidesSession":
        return GuidesSession({name: guide.session(slots, context) for name, guide in self.named.items()})


class GuidesSession:
    """Each guide's own session, to which the requests of all others stand as if unguided."""

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        self.sessions = sessions
        self._active: list[Session] = []

    def add(self, requests: Sequence[Request], padded: Tensor, copies: Tensor | None) -> None:
        assert all(request.beta is None or request.guide in self.sessions for request in requests)
        for name, session in self.sessions.items():
            own = [request if request.guide == name else replace(request, beta=None) for request in requests]
            session.add(own, padded, copies)

    def guide_step(self, scores: Tensor, temperature: Tensor | None, states: Tensor | None) -> Guided:
        """One guide after the other, each leaving the rows of the others as they are; guides without rows cost nothing."""
        self._active = [session for session in self.sessions.values() if any(session.rows)]
        if len(self._active) == 1:
            return self._active[0].guide_step(scores, temperature, states)
        total = scores.logsumexp(-1)
        kl = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
        for session in self._active:  # none of them has all rows, so all return scores of the whole vocabulary
            guided = session.guide_step(scores, temperature, states)
            scores, kl = guided.scores, kl + guided.kl
        return Guided(scores, None, kl, total)

    def explain(self, slots: Sequence[int]) -> list[tuple[Candidate, ...]]:
        owners = [next(session for session in self._active if session.rows[slot]) for slot in slots]
        return [candidates for owner, slot in zip(owners, slots, strict=True) for candidates in owner.explain([slot])]

    def advance(self, tokens: Tensor, sampled: Sequence[int]) -> None:
        for session in self._active:
            session.advance(tokens, sampled)

    def move(self, sources: Sequence[int], targets: Sequence[int], left: int) -> None:
        for session in self.sessions.values():
            session.move(sources, targets, left)

"""V-type guidance that values only the candidates that could be drawn: the same law for a fraction of the queries.

The guided law is softmax(l + tilt) over a row's candidates, so argmax(l + tilt + g) with independent standard Gumbel noise g
is a draw from it (Gumbel-max). Log-tilts of returns within a known range lie within [0, range / beta]: once somebody's sum is
above another's l + g + range / beta, the other need not be valued. No candidate that could win is left unvalued, and the noise
is a function of the request's seed, the token's index and the candidate alone: what is drawn is what valuing all of them
with the same noise draws.

A step takes two forwards of the value model at most: the first values those that could win if the best one's tilt were that
of the row's last token (a value is nearly a martingale along a completion), the second what still could, mostly nothing.

The law itself is not known: neither its normaliser nor, with that, KL, log-ratios and log-probabilities.
"""

import torch
from torch import Tensor

from posttrain.decoding.guidance import Candidates
from posttrain.decoding.session import Guided, Seen, Session
from posttrain.rollouts.sampling import gumbel


def undecided(low: Tensor, high: Tensor) -> Tensor:
    """Which of the scores [rows, k] that lie within [low, high] could be their row's largest, bool [rows, k]; of a row where
    only one could, none."""
    could = high >= low.amax(-1, keepdim=True)
    return could & (could.sum(-1, keepdim=True) > 1)


class LazySession(Session):
    """Draws each guided row's token itself: what a step samples from is then a point mass."""

    def guide_step(self, scores: Tensor, temperature: Tensor | None, states: Tensor | None) -> Guided:
        candidates = self._candidates(scores)
        untilted = candidates.logprobs.masked_fill(~candidates.valid, -torch.inf) + self._noise(candidates.ids)
        known = [(row.beta, row.tilt) if row else (torch.inf, 0.0) for row in self.rows]
        beta, last = torch.tensor(known, dtype=torch.float64, device=scores.device).T.unsqueeze(-1)
        most = self.value.span / beta  # of a tilt; the least is 0
        tilt, valued = torch.zeros_like(untilted), torch.zeros_like(candidates.valid)

        def value(asked: Tensor, read: list[bool]) -> None:
            found = self._value(candidates.ids, asked, read).double()
            tilt[asked] = self.value.log_tilt(found, beta.expand_as(asked)[asked], self.guide.guidance.law)
            valued.logical_or_(asked)

        expected = untilted.amax(-1, keepdim=True) + torch.minimum(last, most)
        asked = undecided(untilted, untilted + most) & (untilted + most >= expected)
        read = self._to_read(asked.any(-1).tolist())
        if any(read):
            value(asked, read)
            asked = undecided(untilted + tilt, untilted + torch.where(valued, tilt, most)) & ~valued
            if asked.any():
                value(asked, [False] * len(read))
        self._seen = Seen(candidates.ids, read, valued)
        return self._drawn(scores, candidates, untilted + tilt, tilt, valued)

    def _drawn(self, scores: Tensor, candidates: Candidates, tilted: Tensor, tilt: Tensor, valued: Tensor) -> Guided:
        winner = tilted.argmax(-1, keepdim=True)
        told = torch.cat((tilt.gather(1, winner), valued.gather(1, winner)), 1).tolist()
        for row, (found, known) in zip(self.rows, told, strict=True):
            if row and known:
                row.tilt = found
        ids, kl = candidates.ids.gather(1, winner), torch.full_like(tilt[:, 0], torch.nan)
        certain = (tilted.gather(1, winner) * 0).to(scores.dtype)  # log 1, and NaN where a value is not a number
        if None not in self.rows:
            return Guided(certain, ids, kl, candidates.total)
        free = torch.tensor([row is None for row in self.rows], device=scores.device)
        point = torch.full_like(scores, -torch.inf).scatter_(1, ids, certain)
        return Guided(torch.where(free.unsqueeze(-1), scores, point), None, kl.masked_fill(free, 0), candidates.total)

    def _noise(self, ids: Tensor) -> Tensor:
        """Of the candidates ids [rows, k]: float64 [rows, k], 0 in greedy rows."""
        rows = [
            (row.request.sampling.seed, row.end - len(row.request.prompt_ids), row.request.sampling.temperature > 0)
            if row
            else (0, 0, False)
            for row in self.rows
        ]
        seeds, index, drawn = torch.tensor(rows, device=ids.device).T.unsqueeze(-1)
        return torch.where(drawn > 0, gumbel(seeds, index, ids), 0.0)

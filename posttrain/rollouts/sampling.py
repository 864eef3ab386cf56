"""From logits to tokens: temperature, top-k, top-p and a draw, each row with its own settings and its own noise.

Three steps, so that a guide can add its log-tilt between the first and the second:

    scores = law.scale(logits)              # softmax(scores) is the law at the row's temperature
    ids, logprobs = law.draw(scores, noise(seeds, index))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.rollouts.engine import Sampling

RESOLUTION = 2**40  # weights of the integer CDF: a probability below 1e-12 is never drawn
FIRST_CANDIDATES = 1024  # a nucleus is looked for among so many top tokens before the whole vocabulary is sorted


def noise(seeds: Tensor, *counters: Tensor) -> Tensor:
    """Uniforms in [0, 1), float64: a pure function of a request's seed and its token's index, the same on every device.
    A second counter, a token's id, gives each token that could stand there its own. int64, of shapes that broadcast.

    SplitMix64 (Steele, Lea and Flood 2014) as a counter-based generator: the stream of a seed starts at the mixed seed, and
    every value of one counter is the seed of a stream over the next.
    """
    bits = seeds
    for counter in counters:
        bits = _mix(_mix(bits) + (counter + 1) * _GOLDEN)
    return (bits >> 11 & (1 << 53) - 1).to(torch.float64) * 2.0**-53


def gumbel(seeds: Tensor, index: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of the tokens `ids`, float64: the argmax of log-probabilities plus it is a draw from them."""
    return -noise(seeds, index, ids).clamp(min=2.0**-54).log().neg().log()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose products wrap; the masks make `>>` a logical shift."""
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * _FIRST
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * _SECOND
    return state ^ (state >> 31 & (1 << 33) - 1)


@dataclass(frozen=True)
class Law:
    """The sampling settings of a batch, on its device: prepared once for as long as the same rows run.

    None stands for "no row needs it", and costs nothing.
    """

    temperature: Tensor | None  # [rows, 1], 1 where greedy
    greedy: Tensor | None  # bool [rows]
    all_greedy: bool
    filtered: Tensor | None  # int64 [filtered rows]: which rows use top-k or top-p
    top_k: Tensor | None  # int64 [filtered rows]
    top_p: Tensor | None  # float64 [filtered rows]

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> "Law":
        temperature = [sampling.temperature or 1.0 for sampling in samplings]
        greedy = [sampling.temperature == 0 for sampling in samplings]
        filtered = [
            row
            for row, sampling in enumerate(samplings)
            if not greedy[row] and (sampling.top_k > 0 or sampling.top_p < 1)
        ]
        return cls(
            temperature=torch.tensor(temperature, device=device).unsqueeze(1) if set(temperature) != {1.0} else None,
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            filtered=torch.tensor(filtered, device=device) if filtered else None,
            top_k=torch.tensor([samplings[row].top_k for row in filtered], device=device) if filtered else None,
            top_p=torch.tensor([samplings[row].top_p for row in filtered], dtype=torch.float64, device=device)
            if filtered
            else None,
        )

    def scale(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocab] of any precision over each row's temperature (greedy rows: 1), in float32."""
        logits = logits.float()
        return logits if self.temperature is None else logits / self.temperature

    def cut(self, scores: Tensor) -> Tensor:
        """Scores [rows, vocab], -inf outside each row's top-k and top-p: softmax of them is the law that is drawn from."""
        if self.filtered is None or self.top_k is None or self.top_p is None:
            return scores
        if len(self.filtered) == len(scores):
            return truncate(scores, self.top_k, self.top_p)
        return scores.index_copy(0, self.filtered, truncate(scores[self.filtered], self.top_k, self.top_p))

    def draw(self, scores: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token ids [rows] and their log-probabilities [rows] (float32) under the law that they were drawn from.

        scores: float32 [rows, vocab], -inf allowed; uniforms: float64 [rows] in [0, 1), None where all rows are greedy.
        A greedy row takes the argmax, and its log-probability is that of softmax(scores) over the whole vocabulary:
        nothing is cut off where nothing is drawn.
        """
        scores = self.cut(scores)
        logprobs = torch.log_softmax(scores, dim=-1)
        if uniforms is None:
            ids = scores.argmax(dim=-1)
        else:
            ids = inverse_cdf(logprobs.exp(), uniforms)
            if self.greedy is not None:
                ids = torch.where(self.greedy, scores.argmax(dim=-1), ids)
        return ids, logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row [rows] at which the CDF of probs [rows, vocab] passes uniforms [rows].

    The CDF is summed in integers: exact in any order, so that no device's parallel sum ever gives weight to a token of
    probability 0, and no rounding lets a uniform near 1 run past the last bucket.
    """
    cdf = (probs * RESOLUTION).to(torch.int64).cumsum(dim=-1)
    total = cdf[:, -1]
    target = torch.minimum((uniforms * total).to(torch.int64), total - 1)
    found = torch.searchsorted(cdf, target.unsqueeze(1), right=True).squeeze(1)
    return found.clamp(max=probs.shape[-1] - 1)  # of NaNs, whose place the caller's check is to tell


def truncate(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside each row's top_k (0: off), then outside the smallest top set of mass top_p (1: off) of what is left.

    Both are thresholds on the score, so that tied tokens stay or go together and no sort order matters; the top token
    always stays. scores: float32 [rows, vocab], top_k: int64 [rows], top_p: float64 [rows].
    """
    vocab = scores.shape[-1]
    threshold, known = _threshold(scores, top_k, top_p, min(FIRST_CANDIDATES, vocab))
    unknown = (~known).nonzero().squeeze(1)
    if len(unknown):
        threshold[unknown], _ = _threshold(scores[unknown], top_k[unknown], top_p[unknown], vocab)
    return scores.masked_fill(scores < threshold, -torch.inf)


def _threshold(scores: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The lowest score that stays [rows, 1], and whether the `width` top tokens were enough to tell [rows]."""
    vocab = scores.shape[-1]
    largest = scores.topk(width).values if width < vocab else scores.sort(descending=True).values
    kth = largest.gather(1, (top_k - 1).clamp(0, width - 1).unsqueeze(1))
    kth = kth.masked_fill(((top_k == 0) | (top_k > vocab)).unsqueeze(1), -torch.inf)
    kept = scores.masked_fill(scores < kth, -torch.inf).logsumexp(dim=-1, keepdim=True)
    mass = (largest.masked_fill(largest < kth, -torch.inf) - kept).exp().cumsum(dim=-1, dtype=torch.float64)
    # A token stays while the mass above it is below top_p.
    last = (mass < top_p.unsqueeze(1)).sum(dim=-1, keepdim=True).clamp(max=width - 1)
    nucleus = largest.gather(1, last).masked_fill((top_p >= 1).unsqueeze(1), -torch.inf)
    known = ((top_p >= 1) | (mass[:, -1] >= top_p)) & ((top_k <= width) | (top_k > vocab)) | (width == vocab)
    return torch.maximum(kth, nucleus), known

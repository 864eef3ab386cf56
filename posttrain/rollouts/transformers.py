"""The engine on plain transformers: continuous batching over a slot cache, on CPU or GPU, in float32 or bfloat16.

Why not transformers' own continuous batching (5.17): it draws with one `torch.multinomial` under one seed per process,
so that a request's tokens depend on its neighbours; temperature, top-k and top-p per request exist only where the
generation config already uses them; its paged cache and its fused forward-and-sample step leave no place for a guide
that keeps a cache of its own.
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.models.cache import DecodeMasks, SlotCache, decode_attention, read_length
from posttrain.models.load import end_ids
from posttrain.rollouts.engine import (
    Completion,
    FinishReason,
    GuidedStep,
    Request,
    TopLogprobs,
    check_lazy,
    check_request,
    first_stop,
)
from posttrain.rollouts.sampling import Law, noise

STOP_SLACK = 8  # tokens before a stop text that are decoded with it: the first of them may be half a character
PREFILL_TOKENS = 8192  # prompt tokens, padding included, in one forward
ADMIT_SHARE = (
    8  # newcomers wait until one slot in so many is free: a forward for several costs little more than for one
)


class TransformersEngine:
    """An `Engine` on a causal language model that stays where it is, as it is.

    A request's noise is a function of its own seed and token index alone, so its tokens depend neither on its
    neighbours nor on `slots`, up to the rounding of batched matrix products. Each call of `generate` has its own cache:
    abandoning the iterator, or an exception in the middle, leaves the engine usable.

    tokenizer: its end-of-text id is a stop id, beside those of the model's generation config; eos_ids: these and no
    others. guide: what requests with a `beta` are guided by; others stand beside them as they are.
    """

    alive = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        fingerprint: str,
        slots: int = 64,
        eos_ids: Collection[int] | None = None,
        guide: "Guide | None" = None,
    ) -> None:
        if slots < 1:
            raise UserError(f"slots: must be at least 1, got {slots}")
        self.masks = DecodeMasks(model)
        config = model.config.get_text_config()
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.slots = slots
        self.guide = guide
        self.context: int = config.max_position_embeddings
        if guide is not None and guide.context is not None:
            self.context = min(self.context, guide.context)
        self.vocab: int = config.vocab_size
        self.eos_ids = end_ids(model, tokenizer) if eos_ids is None else frozenset(eos_ids)
        self._own_ends = eos_ids is not None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its completions, besides the weights and the request."""
        return {
            "engine": "transformers",
            "slots": self.slots,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "threads": torch.get_num_threads(),
            **({"eos_ids": sorted(self.eos_ids)} if self._own_ends else {}),
            **({"guidance": self.guide.settings} if self.guide is not None else {}),
        }

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Errors: UserError for a request that cannot fit, before any generation."""
        waiting = deque(requests)
        for request in waiting:
            self.check(request)
        return self._run(waiting)

    def check(self, request: Request) -> None:
        """Errors: UserError for a request that this engine cannot fulfil."""
        check_request(request, self.context)
        if request.sampling.stop and self.tokenizer is None:
            raise UserError("stop: stop texts need an engine that has a tokenizer")
        if request.beta is not None and self.guide is None:
            raise UserError("beta: this engine has no guide; give it a value model, or leave beta out")
        if self.is_lazy(request):
            check_lazy(request.sampling, request.top_logprobs, request.explain)
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocab:
            raise UserError(
                f"prompt: request {request.id} has token ids outside the model's vocabulary of {self.vocab}"
            )

    def is_lazy(self, request: Request) -> bool:
        """Whether it is guided without its law being known."""
        return self.guide is not None and self.guide.is_lazy(request)

    def batch(self, stream: bool = False) -> "Batch":
        """Its rows grow token by token, whether that is asked or not."""
        return Batch(self)

    def _run(self, waiting: deque[Request]) -> Iterator[Completion]:
        batch = self.batch()
        try:
            while waiting or batch.rows:
                # Only while it is this run's turn: between two completions the caller may train, or go on with another run.
                with evaluating(self.model):
                    finished: list[Completion] = []
                    while not finished:
                        newcomers = [waiting.popleft() for _ in range(min(batch.room, len(waiting)))]
                        if newcomers:
                            batch.add(newcomers)
                        finished = batch.step()
                yield from finished
        finally:
            batch.close()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Guide(Protocol):
    """Turns a step's scores into guided ones (`posttrain.decoding.guide`); its sessions follow the batch, slot by slot.

    settings: what decides how it guides; reads_policy: whether it needs the policy's last hidden states; context: the
    largest number of tokens it can read, None for no limit of its own; is_lazy: whether it draws a request's tokens itself,
    without the law being known.
    """

    reads_policy: bool
    context: int | None
    settings: dict[str, Any]

    def is_lazy(self, request: Request) -> bool: ...

    def session(self, slots: int, context: int) -> Any: ...


class Row:
    """A request in a slot. lazy: nothing is known of its law."""

    __slots__ = ("ids", "kl", "lazy", "limit", "log_ratio", "logprobs", "request", "steps", "stop", "stops", "tops")

    def __init__(self, request: Request, eos_ids: frozenset[int], lazy: bool) -> None:
        self.request = request
        self.lazy = lazy
        self.stops = frozenset(request.sampling.stop_ids) or eos_ids
        self.limit = request.sampling.max_tokens
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[TopLogprobs] = []
        self.steps: list[GuidedStep] = []
        self.kl = self.log_ratio = 0.0
        self.stop: str | None = None

    @property
    def position(self) -> int:
        """Of the next token to be fed: at first the prompt's last one."""
        return len(self.request.prompt_ids) + len(self.ids) - 1

    @property
    def token(self) -> int:
        return self.ids[-1] if self.ids else self.request.prompt_ids[-1]

    def completion(self) -> Completion:
        reason: FinishReason = "stop" if self.ids[-1] in self.stops or self.stop else "length"
        return Completion(
            request_id=self.request.id,
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            finish_reason=reason,
            stop=self.stop,
            kl=None if self.lazy else self.kl,
            log_ratio=None if self.lazy else self.log_ratio,
            top_logprobs=tuple(self.tops),
            steps=tuple(self.steps),
        )

    def meets_stop(self, tokenizer: Any) -> bool:
        """Whether the last token completed a stop text. A token is a byte or more, so only the last few are decoded."""
        window = STOP_SLACK + max(len(text.encode()) for text in self.request.sampling.stop)
        tail = tokenizer.decode(self.ids[-window:], skip_special_tokens=True)
        self.stop = first_stop(tail, self.request.sampling.stop)
        return self.stop is not None


class Batch:
    """The running batch: rows[r] lives in slot r of the cache. `add`, `step` and `drop` may follow each other in any order,
    as long as no more are added than there is `room` for, and no step is asked of an empty batch."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.is_lazy = engine.is_lazy
        self.slots = engine.slots
        self.model = engine.model
        self.tokenizer = engine.tokenizer
        self.device: torch.device = engine.model.device
        self.eos_ids = engine.eos_ids
        self.masks = engine.masks
        self.cache = SlotCache(engine.slots, engine.context)
        self.rows: list[Row] = []
        self._stale = True  # a request entered or left: before the next step, all below is made anew from `rows`
        self.tokens: Tensor  # int64 [rows]: the token that is fed next, at its position
        self.positions: Tensor
        self.starts: Tensor  # int64 [rows]: the position from which a row's first completion token is sampled
        self.seeds: Tensor
        self.law: Law
        self.guide = engine.guide.session(engine.slots, engine.context) if engine.guide else None
        self._states: Tensor | None = (
            None  # [rows, d]: what goes into the language-model head, where the guide reads it
        )
        self._hook = None
        if engine.guide and engine.guide.reads_policy:
            self._hook = self.model.get_output_embeddings().register_forward_pre_hook(self._keep_states)

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    @property
    def room(self) -> int:
        """How many requests it would take now."""
        free = self.slots - len(self.rows)
        return free if not self.rows or free * ADMIT_SHARE >= self.slots else 0

    def _keep_states(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self._states = inputs[0][:, -1]

    @torch.inference_mode()
    def add(self, requests: list[Request]) -> None:
        """Fills the prompts, all but their last token, into the cache; equal prompts are read once.

        A prompt's last token is the first that `step` feeds: the first completion token is sampled where all others
        are, and no forward over prompts computes logits that are thrown away.
        """
        by_prompt: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            by_prompt.setdefault(request.prompt_ids, []).append(request)
        for prompts in _similar(sorted(by_prompt, key=len)):
            first = len(self.rows)
            self.rows += [
                Row(request, self.eos_ids, self.is_lazy(request)) for prompt in prompts for request in by_prompt[prompt]
            ]
            width = len(prompts[-1]) - 1
            indices = [index for index, prompt in enumerate(prompts) for _ in by_prompt[prompt]]
            copies = torch.tensor(indices, device=self.device) if len(indices) > len(prompts) else None
            # Right-padded, under the model's own causal mask: no token sees the padding behind it.
            padded = torch.tensor(
                [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts], device=self.device
            ).long()
            if width:
                self.cache.fill(first, width, copies)
                self._forward(padded, torch.arange(width, device=self.device).unsqueeze(0), None)
            if self.guide:
                requests = [row.request for row in self.rows[first:]]
                self.guide.add(requests, padded, copies)
        self._stale = True

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One token for every row; the completions that it finished."""
        if self._stale:
            self._refresh()
        longest = read_length(1 + max(row.position for row in self.rows))
        self.cache.step(self.positions, longest)
        with decode_attention(self.model):
            logits = self._forward(
                self.tokens.unsqueeze(1), self.positions.unsqueeze(1), self.masks(self.positions, longest)
            )
        scores = self.law.scale(logits[:, -1])
        uniforms = None if self.law.all_greedy else noise(self.seeds, self.positions - self.starts)
        # float64 holds ids and float32 log-probabilities exactly.
        sampled_from, columns = scores, None
        if self.guide is None:
            self.tokens, logprobs = self.law.draw(scores, uniforms)
            outcome = [self.tokens.double(), logprobs.double()]
        else:
            guided = self.guide.guide_step(scores, self.law.temperature, self._states)
            drawn, logprobs = self.law.draw(guided.scores, uniforms)
            self.tokens = drawn if guided.ids is None else guided.ids.gather(1, drawn.unsqueeze(1)).squeeze(1)
            reference = scores.gather(1, self.tokens.unsqueeze(1)).squeeze(1) - guided.total
            outcome = [self.tokens.double(), logprobs.double(), guided.kl, (logprobs - reference).double()]
            sampled_from, columns = guided.scores, guided.ids
            self._note_steps(reference)
        self.positions = self.positions + 1
        sampled, sampled_logprobs, *shifts = torch.stack(outcome).tolist()
        if math.isnan(sum(sampled_logprobs)):
            whose = "model: its" if self.guide is None or scores.isnan().any() else "guide: the value model's"
            raise UserError(f"{whose} logits are not numbers (NaN); the weights are broken, or overflow in this dtype")
        if self.guide:
            self.guide.advance(self.tokens, [int(token) for token in sampled])
            for row, row_kl, log_ratio in zip(self.rows, *shifts, strict=True):
                if row.request.beta is not None and not row.lazy:
                    row.kl += row_kl
                    row.log_ratio += log_ratio
        self._note_tops(sampled_from, columns)
        finished = []
        for slot, (row, token, logprob) in enumerate(zip(self.rows, sampled, sampled_logprobs, strict=True)):
            row.ids.append(int(token))
            if not row.lazy:
                row.logprobs.append(logprob)
            stopped = token in row.stops or (row.request.sampling.stop and row.meets_stop(self.tokenizer))
            if stopped or len(row.ids) == row.limit:
                finished.append(slot)
        completions = [self.rows[slot].completion() for slot in finished]
        self._remove(finished)
        return completions

    def drop(self, ids: Collection[int]) -> None:
        """Takes requests out, unfinished, whose slots are then free; ids that are not here do no harm."""
        self._remove([slot for slot, row in enumerate(self.rows) if row.request.id in ids])

    def _note_tops(self, scores: Tensor, columns: Tensor | None) -> None:
        """What requests want to know beside their own token; scores [rows, columns], which tokens these are, None: all."""
        wanted = [slot for slot, row in enumerate(self.rows) if row.request.top_logprobs]
        if not wanted:
            return
        most = max(self.rows[slot].request.top_logprobs for slot in wanted)
        best = torch.log_softmax(self.law.cut(scores), -1)[wanted].topk(min(most, scores.shape[-1]), -1)
        ids = best.indices if columns is None else columns[wanted].gather(1, best.indices)
        for slot, *top in zip(wanted, ids.tolist(), best.values.tolist(), strict=True):
            row = self.rows[slot]
            pairs = list(zip(*top, strict=True))[: row.request.top_logprobs]
            row.tops.append(tuple((token, logprob) for token, logprob in pairs if logprob > -math.inf))

    def _note_steps(self, references: Tensor) -> None:
        """references [rows]: of the sampled tokens."""
        wanted = [slot for slot, row in enumerate(self.rows) if row.request.explain and row.request.beta is not None]
        if not wanted:
            return
        assert self.guide
        explained = self.guide.explain(wanted)
        for slot, reference, candidates in zip(wanted, references[wanted].tolist(), explained, strict=True):
            self.rows[slot].steps.append(GuidedStep(reference, candidates))

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor] | None) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    @torch.inference_mode()
    def _remove(self, finished: list[int]) -> None:
        """Takes rows out, and moves the last rows into the holes."""
        if not finished:
            return
        left = len(self.rows) - len(finished)
        targets = [slot for slot in finished if slot < left]
        sources = sorted(set(range(left, len(self.rows))).difference(finished))
        length = max((self.rows[slot].position for slot in sources), default=0)
        self.cache.move(sources, targets, length)
        if self.guide:
            self.guide.move(sources, targets, left)
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[left:]
        self._stale = True

    def _refresh(self) -> None:
        samplings = [row.request.sampling for row in self.rows]
        state = [
            [row.token for row in self.rows],
            [row.position for row in self.rows],
            [len(row.request.prompt_ids) - 1 for row in self.rows],
            [sampling.seed for sampling in samplings],
        ]
        self.tokens, self.positions, self.starts, self.seeds = torch.tensor(state, device=self.device)
        self.law = Law.of(samplings, self.device)
        self._stale = False


def _similar(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts, sorted by length, in batches with little padding and a bounded number of tokens."""
    batch: list[tuple[int, ...]] = []
    for prompt in prompts:
        if batch and (len(prompt) > 1.5 * len(batch[0]) + 16 or len(prompt) * (len(batch) + 1) > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch

"""Each guided request's own tilt, between vLLM's logits and its temperature: one arithmetic behind the two interfaces for logits
processors that vLLM has, one for each of its model runners.

Both call before the temperature and after grammars, biases and bans (-inf, of which no tilt makes anything else), so that
what is handed on is T * (l / T + log_tilt): sampled is softmax(l / T + log_tilt), then cut to top-k and top-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from posttrain.decoding.guidance import Candidates, Tilted, guided_scores, log_tilts
from posttrain.decoding.vllm import ABOUT, BETA, CANDIDATES, EXPLAIN, RECORD, SCORED
from posttrain.decoding.vllm_model import LOADED, Step
from posttrain.rollouts.engine import LEAST_BETA


@dataclass(frozen=True)
class Asked:
    """The guidance of one request; temperature 1 where it is greedy: the law whose argmax is taken. explain: keep the values in
    the record; scored: a token whose value is kept there, as the first candidate's. outputs: its tokens so far, a list that
    grows, where the runner has one."""

    beta: float
    candidates: int | None
    temperature: float
    record: str | None
    explain: bool = False
    scored: int | None = None
    outputs: Sequence[int] = ()

    @classmethod
    def of(cls, params: SamplingParams, outputs: Sequence[int] = ()) -> "Asked | None":
        """None: no guidance. Errors: ValueError, which vLLM's server answers with a 400."""
        extra = params.extra_args or {}
        beta, candidates = extra.get(BETA), extra.get(CANDIDATES)
        if beta is None:
            if candidates is not None:
                raise ValueError(f"{CANDIDATES}: it is the guide's; give {BETA} too")
            return None
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not beta >= LEAST_BETA:
            raise ValueError(f"{BETA}: must be a number of at least {LEAST_BETA:g}, got {beta!r}")
        if candidates is not None and (type(candidates) is not int or candidates < 1):
            raise ValueError(f"{CANDIDATES}: must be a whole number of at least 1, got {candidates!r}")
        explain, scored = bool(extra.get(EXPLAIN)), extra.get(SCORED)
        if scored is not None and (type(scored) is not int or not 0 <= scored < 2**31):
            raise ValueError(f"{SCORED}: must be the id of a token, got {scored!r}")
        return cls(float(beta), candidates, params.temperature or 1.0, extra.get(RECORD), explain, scored, outputs)


class GuidanceProcessor(V1Processor, V2Processor):
    """rows: guided requests by slot. With the V1 runner a slot is a row of logits; with the V2 runner the step says which
    slot a row is of."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        Asked.of(sampling_params)

    def __init__(self, vllm_config: VllmConfig, state: Any, is_pin_memory: bool = False) -> None:
        """state: V1's device, or V2's request state."""
        self.key = vllm_config.instance_id
        self.guided = hasattr(vllm_config.model_config.hf_config, ABOUT)  # the plug-in is loaded for every model
        self.state = state
        self.rows: dict[int, Asked] = {}

    # V1

    def is_argmax_invariant(self) -> bool:
        return not self.guided

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self.guided:
            process_dict_updates(self.rows, batch_update, lambda params, _, outputs: self._asked(params, outputs))

    # V2

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        asked = self._asked(sampling_params) if self.guided else None
        self.rows.pop(req_idx, None)
        if asked is not None:
            self.rows[req_idx] = asked
        return asked is not None

    # both

    def _asked(self, params: SamplingParams, outputs: Sequence[int] = ()) -> Asked | None:
        asked = Asked.of(params, outputs)
        if asked is not None and asked.record is not None:  # of a request that was put off it goes on
            LOADED[self.key].records.setdefault(asked.record, {})
        return asked

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """logits: float32 [rows, vocab], changed in place where a row is guided and nowhere else."""
        if ctx is None:
            steps = [(slot, asked, len(asked.outputs)) for slot, asked in self.rows.items()]
        else:
            prompts = self.state.prompt_len.np
            places = zip(ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist(), strict=True)
            steps = [
                (row, self.rows[slot], length - int(prompts[slot]))
                for row, (slot, length) in enumerate(places)
                if slot in self.rows
            ]
        return self._guide(logits, *zip(*steps, strict=True)) if steps else logits

    def _guide(self, logits: Tensor, rows: Sequence[int], asked: Sequence[Asked], positions: Sequence[int]) -> Tensor:
        model = LOADED[self.key]
        which = torch.tensor(rows, device=logits.device)
        temperature = logits.new_tensor([one.temperature for one in asked]).unsqueeze(-1)
        beta = torch.tensor([one.beta for one in asked], dtype=torch.float64, device=logits.device).unsqueeze(-1)
        scores = logits[which] / temperature
        candidates = Candidates.of(scores, model.guidance)
        if any(one.candidates for one in asked):
            fewer = [one.candidates or model.guidance.candidates for one in asked]
            candidates = candidates.at_most(torch.tensor(fewer, device=logits.device))
        ids = candidates.ids
        scored = {row: one.scored for row, one in enumerate(asked) if one.scored is not None}
        if scored:
            ids = ids.clone()
            tokens = torch.tensor(list(scored.values()), device=ids.device)
            ids[list(scored), 0] = tokens.clamp(
                max=logits.shape[-1] - 1
            )  # clients of vLLM's own server say what they like
        values = model.value_logits(which, ids, len(logits))
        tilts = log_tilts(model.value, values, beta, candidates.valid, temperature, model.guidance)
        tilts = tilts.masked_fill(~candidates.contested.unsqueeze(-1), 0)
        tilted = Tilted.of(candidates, tilts, model.guidance.outside)
        guided = guided_scores(scores, candidates, tilted, model.guidance.outside)
        # On the reference's own scale, not normalised: what vLLM does next may depend on it (repetition penalties).
        logits[which] = (guided + candidates.total.unsqueeze(-1)) * temperature
        kept = values if any(one.explain for one in asked) else None
        step = Step(candidates.ids, candidates.logprobs, tilted.logprobs, candidates.valid, tilted.kl, kept)
        for row, (one, position) in enumerate(zip(asked, positions, strict=True)):
            if (
                one.record is not None
            ):  # a step whose token is thrown away (a prompt in parts) is written over by the next
                model.records.setdefault(one.record, {})[position] = (step, row)
        return logits

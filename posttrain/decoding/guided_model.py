"""A policy and its guide in one folder, as an object whose `generate` is that of a transformers model, with guidance on.

    DIR/                 the policy, an ordinary Hugging Face folder
    DIR/value/           the value model that guides it
    DIR/posttrain.json   how: `beta` and `guidance`

`posttrain export` writes such folders.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.config import build, within
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import ValueGuide, load_guide
from posttrain.errors import UserError
from posttrain.models.load import Policy, load_model
from posttrain.rollouts.collect import completion_seed
from posttrain.rollouts.engine import LEAST_BETA, Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

VALUE, SETTINGS = "value", "posttrain.json"
BETA = 0.1


@dataclass(frozen=True)
class Settings:
    """What SETTINGS says of guidance. Errors: UserError for a beta that is out of range."""

    beta: float | None = None
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if self.beta is not None and not self.beta >= LEAST_BETA:
            raise UserError(f"beta: must be at least {LEAST_BETA:g} (infinite: no tilt), got {self.beta}")


class GuidedModel:
    """beta: the KL coefficient where `generate` is given none, in units of the reward."""

    def __init__(self, policy: Policy, guide: ValueGuide, beta: float = BETA, slots: int = 64) -> None:
        self.policy, self.guide, self.beta = policy, guide, beta
        self.model, self.tokenizer, self.config = policy.model, policy.tokenizer, policy.model.config
        self.engine = TransformersEngine(
            policy.model, policy.tokenizer, fingerprint=policy.fingerprint, slots=slots, guide=guide
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_return_sequences: int = 1,
        beta: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompts with their completions, int64 [batch * num_return_sequences, time], as transformers' `generate` gives them:
        a prompt's beside each other, padded on the right with the tokenizer's padding token.

        input_ids, attention_mask: [batch, time], padded on the left; without a mask, nothing is padding. beta: None is the
        model's own, infinite the policy alone. Without do_sample the most likely token of the guided law is taken. seed: of
        the draws; without one it is drawn by `generator`, or by torch's own.

        Errors: UserError naming `beta`, an argument of sampling that is out of range, or `prompt` and `max_tokens` where
        these do not fit the model's context.
        """
        if num_return_sequences < 1:
            raise UserError(f"num_return_sequences: must be at least 1, got {num_return_sequences}")
        if input_ids.dim() != 2:
            raise UserError(f"input_ids: must be [batch, time], got {list(input_ids.shape)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise UserError(f"attention_mask: must be {list(input_ids.shape)} as input_ids, got {list(mask.shape)}")
        beta = self.beta if beta is None else beta
        if seed is None:
            where = generator.device if generator else "cpu"
            seed = int(torch.randint(2**62, (), generator=generator, device=where)) if do_sample else 0
        prompts = [tuple(row[kept.bool()].tolist()) for row, kept in zip(input_ids, mask, strict=True)]
        requests: list[Request] = []
        for row, prompt in enumerate(prompts):
            for sample in range(num_return_sequences):
                own = completion_seed(seed, str(row), sample)
                sampling = Sampling(temperature if do_sample else 0.0, top_p, top_k, max_new_tokens, own)
                requests.append(Request(len(requests), prompt, sampling, None if math.isinf(beta) else beta))
        done = {completion.request_id: completion.ids for completion in self.engine.generate(requests)}
        ends = [torch.tensor(done[request.id], device=input_ids.device) for request in requests]
        completions = pad_sequence(ends, batch_first=True, padding_value=self._padding())
        return torch.cat((input_ids.repeat_interleave(num_return_sequences, 0), completions), 1)

    def _padding(self) -> int:
        given = (self.tokenizer.pad_token_id, self.model.generation_config.pad_token_id)
        return next((token for token in given if token is not None), min(self.engine.eos_ids, default=0))


def load_guided(folder: str | Path, device: str | None = None, dtype: str | None = None) -> GuidedModel:
    """Of a folder that `posttrain export` wrote; device and dtype as `load_model`.

    Errors: UserError for a folder without a policy, a value model that guides it, or readable settings.
    """
    folder = Path(folder)
    if not (folder / VALUE / "config.json").is_file():
        raise UserError(
            f"guide: {folder} has no {VALUE}/; posttrain export RUN --out {folder}, of a run of posttrain qsharp"
        )
    found = read_settings(folder)
    with within(f"{folder / SETTINGS}: "):
        settings = build(Settings, {name: found[name] for name in ("beta", "guidance") if name in found})
    policy = load_model(str(folder), device, dtype)
    guide = load_guide(folder / VALUE, policy, settings.guidance)
    return GuidedModel(policy, guide, BETA if settings.beta is None else settings.beta)


def read_settings(folder: Path) -> dict[str, Any]:
    """Empty where there are none. Errors: UserError for a damaged file."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"guide: {path} is damaged; posttrain export writes it anew")
    return found

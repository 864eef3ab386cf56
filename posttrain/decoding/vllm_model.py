"""The guided policy as a model of vLLM's: both networks read the same tokens in one forward; logits are the policy's own.

What the value head needs of a step, the states of the rows that are sampled, stays here until the logits processor of the
same step asks for values (`value_logits`): nothing else passes between the two.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import has_inner_state, supports_multimodal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from posttrain.decoding.guidance import Guidance
from posttrain.decoding.vllm import ABOUT, VALUE
from posttrain.models.value import ValueModel, ValueModelConfig
from posttrain.objectives.qsharp import expected_return

LOADED: "WeakValueDictionary[str, GuidedLM]" = WeakValueDictionary()  # by the id of vLLM's configuration


@dataclass(frozen=True)
class Step:
    """What a step's account is made of: of candidates [rows, k] ids, reference and guided log-probabilities, and whether they
    count; KL [rows]; value logits [rows, k(, atoms)] where a request wants to know."""

    ids: Tensor
    reference: Tensor
    logprobs: Tensor
    valid: Tensor
    kl: Tensor
    values: Tensor | None

    def explain(self, row: int, atoms: Tensor | None) -> list[tuple[int, float, float, float]]:
        """Of a row's candidates, most likely first: id, log-probabilities under reference and guided law, expected return."""
        assert self.values is not None
        count = int(self.valid[row].sum())
        returns = expected_return(self.values[row, :count].float(), atoms)
        columns = (self.ids[row, :count], self.reference[row, :count], self.logprobs[row, :count], returns)
        return list(zip(*(column.tolist() for column in columns), strict=True))


class GuidedLM(nn.Module):
    """policy: vLLM's own class for it; backbone: likewise, of a Q-type value model, None of a shared head, which reads the
    policy; value: the head, always in float32.

    records: of requests that asked for one, by name: position in the completion -> (step, row).
    Errors: ValueError, which vLLM reports at start, for what would not be guided rightly.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        about = getattr(model_config.hf_config, ABOUT)
        config = ValueModelConfig.from_pretrained(model_config.model, subfolder=VALUE)
        _refuse(vllm_config, config)
        self.config = model_config.hf_config
        self.width: int = model_config.get_hidden_size()
        self.guidance = Guidance(**about["guidance"])
        self.records: dict[str, dict[int, tuple[Step, int]]] = {}
        self.policy: Any = init_vllm_registered_model(
            vllm_config,
            hf_config=self.config,
            architectures=about["policy_architectures"],
            prefix=maybe_prefix(prefix, "policy"),
        )
        if has_inner_state(self.policy) or supports_multimodal(self.policy):
            raise ValueError("guide: policies with recurrent layers or images are not guided in vLLM")
        self.backbone: Any = None
        if config.head == "q":
            decoder = copy.deepcopy(config.backbone)
            decoder.tie_word_embeddings = True  # its language-model head is never asked: no weights of its own
            architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[decoder.model_type]
            self.backbone = init_vllm_registered_model(
                vllm_config, hf_config=decoder, architectures=[architecture], prefix=maybe_prefix(prefix, VALUE)
            )
            self._backbone_prefix = getattr(transformers, architecture).base_model_prefix
        head = copy.copy(config)
        head.head = "shared"  # a value model without its backbone
        self.value: Any = ValueModel(head).float()
        self.secondary_weights = [
            DefaultModelLoader.Source(model_config.model, model_config.revision, subfolder=VALUE, prefix=f"{VALUE}.")
        ]
        self._projected: Tensor | None = None
        self._states: Tensor | None = None
        LOADED[vllm_config.instance_id] = self

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.policy.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """States [tokens, d], or [tokens, d + d of the value model's backbone]."""
        states = self.policy(input_ids, positions, intermediate_tensors, inputs_embeds)
        if self.backbone is None:
            return states
        return torch.cat((states, self.backbone(input_ids, positions, None, None)), -1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The policy's own; vLLM calls this for the rows that it samples, then its logits processors, and only then for
        the log-probabilities of prompts."""
        if self._projected is None:  # here, so that vLLM's memory profile sees it
            self._settle(hidden_states.device)
        self._states = hidden_states if self.backbone is None else hidden_states[:, self.width :]
        return self.policy.compute_logits(hidden_states[:, : self.width].contiguous())

    def _settle(self, device: torch.device) -> None:
        """Once all weights are there. The value model leaves the tree of modules: what pushes new weights goes through all
        that it finds there, and takes what it has no weights for to be lost."""
        for name in {"backbone", "value"} & self._modules.keys():
            self.__dict__[name] = self._modules.pop(name)
        embed = (self.policy if self.backbone is None else self.backbone).embed_input_ids
        self._projected = self.value.head.project(embed(torch.arange(self.value.config.vocab_size, device=device)))

    def value_logits(self, rows: Tensor, ids: Tensor, of: int) -> Tensor:
        """Of candidates ids [n, k] of rows [n] of the step's `of` rows: [n, k(, atoms)]. Once a step."""
        states, self._states = self._states, None
        if states is None or len(states) != of:
            raise RuntimeError("guidance: no states of this step; is the logits processor loaded twice?")
        assert self._projected is not None
        return self.value.of_candidates(states[rows], self._projected[ids])

    def account(self, name: str, ids: Sequence[int], explain: bool) -> tuple[float, float, list[Any]]:
        """Of a request's record, which is then gone, and its tokens: the KL, the sum of their reference log-probabilities, and to
        explain, of every step that of its token, and the candidates as `Step.explain`; plain numbers."""
        record = self.records.pop(name, {})
        rows = [record[position] for position in range(len(ids))]
        if not rows:
            return 0.0, 0.0, []
        candidates = torch.stack([step.ids[row] for step, row in rows])
        hits = candidates == torch.tensor(ids, device=candidates.device).unsqueeze(-1)
        reference = torch.stack([step.reference[row] for step, row in rows])
        reference = reference.masked_fill(~hits, 0).sum(-1)  # every sampled token was a candidate
        kl = torch.stack([step.kl[row] for step, row in rows]).sum()
        told = [step.explain(row, self.value.atoms) for step, row in rows] if explain else []
        return float(kl), float(reference.sum()), list(zip(reference.tolist(), told, strict=False))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Checkpoint names are the policy's own; those of the value model start with `value.`, and come at the first load
        only: whatever is pushed later is the policy's."""
        values: list[tuple[str, Tensor]] = []

        def of_policy() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.startswith(f"{VALUE}."):
                    values.append((name.removeprefix(f"{VALUE}."), weight))
                else:
                    yield name, weight

        loaded = {f"policy.{name}" for name in self.policy.load_weights(of_policy())}
        self.secondary_weights = []
        self._projected = None
        trunk = [(name.removeprefix("backbone."), weight) for name, weight in values if name.startswith("backbone.")]
        if trunk:
            named = ((f"{self._backbone_prefix}.{name}", weight) for name, weight in trunk)
            loaded |= {f"backbone.{name}" for name in self.backbone.load_weights(named)}
        parameters = dict(self.value.named_parameters())
        for name, weight in values:
            if not name.startswith("backbone."):
                default_weight_loader(parameters[name], weight)
                loaded.add(f"value.{name}")
        return loaded


class GuidanceWorker:
    """What vLLM adds to its workers (`worker_extension_cls`), for whoever holds the engine from another process."""

    def guidance_account(self, name: str, ids: list[int], explain: bool) -> tuple[float, float, list[Any]]:
        worker: Any = self
        return worker.get_model().account(name, ids, explain)


def _refuse(vllm_config: VllmConfig, config: ValueModelConfig) -> None:
    """What would not be guided rightly."""
    longest = vllm_config.model_config.max_model_len
    context = None if config.head == "shared" else config.backbone.max_position_embeddings
    for wrong, why in (
        (config.head == "v", "a V-type head is not served in vLLM; train with value.head q or shared"),
        (vllm_config.quant_config is not None, "a quantised policy is not guided: its value model is not quantised"),
        (vllm_config.lora_config is not None, "LoRA adapters are not guided in vLLM; merge them into the policy"),
        (vllm_config.speculative_config is not None, "vLLM runs no logits processors in speculative decoding"),
        (vllm_config.parallel_config.pipeline_parallel_size > 1, "no pipeline parallelism; use tensor parallelism"),
        (vllm_config.model_config.enable_prompt_embeds, "the value model reads tokens, not prompt embeddings"),
        (context is not None and context < longest, f"it reads {context} tokens: set --max-model-len {context}"),
    ):
        if wrong:
            raise ValueError(f"guide: {why}")

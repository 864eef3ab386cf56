"""TRL's rollout function on a rollout service: the policy in training is pushed to it whenever it has changed.

TRL's own server mode hands weights over by NCCL, GPU to GPU; this one needs a folder that trainer and replicas both see.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.models import unwrap_model_for_generation

from posttrain.data.prompts import Message
from posttrain.rollouts.service import ServiceEngine
from posttrain.trainers.engine_rollouts import asked


class ServiceRollouts:
    """What to give a GRPOTrainer as `rollout_func`: as `engine_rollouts`, of a service, which from then on has the trainer's
    weights. Every rank asks for its own completions, the first pushes for all. Close it.

    Errors: UserError as `ServiceEngine`, and naming `weights` for a service that does not take them.
    """

    def __init__(self, urls: Sequence[str], slots: int = 64, key: str | None = None) -> None:
        self.engine = ServiceEngine(urls, slots=slots, key=key)
        self._pushed: int | None = None  # at which step

    def __call__(self, prompts: list[list[Message]], trainer: Any) -> dict[str, list[Any]]:
        if self._pushed != trainer.state.global_step:
            self.push(trainer)
            self._pushed = trainer.state.global_step
        prompt_ids, requests = asked(prompts, trainer)
        found = {completion.request_id: completion for completion in self.engine.generate(requests)}
        done = [found[request.id] for request in requests]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(completion.ids) for completion in done],
            "logprobs": [list(completion.logprobs) for completion in done],
        }

    def push(self, trainer: Any) -> None:
        """The trainer's weights as they are, to every replica; of all ranks together."""
        told: list[str | None] = [None]
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            if trainer.accelerator.is_main_process:
                folder = Path(trainer.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix="pushed-", dir=folder) as scratch:
                    save_merged(model, scratch)
                    self.engine.sync_weights(scratch)
                told = [self.engine.fingerprint]
        (fingerprint,) = broadcast_object_list(told)
        self.engine.follow(str(fingerprint))

    def close(self) -> None:
        self.engine.close()


def save_merged(model: Any, folder: str) -> None:
    """A model's weights as the architecture's own; an adapter is merged into copies of what it adapts, one at a
    time on the model's device."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    base: Any = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): weight for name, weight in base.state_dict().items() if ".lora_" not in name
    }
    for place, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer):
            copied = copy.deepcopy(layer)  # merging where it stands and unmerging would drift, push by push
            copied.merge()
            weights |= {
                f"{place}.{name}": weight.cpu() for name, weight in copied.get_base_layer().state_dict().items()
            }
    base.save_pretrained(folder, state_dict=weights)

"""Guidance inside vLLM: policy and value model become one model of vLLM's, so that one scheduler runs both, both caches are
paged, and prefix caching, chunked prefill and preemption hold for the two together.

The model is a folder (`compose`): the policy's files, a `value` folder beside them, and a config.json that names our class.
vLLM learns of the class, and of the logits processor that tilts each guided request, through the entry points of this
package. A request asks for guidance in its `extra_args` (of an HTTP request: `vllm_xargs`); without BETA it is the policy's
own:

    guidance_beta          the KL coefficient, in units of the reward
    guidance_candidates    value only so many of the tokens that would be valued
"""

import json
import multiprocessing
import os
import threading
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from posttrain.decoding.guidance import Guidance
from posttrain.errors import UserError
from posttrain.models.load import Policy, model_fingerprint
from posttrain.models.value import ValueModelConfig, read_value_model, value_fingerprint
from posttrain.provenance import hash_json, write_json

ARCHITECTURE = "PosttrainGuidedLM"
MODEL = "posttrain.decoding.vllm_model:GuidedLM"
PROCESSOR = "posttrain.decoding.vllm_processor:GuidanceProcessor"
WORKER = "posttrain.decoding.vllm_model.GuidanceWorker"
PROCESSORS_GROUP = "vllm.logits_processors"
ABOUT = "posttrain_guide"  # what config.json says of the guide
VALUE = "value"  # the folder within the folder
BETA = "guidance_beta"
CANDIDATES = "guidance_candidates"
RECORD = "guidance_record"  # a name under which the model keeps what a request's KL is made of
EXPLAIN = "guidance_explain"  # and what the value model said of each candidate
SCORED = "guidance_scored"  # a token that the value model is asked of in place of the most likely candidate


@dataclass(frozen=True)
class VLLMGuide:
    """A saved value model as a guide in vLLM. `settings` and `name` are those of the same guide in the transformers engine."""

    folder: Path
    config: ValueModelConfig
    fingerprint: str
    guidance: Guidance

    @property
    def settings(self) -> dict[str, Any]:
        return self.guidance.settings(self.fingerprint, self.config.head)

    @property
    def name(self) -> str:
        return hash_json(self.settings)

    @property
    def reads_policy(self) -> bool:
        return self.config.head == "shared"

    @property
    def context(self) -> int | None:
        """The largest number of tokens it can read; None: no shorter than the policy's own."""
        return None if self.reads_policy else self.config.backbone.max_position_embeddings


def load_vllm_guide(
    folder: str | Path, policy: Policy, guidance: Guidance | None = None, any_reference: bool = False
) -> VLLMGuide:
    """Errors: UserError naming `guide` as `read_value_model`, for a V-type head, and for values of preferences; naming `lazy`,
    which only a V-type head can be; naming `outside` for tokens that are sampled without having been candidates, of whose KL
    vLLM gives no account."""
    guidance = guidance or Guidance()
    value = read_value_model(folder, policy, any_reference)
    if value.config.head == "v":
        raise UserError(
            f"guide: {folder} has a V-type head, which reads every candidate as one more token; vLLM runs one query a step: "
            "train with value.head q or shared, or use --engine transformers"
        )
    if value.config.preferences:
        raise UserError(
            f"guide: {folder} learned from preferences, which vLLM does not serve; use --engine transformers"
        )
    if guidance.lazy:
        raise UserError(
            "lazy: a q or shared head, which vLLM runs, values all candidates in one query, and has none to save; leave it out"
        )
    if guidance.outside != "mask":
        raise UserError(f"outside: must be mask in vLLM, got {guidance.outside!r}; the transformers engine has both")
    return VLLMGuide(Path(folder), value.config, value_fingerprint(folder), guidance)


def compose(policy: Path, guide: VLLMGuide, out: Path) -> None:
    """Makes a new folder that vLLM serves as the guided policy. Weights are links to where they lie: they must stay there.

    Errors: UserError naming `model` for a quantised policy, naming `guide` for a value model of another size.
    """
    from transformers import AutoConfig

    config = json.loads((policy / "config.json").read_text())
    if config.get("quantization_config"):
        raise UserError(
            "model: it is quantised, and vLLM would take its value model to be so as well; guide the unquantised policy, or "
            "use --engine transformers"
        )
    text = AutoConfig.from_pretrained(policy, trust_remote_code=False).get_text_config()
    if guide.config.vocab_size != text.vocab_size:
        raise UserError(
            f"guide: it knows {guide.config.vocab_size} tokens, the policy {text.vocab_size}; they must be the same"
        )
    if guide.reads_policy and guide.config.hidden_size != text.hidden_size:
        raise UserError(
            f"guide: its shared head reads states of size {guide.config.hidden_size}, the policy's have {text.hidden_size}"
        )
    about = {
        "policy_architectures": config["architectures"],
        "policy": model_fingerprint(policy),
        "value_model": guide.fingerprint,
        "guidance": asdict(guide.guidance),
    }
    for source, target in ((policy, out), (guide.folder, out / VALUE)):
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and (source, file.name) != (policy, "config.json"):
                (target / file.name).symlink_to(file.resolve())
    write_json(out / "config.json", {**config, "architectures": [ARCHITECTURE], ABOUT: about})


def register() -> None:
    """What vLLM calls in each of its processes (entry point `vllm.general_plugins`); more than once does no harm."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, MODEL)
    _end_with_parent()


@cache
def _end_with_parent() -> None:
    """vLLM's workers end when its engine does, but the engine, in a process of its own, would outlive whoever started it and was
    killed, and keep the GPU. A forked process is not asked: `register` was called before it was there."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=follow, name="parent", daemon=True).start()


def processors() -> list[str | type[Any]]:
    """The logits processors that vLLM must be told of: none where this package is installed with its entry points."""
    found = any(point.value == PROCESSOR for point in entry_points(group=PROCESSORS_GROUP))
    return [] if found else [PROCESSOR]

"""The sizes of a model, without its weights: from its configuration alone."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.config import read_yaml
from posttrain.errors import UserError, nearest
from posttrain.models.load import PUBLISHED, TINY, known_models


@dataclass(frozen=True)
class Architecture:
    """A dense decoder. parameters: all of them, tied ones once; embedding: those of the input embedding, which the head has
    once more unless it is `tied`; layer: those of one layer; adapted: LoRA's parameters per rank, on all linear layers of one.

    queries, keys: width of all query heads, and of all key (or value) heads; head_norms: queries and keys are normalised.
    """

    name: str
    parameters: int
    embedding: int
    tied: bool
    layer: int
    adapted: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    context: int
    head_norms: bool = False

    @property
    def body(self) -> int:
        """The parameters without the language-model head: those of a value model's backbone."""
        return self.parameters - (0 if self.tied else self.embedding)

    def cut(self, layers: int) -> "Architecture":
        """With its first layers only."""
        return replace(self, layers=layers, parameters=self.parameters - (self.layers - layers) * self.layer)


@cache
def architecture(name: str) -> Architecture:
    """Of `tiny`, a folder, a `.gguf` file or a hub id: as published where that is known here, else as the hub's cache or the
    hub itself has it.

    Errors: UserError naming `model` for one that is not found, and for what is no dense decoder with attention in all layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _configuration(name)
    text = config.get_text_config()
    for field in ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"):
        if getattr(text, field, None):
            raise UserError(f"model: {name} is a mixture of experts, whose memory is not reckoned here")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        decoder = model.get_decoder()
        first = decoder.layers[0]
        heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return Architecture(
            name=name,
            parameters=sum(weight.numel() for weight in model.parameters()),
            embedding=embedding.numel(),
            tied=head is embedding,
            layer=sum(weight.numel() for weight in first.parameters()),
            adapted=sum(
                module.in_features + module.out_features
                for module in first.modules()
                if isinstance(module, torch.nn.Linear)
            ),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            queries=heads * width,
            keys=keys * width,
            inner=text.intermediate_size,
            vocabulary=text.vocab_size,
            context=text.max_position_embeddings,
            head_norms=any(module_name.endswith("q_norm") for module_name, _ in first.named_modules()),
        )
    except (AttributeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: {name} is not a dense decoder whose memory is reckoned here: {reason}") from None


def _configuration(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = TINY if name == "tiny" else Path(name).expanduser()
    published = read_yaml(PUBLISHED)
    if not path.exists() and name in published:
        values = dict(published[name])
        return CONFIG_MAPPING[values.pop("model_type")](**values)
    try:
        if path.suffix == ".gguf" and path.is_file():
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if path.is_dir():
            return AutoConfig.from_pretrained(path, trust_remote_code=False)
        if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix == ".gguf":
            raise UserError(f"model: no such folder or file: {name}")
        return AutoConfig.from_pretrained(_from_hub(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: {name} has no readable configuration: {reason}") from None


def _from_hub(name: str) -> Path:
    """The folder of a hub model's config.json: in the hub's cache, else asked for once, briefly."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=5)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model: {name} is neither 'tiny', a folder, a .gguf file, nor a model whose configuration is at hand ({reason})"
            f"{nearest(name, known_models())}"
        ) from None

"""A policy by name: the embedded model, a local folder, a GGUF file, or a hub id."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import read_yaml
from posttrain.errors import UserError, nearest
from posttrain.provenance import hash_files

if TYPE_CHECKING:
    import torch

TINY = Path(__file__).parents[1] / "assets" / "tiny"
PUBLISHED = Path(__file__).parents[1] / "assets" / "architectures.yaml"
FINGERPRINTED = (  # files of a policy's folder that decide what it says
    *("*.safetensors", "config.json", "generation_config.json"),
    *("tokenizer*", "vocab.json", "merges.txt", "chat_template*"),
)


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer. `fingerprint` covers weights, configuration, vocabulary and chat template."""

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    context: int


def load_model(name: str, device: str | None = None, dtype: str | None = None) -> Policy:
    """`tiny`, a folder, a `.gguf` file (its dequantised copy is cached) or a hub id.

    `device`: default `cuda` where there is one, else `cpu`; `dtype`: `float32` or `bfloat16`, default bfloat16 on cuda, else float32.
    Errors: UserError for an unknown model, device or dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    where = _device(device)
    precision = _dtype(dtype, where)
    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # What is too long is refused in our own words, before anything is sampled.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=precision, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a damaged file breaks the loaders in whatever place the damage is
        raise UserError(
            f"model: {name} is not a causal language model with safetensors weights: {_first_line(error)}"
        ) from None
    if loaded["missing_keys"]:
        raise UserError(f"model: {name} lacks weights, among them {min(loaded['missing_keys'])}; they would be random")
    try:
        model = model.to(where).eval()
    except RuntimeError as error:
        raise UserError(f"device: the model cannot be moved to {where}: {_first_line(error)}") from None
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"model: {name} has weights that are not finite")
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0)) or int(
        tokenizer.model_max_length
    )
    return Policy(model, tokenizer, name, model_fingerprint(folder), context)


def load_tokenizer(name: str) -> Policy:
    """A policy whose weights an engine of its own will read: all of `load_model`'s but the model, which is None.

    Errors: UserError for an unknown model.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # as above
        raise UserError(f"model: {name} is not a causal language model: {_first_line(error)}") from None
    context = int(getattr(config, "max_position_embeddings", 0)) or int(tokenizer.model_max_length)
    return Policy(None, tokenizer, name, model_fingerprint(folder), context)


@contextmanager
def set_aside(policy: Policy) -> Iterator[None]:
    """Within, the policy's weights lie in the machine's own memory, and what a GPU has is for others."""
    import torch

    device = policy.model.device
    policy.model.to("cpu")
    torch.cuda.empty_cache()  # for other processes too
    try:
        yield
    finally:
        policy.model.to(device)


def end_ids(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """The ids that end a completion: those of the model's generation config, and its tokenizer's end-of-text id."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(configured if isinstance(configured, list) else [configured])
    found.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(found - {None})


def model_folder(name: str) -> Path:
    """The local folder that holds a named model; downloads a hub id, dequantises a GGUF file once."""
    if name == "tiny":
        return TINY
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model: no such file: {name}")
        return _dequantised(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: {name} has no config.json; give a folder written by save_pretrained")
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"model: no such folder: {name}")
    return _from_hub(name)


def known_models() -> list[str]:
    """The names that recipes have: a near miss of one is told."""
    return ["tiny", *read_yaml(PUBLISHED)]


def model_fingerprint(folder: Path) -> str:
    """sha256 over what decides the policy: weights, configuration, end-of-text ids, vocabulary, chat template.

    Errors: UserError naming `model` for a folder without safetensors, whose weights would not be in it.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model: {folder} has no weights as .safetensors; load it with transformers and save it again")
    return hash_files({file for pattern in FINGERPRINTED for file in folder.glob(pattern) if file.is_file()})


def cache_folder() -> Path:
    """`POSTTRAIN_CACHE`, else `~/.cache/posttrain`."""
    return Path(os.environ.get("POSTTRAIN_CACHE", "~/.cache/posttrain")).expanduser()


def _dequantised(gguf: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()[:16]
    target = cache_folder() / "gguf" / f"{gguf.stem}-{digest}"
    if target.is_dir():
        return target
    try:
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # a damaged file breaks the reader in whatever place the damage is
        raise UserError(f"model: {gguf} is not a readable GGUF file: {_first_line(error)}") from None
    # A model read from GGUF refuses to be saved while it remembers its quantisation: move the weights into a plain one.
    if hasattr(packed.config, "quantization_config"):
        del packed.config.quantization_config
    plain = AutoModelForCausalLM.from_config(packed.config)
    plain.load_state_dict(packed.state_dict())
    if isinstance(
        packed.config.eos_token_id, int
    ):  # the file's own tokenizer may name another end of text than its model
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(packed.config.eos_token_id)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            plain.save_pretrained(f"{scratch}/model")
            tokenizer.save_pretrained(f"{scratch}/model")
            if not target.is_dir():  # another process may have been faster
                Path(scratch, "model").rename(target)
    except OSError as error:
        raise UserError(
            f"model: cannot cache its dequantised copy: {error}; set POSTTRAIN_CACHE to another folder"
        ) from None
    return target


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model: {name} is neither 'tiny', a folder, a .gguf file nor a model that the hub gives us ({_first_line(error)})"
            f"{nearest(name, known_models())}"
        ) from None


def _device(device: str | None) -> "torch.device":
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: must be cpu, cuda or cuda:N, got {device!r}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda asked for, but torch sees no GPU; use cpu")
    return where


def _dtype(dtype: str | None, device: "torch.device") -> "torch.dtype":
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in known:
        raise UserError(f"dtype: must be float32 or bfloat16, got {dtype!r}")
    return known[dtype]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__

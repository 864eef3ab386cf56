"""Hidden states of a frozen causal language model as features of (prompt, completion), by one teacher-forced forward.

phi(x, a) is one residual-stream vector (Q-Probe, section 1): the hidden state after some layer, at the completion's
last token or averaged over the completion. Several layers and both poolings come from the same forward: hooks on the
layers pool what passes by, so that no layer's [batch, time, d] states outlive the layer, and the language-model head
never runs.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.errors import UserError, nearest
from posttrain.models.load import end_ids

Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
Row = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt and of one completion of it."""

FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class FeatureSpec:
    """Which vector; `layer` as in transformers' `hidden_states`: 0 = embeddings, the last = after the final norm."""

    layer: int
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UserError(f"layer: must be 0 or more, got {self.layer}")
        if self.pooling not in POOLINGS:
            hint = nearest(str(self.pooling), POOLINGS)
            raise UserError(f"pooling: must be last or mean, got {self.pooling!r}{hint}")

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.pooling}"


def all_specs(model: Any, layers: Sequence[int] = (), poolings: Sequence[Pooling] = POOLINGS) -> list[FeatureSpec]:
    """The candidates for a probe: these layers (none named: every one) with these poolings.

    Errors: UserError for a layer that the model does not have, and for no candidate at all.
    """
    base = _base(model)
    layers = layers or range(base.config.num_hidden_layers + 1)
    specs = [FeatureSpec(layer, pooling) for layer in layers for pooling in poolings]
    _check_specs(base, specs)
    return specs


@torch.no_grad()
def hidden_features(
    model: Any,
    rows: Sequence[Row],
    specs: Sequence[FeatureSpec],
    *,
    stop_ids: Collection[int] | None = None,
    batch_tokens: int = 8192,
) -> Tensor:
    """Features of every row, float16 [rows, specs, d] on the CPU; values beyond float16 are clamped to its range.

    model: any transformers causal LM, PEFT adapters included. stop_ids: a completion's final token is dropped if it
    is one of these (default: the model's own end-of-sequence ids), since the paper reads the state *before* the stop.
    Of an empty completion both poolings read the prompt's last token. batch_tokens: at most so many, padding
    included, in one forward (one row may have more).

    Errors: UserError for a layer the model does not have, a row without tokens or longer than the context, and states
    that are not finite.
    """
    base = _base(model)
    _check_specs(base, specs)
    stop = end_ids(model) if stop_ids is None else frozenset(stop_ids)
    kept = [(prompt, _cut(completion, stop)) for prompt, completion in rows]
    lengths = [len(prompt) + len(completion) for prompt, completion in kept]
    _check_lengths(base, lengths)

    features = torch.empty(len(rows), len(specs), base.config.hidden_size, dtype=torch.float16)
    batches = list(batches_by_length(lengths, batch_tokens))
    console = Console(stderr=True)
    quiet = not console.is_terminal or len(batches) < 20
    training = base.training
    base.eval()
    try:
        for batch in track(batches, "hidden states", console=console, disable=quiet, transient=True):
            pooled = _pooled(base, [kept[i] for i in batch], specs)
            if not pooled.isfinite().all():
                raise UserError("model: hidden states are not finite; load it in bfloat16 or float32")
            features[batch] = pooled.clamp(-FLOAT16_MAX, FLOAT16_MAX).to("cpu", torch.float16)
    finally:
        base.train(training)
    return features


def cached_features(
    folder: Path | str,
    fingerprint: str,
    model: Any,
    rows: Sequence[Row],
    specs: Sequence[FeatureSpec],
    **options: Any,
) -> Tensor:
    """`hidden_features`, kept in `folder` under a name made of the policy's fingerprint, the specs and the token ids.

    Errors: as there, and UserError for a folder that cannot be written.
    """
    settings = [fingerprint, [asdict(spec) for spec in specs], options]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=sorted).encode())
    for prompt, completion in rows:
        key.update(array("q", [len(prompt), len(completion), *prompt, *completion]).tobytes())
    path = Path(folder) / f"features-{key.hexdigest()[:16]}.safetensors"
    try:
        return load_file(path)["features"]
    except (FileNotFoundError, SafetensorError):  # absent, or cut short by a full disk: compute it again
        features = hidden_features(model, rows, specs, **options)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"features: cannot write to {folder}: {error}") from None
    return features


def _pooled(base: Any, rows: Sequence[Row], specs: Sequence[FeatureSpec]) -> Tensor:
    """One right-padded forward; float32 [rows, specs, d]."""
    device = next(base.parameters()).device
    sequences = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
    prompts = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
    ends = torch.tensor([len(sequence) for sequence in sequences], device=device)
    time = torch.arange(ids.shape[1], device=device)
    start = torch.minimum(prompts, ends - 1)  # an empty completion is read as the prompt's last token
    span = (time >= start[:, None]) & (time < ends[:, None])  # [batch, time]

    pooled: dict[FeatureSpec, Tensor] = {}

    def pool(layer: int, states: Tensor) -> None:  # states [batch, time, d]
        for spec in specs:
            if spec.layer != layer:
                continue
            if spec.pooling == "last":
                pooled[spec] = states[torch.arange(len(rows), device=device), ends - 1].float()
            else:
                weights = span / span.sum(-1, keepdim=True)
                pooled[spec] = torch.einsum("bt,btd->bd", weights, states.float())

    with ExitStack() as hooks:
        blocks = _blocks(base)
        for layer in {spec.layer for spec in specs} - {len(blocks)}:
            # hidden_states[i] is what goes into block i; after the last block transformers applies the final norm.
            def hook(_: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
                pool(layer, args[0] if args else kwargs["hidden_states"])

            hooks.callback(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        last = base(input_ids=ids, attention_mask=(time < ends[:, None]).long(), use_cache=False).last_hidden_state
    pool(len(blocks), last)
    return torch.stack([pooled[spec] for spec in specs], 1)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest first, so that a batch too large for the device fails at once."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _base(model: Any) -> Any:
    """The decoder without its language-model head, adapters in place."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # peft
    return model.get_decoder()


def _blocks(base: Any) -> nn.ModuleList:
    depth = base.config.num_hidden_layers
    for module in base.children():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"model: no list of {depth} layers in {type(base).__name__}; its hidden states cannot be read")


def _cut(completion: Sequence[int], stop: frozenset[int]) -> Sequence[int]:
    return completion[:-1] if len(completion) and completion[-1] in stop else completion


def _check_specs(base: Any, specs: Sequence[FeatureSpec]) -> None:
    if not specs:
        raise UserError("specs: at least one layer and pooling is needed")
    depth = base.config.num_hidden_layers
    for spec in specs:
        if spec.layer > depth:
            raise UserError(f"layer: {spec.layer} is out of range; the model has hidden states 0 to {depth}")


def _check_lengths(base: Any, lengths: Sequence[int]) -> None:
    context = getattr(base.config, "max_position_embeddings", None)
    for i, length in enumerate(lengths):
        if length == 0:
            raise UserError(f"rows[{i}]: neither prompt nor completion has a token")
        if context is not None and length > context:
            raise UserError(f"rows[{i}]: {length} tokens are more than the model's context of {context}")

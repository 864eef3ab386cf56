"""How much memory training and sampling take on one rank, in bytes: arithmetic on a model's sizes, no model.

Of a decoder with rotary positions, RMS norms and a gated MLP, whose attention is torch's fused kernel. All that autograd keeps
for the backward pass is counted, tensor by tensor; what lives within one operation is left out, but for what is large: a
chunk of logits, and a layer's own backward. Measured peaks are within 15 % (tests/models/test_memory.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.models.architecture import Architecture
from posttrain.models.cache import FIRST_LENGTH
from posttrain.models.logprobs import CHUNK_LOGITS

Precision = Literal["float32", "autocast", "bfloat16"]  # autocast: float32 weights, bfloat16 products
FLOAT32, BFLOAT16 = 4, 2  # bytes
ADAM = 8  # bytes per parameter: AdamW's two moments
MASTER = 4  # the same: DeepSpeed's own float32 copy of it
GATHERED = 1_000_000_000  # parameters that ZeRO-3 holds whole at once: its stage3_max_live_parameters
BUCKET = 500_000_000  # gradients that ZeRO reduces at once: its reduce_bucket_size
TRL_TILE = 4096 * 32768  # logits of TRL's head at once


@dataclass(frozen=True)
class Launch:
    """ranks: processes, one per GPU; zero: DeepSpeed's stage, None without DeepSpeed; offload: its optimiser lies in the
    machine's own memory."""

    ranks: int = 1
    zero: int | None = None
    offload: bool = False


@dataclass(frozen=True)
class Batch:
    """One forward: rows of `time` tokens, of which `completion` are the completion's. packed: as one row under one mask."""

    rows: int
    time: int
    completion: int
    checkpointing: bool = False
    packed: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.time


@dataclass(frozen=True)
class Trained:
    """A module that learns: of its `weights` parameters `learning` do, in its last `layers` layers; adapters: they are LoRA's."""

    model: Architecture
    weights: int
    learning: int
    layers: int
    adapters: bool = False


def trained(model: Architecture, whole: int, rank: int | None = None, layers: int | None = None) -> Trained:
    """whole: the module's parameters, a head included; rank: of adapters on all linear layers; layers: only the last ones
    learn."""
    count = model.layers if layers is None else layers
    if rank:
        own = rank * model.adapted
        return Trained(model, whole + model.layers * own, count * own, count, True)
    learning = whole if layers is None else count * model.layer
    return Trained(model, whole, learning, count)


def weight_bytes(precision: Precision) -> int:
    return BFLOAT16 if precision == "bfloat16" else FLOAT32


def state(module: Trained, precision: Precision, launch: Launch) -> dict[str, int]:
    """Weights, gradients and optimiser state, on one rank."""
    size, ranks = weight_bytes(precision), launch.ranks
    if launch.zero is None:
        # DDP keeps what it reduces in buckets, beside the gradients.
        gradients = size * module.learning * (2 if ranks > 1 else 1)
        return {"weights": size * module.weights, "gradients": gradients, "optimiser": ADAM * module.learning}
    return {
        "weights": size * module.weights // (ranks if launch.zero == 3 else 1),
        "gradients": 0 if launch.offload else size * module.learning // (ranks if launch.zero >= 2 else 1),
        "optimiser": 0 if launch.offload else (ADAM + MASTER) * module.learning // ranks,
    }


def zero_buffers(modules: Sequence[Trained], precision: Precision, launch: Launch) -> int:
    """What DeepSpeed reduces gradients in, whatever their number, and gathers weights in."""
    if launch.zero is None:
        return 0
    # Below stage 3 there are two, of which one fills while the other is sent (overlap_comm).
    elements = BUCKET + min(sum(module.weights for module in modules), GATHERED) if launch.zero == 3 else 2 * BUCKET
    return weight_bytes(precision) * elements


def layer(module: Trained, batch: Batch, precision: Precision) -> int:
    """What one layer keeps for its backward pass."""
    model, width = module.model, FLOAT32 if precision == "float32" else BFLOAT16

    def norm(size: int, readers: int) -> int:
        """The input; that normalised, which a frozen scale needs not; what `readers` linear layers read."""
        scaled = 0 if module.adapters else BFLOAT16 if precision == "bfloat16" else FLOAT32
        read = FLOAT32 if precision == "float32" else BFLOAT16 if precision == "bfloat16" else BFLOAT16 * readers
        return size * (FLOAT32 + scaled + read)

    norms = norm(model.hidden, 3) + norm(model.hidden, 2)
    if model.head_norms:
        norms += norm(model.queries, 0) + norm(model.keys, 0)
    attention = 4 * width * model.queries  # queries; keys and values, repeated for every query head; what comes out
    inner = 4 * width * model.inner  # gate, its activation, up, and their product
    mask = width * batch.tokens * (batch.tokens if batch.packed else batch.time)  # the kernel's own, additive
    return batch.tokens * (norms + attention + inner) + mask


def kept(module: Trained, batch: Batch, precision: Precision) -> int:
    """What all layers keep at the end of a forward: everything, or with checkpointing their inputs."""
    if not batch.checkpointing:
        return module.layers * layer(module, batch, precision)
    return module.layers * batch.tokens * module.model.hidden * weight_bytes(precision)


def again(module: Trained, batch: Batch, precision: Precision) -> int:
    """The backward of one layer: its gradients, and what checkpointing computes again."""
    width = FLOAT32 if precision == "float32" else BFLOAT16
    own = batch.tokens * (2 * width * module.model.inner + weight_bytes(precision) * module.model.hidden)
    return own + (layer(module, batch, precision) if batch.checkpointing else 0)


def our_head(module: Trained, batch: Batch, precision: Precision) -> int:
    """The policy's head by chunks of float32 logits: the logits and two gradients of a chunk, and its weight's."""
    tokens, model = batch.rows * batch.completion, module.model
    chunk = 3 * FLOAT32 * min(tokens * model.vocabulary, CHUNK_LOGITS)
    widened = FLOAT32 * model.embedding if precision == "bfloat16" else 0
    return chunk + widened + _head_gradient(module) + FLOAT32 * tokens * model.hidden


def trl_head(module: Trained, batch: Batch, precision: Precision) -> int:
    """The same of TRL's, by tiles of tokens and vocabulary."""
    width = FLOAT32 if precision == "float32" else BFLOAT16
    tile = width * min(batch.tokens * 32768, TRL_TILE)
    return tile + _head_gradient(module) + 2 * FLOAT32 * batch.tokens * module.model.hidden


def _head_gradient(module: Trained) -> int:
    return 0 if module.adapters else FLOAT32 * module.model.embedding


def backward(
    modules: Sequence[Trained], batch: Batch, precision: Precision, head: int, gradients: int, accumulated: bool
) -> int:
    """The most that a forward and backward through modules, one after the other, need beside weights and gradients.

    head: of the first module, whose backward comes last. accumulated: the gradients are there from the start; else they come
    as what was kept goes, and `gradients` bytes of it have their place.
    """
    before = sum(kept(module, batch, precision) for module in modules)
    casts = BFLOAT16 * sum(module.weights for module in modules) if precision == "autocast" else 0
    last = max(again(module, batch, precision) for module in modules)
    most = max(before + last, kept(modules[0], batch, precision) + head) + casts
    return most if accumulated else max(most - gradients, last)


def kv_cache(model: Architecture, slots: int, time: int, width: int) -> int:
    """Of our engine (models/cache.py), which doubles it when it is full."""
    length = FIRST_LENGTH
    while length < time:
        length *= 2
    return 2 * model.layers * slots * model.keys * min(length, -(-model.context // 8) * 8) * width


def forward(model: Architecture, tokens: int, width: int) -> int:
    """A forward without a backward: what one layer holds at once."""
    return tokens * width * (3 * model.inner + 4 * model.hidden)


def host_state(module: Trained) -> int:
    """What an offloaded optimiser keeps of a module, on all ranks together: moments, master copy, gradients."""
    return (ADAM + 2 * MASTER) * module.learning

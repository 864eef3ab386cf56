"""A key-value cache by request slot, for a batch that requests enter and leave one by one.

Slot r of every layer is keys[r], values[r]: [kv_heads, length, head_dim], allocated once, grown by doubling. The active
slots are packed at the front, so that what attention reads is a view, `keys[:rows, :, :longest]`, and never a copy. A
row is written at its own position; whatever lies behind that position (padding, an earlier request) is masked until it
is overwritten.

To a model this is an ordinary transformers `Cache`. It always looks empty: while prompts are filled in, each prompt
attends to itself alone; while tokens are decoded, the caller passes the mask of each row's own length (`decode_masks`).
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from posttrain.errors import UserError

FIRST_LENGTH = 128
ALIGNMENT = 8  # GPU attention kernels copy a mask whose rows are not aligned


class SlotCache(Cache):
    """Key-value cache of `slots` requests of at most `limit` tokens. Call `fill` or `step` before the forward that it
    is meant for."""

    def __init__(self, slots: int, limit: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.limit = limit
        self.length = FIRST_LENGTH
        self.keys: list[Tensor] = []  # per layer [slots, kv_heads, length, head_dim]
        self.values: list[Tensor] = []
        self._first = 0
        self._copies: Tensor | None = None
        self._range: Tensor | None = None
        self._rows: Tensor | None = None
        self._places: Tensor | None = None
        self._longest = 0
        self._active = 0

    def fill(self, first: int, width: int, copies: Tensor | None = None) -> None:
        """The next forward's batch of right-padded prompts, `width` tokens wide, goes to the slots from `first` on.

        copies: int64 [slots to fill], which prompt of the batch each slot takes; None: one slot per prompt.
        """
        self._grow(width)
        self._first, self._copies, self._rows = first, copies, None

    def step(self, positions: Tensor, longest: int) -> None:
        """The next forward's batch is one token for each of the first slots, written at its own position.

        positions: int64 [rows]; longest: how many positions attention reads, above all of `positions`.
        """
        self._grow(longest)
        self._places, self._longest, self._active = positions, longest, len(positions)
        if self._range is None or len(self._range) != len(positions):
            self._range = torch.arange(len(positions), device=positions.device)
        self._rows = self._range

    def tree(self, tree: "Tree", places: Tensor, longest: int) -> None:
        """The next forward's batch is one flat row of tokens, written at the given places [tokens] of their slots.

        A place need not be a token's position: alternatives for the same position lie beside each other, and `keep` puts
        the one that was chosen where it belongs.
        """
        self._grow(longest)
        self._rows, self._places, self._longest, self._active = tree.rows, places, longest, tree.slots

    def keep(self, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copies one place of each of the slots `rows` to another place of the same slot."""
        for kept in (*self.keys, *self.values):
            kept[rows, :, targets] = kept[rows, :, sources]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores [batch, kv_heads, time, head_dim] and returns what these queries attend to."""
        while len(self.keys) <= layer_idx:
            # Zeros, not empty memory: a masked position has weight 0, and 0 times a stray NaN is NaN.
            self.keys.append(key_states.new_zeros(self.slots, key_states.shape[1], self.length, key_states.shape[3]))
            self.values.append(
                value_states.new_zeros(self.slots, value_states.shape[1], self.length, value_states.shape[3])
            )
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._rows is not None:
            # [rows, kv_heads, 1, d] of a step, or [1, kv_heads, tokens, d] of a tree: [tokens, kv_heads, d] either way
            keys[self._rows, :, self._places] = key_states.transpose(1, 2).flatten(0, 1)
            values[self._rows, :, self._places] = value_states.transpose(1, 2).flatten(0, 1)
            return keys[: self._active, :, : self._longest], values[: self._active, :, : self._longest]
        for kept, new in ((keys, key_states), (values, value_states)):
            new = new if self._copies is None else new[self._copies]
            kept[self._first : self._first + len(new), :, : new.shape[2]] = new
        return key_states, value_states

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies the first `length` positions of slots `sources` to slots `targets`; no slot is both."""
        for kept in (*self.keys, *self.values):
            for source, target in zip(sources, targets, strict=True):
                kept[target, :, :length] = kept[source, :, :length]

    def _grow(self, length: int) -> None:
        if length <= self.length:
            return
        old, self.length = self.length, max(read_length(length), min(2 * self.length, read_length(self.limit)))
        for side in (self.keys, self.values):
            for layer, kept in enumerate(side):
                side[layer] = kept.new_zeros(self.slots, kept.shape[1], self.length, kept.shape[3])
                side[layer][:, :, :old] = kept


def read_length(longest: int) -> int:
    """How many positions to read when the longest row has `longest`."""
    return -(-longest // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Tree:
    """Whose the tokens of one flat row are: int64 [tokens] each, the slot, and the token's number among those of its slot.

    slots: one more than the last slot; width: how many tokens the slot has that has most.
    """

    rows: Tensor
    index: Tensor
    slots: int
    width: int

    @classmethod
    def of(cls, rows: Tensor, index: Tensor) -> "Tree":
        last, most = torch.stack((rows.max(), index.max())).tolist()
        return cls(rows, index, last + 1, most + 1)


class DecodeMasks:
    """What each row of a decoding step may attend to: itself and before, and in sliding-window layers no further than
    the window.

    Errors: UserError naming `model` for a model whose layers keep something else than keys and values of past tokens.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.window: int | None = getattr(config, "sliding_window", None)
        self.kinds = set(
            getattr(config, "layer_types", None) or ["sliding_attention" if self.window else "full_attention"]
        )
        foreign = self.kinds - {"full_attention", "sliding_attention"}
        if getattr(model, "_is_stateful", False):
            foreign.add("a recurrent state")
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # out of a PEFT wrapper
        if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(type(plain).forward).parameters:
            foreign.add("positions that are not given as position_ids")
        if foreign:
            raise UserError(
                f"model: {type(plain).__name__} has {', '.join(sorted(foreign))}; "
                "a slot cache needs layers of plain attention with given positions"
            )
        self.hidden = torch.finfo(model.dtype).min
        self.dtype = model.dtype
        self.groups: int = config.num_attention_heads // getattr(
            config, "num_key_value_heads", config.num_attention_heads
        )

    def __call__(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Additive masks [rows, 1, 1, length], one or one per kind of layer, as transformers takes them."""
        masks = {}
        for kind in self.kinds:
            seen = self._seen(kind, positions, positions, length)
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(~seen, self.hidden)
            masks[kind] = mask[:, None, None]
        return masks if len(masks) > 1 else masks.popitem()[1]

    def tree(
        self, tree: Tree, positions: Tensor, ends: Tensor, places: Tensor, length: int
    ) -> Tensor | dict[str, Tensor]:
        """Additive masks of a tree [slots, 1, width * groups, length], as `_tree_attention` reads them: the places up to
        `ends`, where places are positions, and a token's own place. positions, ends, places: int64 [tokens]."""
        masks = {}
        for kind in self.kinds:
            seen = self._seen(kind, positions, ends, length).scatter_(1, places.unsqueeze(1), True)
            mask = torch.zeros(tree.slots, tree.width, length, dtype=self.dtype, device=seen.device)
            mask[tree.rows, tree.index] = mask.new_zeros(seen.shape).masked_fill_(~seen, self.hidden)
            masks[kind] = mask.repeat_interleave(self.groups, 1).unsqueeze(1)
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _seen(self, kind: str, positions: Tensor, ends: Tensor, length: int) -> Tensor:
        places = torch.arange(length, device=positions.device)
        seen = places <= ends.unsqueeze(1)
        if kind == "sliding_attention" and self.window:
            seen &= positions.unsqueeze(1) - places < self.window
        return seen


def _decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query per row. The queries that share a key-value head stand where time would: no head is ever copied."""
    rows, heads, _time, _dim = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], -1)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register("posttrain_decode", _decode_attention)


def _tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    *,
    tree: Tree,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, heads, tokens, d] against the slots [slots, kv_heads, longest, d]; attention_mask: of `DecodeMasks.tree`.

    Only here are the tokens padded to the slot that has most of them; every other layer sees them as they are. Query
    heads that share a key-value head stand beside the queries, as in `_decode_attention`.
    """
    heads, tokens, dim = query.shape[1:]
    kv_heads, width = key.shape[1], tree.width
    groups = heads // kv_heads
    grouped = query[0].view(kv_heads, groups, tokens, dim).permute(2, 0, 1, 3)  # [tokens, kv_heads, groups, d]
    padded = query.new_zeros(tree.slots, width, kv_heads, groups, dim)
    padded[tree.rows, tree.index] = grouped
    output = nn.functional.scaled_dot_product_attention(
        padded.permute(0, 2, 1, 3, 4).reshape(tree.slots, kv_heads, width * groups, dim),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    output = output.view(tree.slots, kv_heads, width, groups, dim)[tree.rows, :, tree.index]
    return output.reshape(1, tokens, heads, dim), None


AttentionInterface.register("posttrain_tree", _tree_attention)


@contextmanager
def decode_attention(model: Any) -> Iterator[None]:
    """Within, one-token forwards of `model` read grouped key-value heads in place.

    transformers repeats them for every query head once a mask is given: measured, 20 times the cost of attention
    itself. A model on `eager` attention keeps it: it may have what no fused kernel knows (soft caps, sinks).
    """
    if model.config.get_text_config()._attn_implementation == "eager":
        yield
        return
    with _attention(model, "posttrain_decode"):
        yield


@contextmanager
def tree_attention(model: Any) -> Iterator[None]:
    """Within, forwards of `model` are over one flat row of tokens and take the argument `tree`."""
    with _attention(model, "posttrain_tree"):
        yield


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual

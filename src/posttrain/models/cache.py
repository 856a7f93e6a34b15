"""The cache of keys and values for decoding, which is written in place and never copied as a whole.

Rows of similar capacity share a shelf: one tensor [blocks, places, K, block, D] per layer. The batch of a forward holds the
decoding rows first, one token each, then the packed prompts of rows that join. Decoding rows read their shelf; prompts fill it.

    o_r = softmax(scale K_r q_r) V_r     over the tokens of row r; on a CPU by `kernels/cpu/bindings.py`, otherwise as two
                                         batched products that read K_r and V_r in place

On a CPU a block holds 64 tokens. Batched products need the longest rows first, and compute in each block only the places of
rows that reach it. The G query heads of a key/value head form one product, so keys are not repeated. The numbers of keys and
rows are rounded up to a few sizes, because a new shape costs more than padding.

R: rows computed, B: blocks with keys seen, K: key/value heads, G: query heads of each, D: head width, S: keys seen,
N: tokens written.
"""

import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels import Extras as Extras
from posttrain.kernels import Reading as Reading

# Tokens of one block of keys or values on a CPU; keys seen are rounded up to it everywhere.
BLOCK = 64

_addresses = itertools.count()


def new_address() -> int:
    """A process-wide unique number for the tensors that a recorded forward reads. Memory addresses are reused; it is not."""
    return next(_addresses)


def bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers, by a model's configuration."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    layers = config.get("num_hidden_layers") or config["num_layers"]
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * width * dtype.itemsize)


# The index of each layer, and the shapes of its keys and values.
Shapes = tuple[tuple[int, tuple[torch.Size, ...]], ...]


class CachedTokens(NamedTuple):
    """A copy of keys and values [K, tokens, D] of some tokens of a row. All layers lie in one flat tensor, because many small
    tensors would waste memory."""

    numbers_X: Tensor
    layers: Shapes


class Shelf:
    """Keys and values of rows of at most `capacity` tokens, in blocks of `block` tokens."""

    def __init__(self, places: int, capacity: int, device: torch.device) -> None:
        self.places, self.capacity = places, capacity
        # Number of leading places that a row has ever used.
        self.used = 0
        self.block = capacity if device.type == "cuda" else min(capacity, BLOCK)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        # Changes whenever the tensors are replaced.
        self.address = new_address()

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of one layer, allocated at first use, when the shapes are known. They start as zeros, because a masked
        key must be finite."""
        if index not in self._layers:
            shape = (self.capacity // self.block, self.places, like.shape[0], self.block, like.shape[-1])
            self._layers[index] = (zeros(shape, like), zeros(shape, like))
        return self._layers[index]

    def layers(self) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """The tensors of all allocated layers."""
        return list(self._layers.items())

    def write(self, layer: int, k: Tensor, v: Tensor, place_N: Tensor, position_N: Tensor, token_N: Tensor | slice) -> None:
        """Write packed token `token_N` of k and v [K, T, D] as token `position_N` of the row at `place_N`."""
        block_N: Tensor | int = 0
        if self.block < self.capacity:
            block_N = position_N // self.block
            position_N = position_N - block_N * self.block
        for cache, new in zip(self.layer(layer, k), (k, v), strict=True):
            cache[block_N, place_N, :, position_N] = new[:, token_N].transpose(0, 1)

    def put(self, place: int, position: int, cached: CachedTokens) -> None:
        """Write cached tokens to one row, starting at `position`. They must fit into one block."""
        block, inside = divmod(position, self.block)
        start = 0
        for layer, shapes in cached.layers:
            parts = []
            for shape in shapes:
                parts.append(cached.numbers_X[start : start + math.prod(shape)].view(shape))
                start += math.prod(shape)
            for tensor, part in zip(self.layer(layer, parts[0]), parts, strict=True):
                tensor[block, place, :, inside : inside + part.shape[1]] = part

    def take(self, place: int, position: int, length: int) -> CachedTokens:
        """Copy tokens of one row. They must lie in one block."""
        block, inside = divmod(position, self.block)
        slices = [
            (layer, [tensor[block, place, :, inside : inside + length] for tensor in pair])
            for layer, pair in self._layers.items()
        ]
        numbers_X = torch.cat([part.reshape(-1) for _, parts in slices for part in parts])
        return CachedTokens(numbers_X, tuple((layer, tuple(part.shape for part in parts)) for layer, parts in slices))

    def clear(self, places: Sequence[int], length: int) -> None:
        """Set the first tokens of rows to zero if their keys or values may not be finite: a masked key must be finite."""
        blocks = -(-length // self.block)
        for pair in self._layers.values():
            for tensor in pair:
                tensor[:blocks, list(places)] = 0

    def beginning(self, layer: int, place: int, length: int) -> tuple[Tensor, Tensor]:
        """The first tokens of one row in one layer [K, length, D]."""
        blocks = -(-length // self.block)
        keys, values = (x[:blocks, place].transpose(0, 1).flatten(1, 2)[:, :length] for x in self._layers[layer])
        return keys, values

    def grow(self, places: int, length: int) -> None:
        """Allocate more places, and copy the existing rows, of at most `length` tokens each."""
        blocks = -(-length // self.block)
        grown = {}
        for index, pair in self._layers.items():
            keys, values = (zeros((x.shape[0], places, *x.shape[2:]), x) for x in pair)
            for new, old in zip((keys, values), pair, strict=True):
                new[:blocks, : self.used] = old[:blocks, : self.used]
            grown[index] = (keys, values)
        # Assigned at the end, so that running out of memory leaves the shelf unchanged.
        self._layers, self.places, self.address = grown, places, new_address()

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy rows of at most `length` tokens to other places."""
        blocks = -(-length // self.block)
        for keys, values in self._layers.values():
            for tensor in (keys[:blocks], values[:blocks]):
                source, target = (torch.tensor(places, device=tensor.device) for places in (sources, targets))
                tensor[:, target] = tensor[:, source]


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros with the dtype and device of `like`. On a CPU the pages are mapped only when they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # torch.zeros may write every page, because the allocator reuses memory.
    memory = mmap.mmap(-1, max(1, math.prod(shape) * like.itemsize))
    return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(shape)).view(shape)


class Filling(NamedTuple):
    """Prompts to write to the cache: packed token `source_N` becomes token `position_N` of the row at `place_N`."""

    shelf: Shelf
    place_N: Tensor
    position_N: Tensor
    source_N: Tensor


class Past(NamedTuple):
    """The first `length` tokens of a row, which are cached and visible to the rest of its prompt."""

    shelf: Shelf
    place: int
    length: int


class CacheStep(NamedTuple):
    """Cache reads and writes of one forward, whose first `rows` tokens belong to decoding rows.

    The tokens of `pasts` follow all others of the batch; spans name them as ancestors.
    """

    rows: int
    readings: tuple[Reading, ...]
    fillings: tuple[Filling, ...]
    pasts: tuple[Past, ...] = ()


def with_pasts(step: CacheStep, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [K, T, D], followed by those of the pasts."""
    if not step.pasts:
        return k, v
    pairs = [past.shelf.beginning(layer, past.place, past.length) for past in step.pasts]
    return torch.cat([k, *(keys for keys, _ in pairs)], 1), torch.cat([v, *(values for _, values in pairs)], 1)


def fill(step: CacheStep, layer: int, k: Tensor, v: Tensor) -> None:
    """Write the keys and values [K, T, D] of packed prompts; a prompt that several rows share is written to each row."""
    for filling in step.fillings:
        filling.shelf.write(layer, k, v, filling.place_N, filling.position_N, filling.source_N)

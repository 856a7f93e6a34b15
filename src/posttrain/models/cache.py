"""Attention of decoding rows over a cache of keys and values that is written in place and never copied as a whole.

Rows with similar needs stand on one shelf: a tensor [blocks, places, K, block, D] a layer. One forward may hold decoding
rows, one token each, and behind them the packed prompts of rows that join: the first read their shelf, the second fill it.

    o_r = softmax(scale K_r q_r) V_r     over the tokens of row r, on a CPU by `kernels/cpu/bindings.py`, or else as two batched
                                         products with K_r and V_r as they lie

On a CPU a block holds 64 tokens. By batched products, where the longest rows stand first, only the places of rows that reach
it are computed. The G query heads of a key/value head stand side by side in one product, so no key is repeated. Keys seen and
rows computed are rounded up to few sizes, since a new shape costs more than spare numbers.

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
    """A number for tensors that a recorded forward reads: no others ever have it, as they may have an address in memory."""
    return next(_addresses)


def bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> int:
    """What the keys and values of one token take in all layers, by a model's configuration."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    layers = config.get("num_hidden_layers") or config["num_layers"]
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * width * dtype.itemsize)


# Of each layer its index and the shapes of its keys and values.
Shapes = tuple[tuple[int, tuple[torch.Size, ...]], ...]


class Kept(NamedTuple):
    """Keys and values [K, tokens, D] of some tokens of a row: the numbers of all layers one after the other, since many small
    tensors take more memory than their numbers."""

    numbers_X: Tensor
    layers: Shapes


class Shelf:
    """Keys and values of rows that need at most `capacity` tokens, in blocks of `block` of them."""

    def __init__(self, places: int, capacity: int, device: torch.device) -> None:
        self.places, self.capacity = places, capacity
        # The first places, in which a row has ever stood.
        self.used = 0
        self.block = capacity if device.type == "cuda" else min(capacity, BLOCK)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        # Another one where the tensors are others.
        self.address = new_address()

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of one layer; made at the first use, when the shapes are known. Zeros: a masked key must be finite."""
        if index not in self._layers:
            shape = (self.capacity // self.block, self.places, like.shape[0], self.block, like.shape[-1])
            self._layers[index] = (zeros(shape, like), zeros(shape, like))
        return self._layers[index]

    def layers(self) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """The tensors of all layers that there are."""
        return list(self._layers.items())

    def write(self, layer: int, k: Tensor, v: Tensor, place_N: Tensor, position_N: Tensor, token_N: Tensor | slice) -> None:
        """Packed token `token_N` of k and v [K, T, D] becomes token `position_N` of the row at `place_N`."""
        block_N: Tensor | int = 0
        if self.block < self.capacity:
            block_N = position_N // self.block
            position_N = position_N - block_N * self.block
        for kept, new in zip(self.layer(layer, k), (k, v), strict=True):
            kept[block_N, place_N, :, position_N] = new[:, token_N].transpose(0, 1)

    def put(self, place: int, position: int, kept: Kept) -> None:
        """Write tokens of one row, from `position` on and all in one block."""
        block, inside = divmod(position, self.block)
        start = 0
        for layer, shapes in kept.layers:
            parts = []
            for shape in shapes:
                parts.append(kept.numbers_X[start : start + math.prod(shape)].view(shape))
                start += math.prod(shape)
            for tensor, part in zip(self.layer(layer, parts[0]), parts, strict=True):
                tensor[block, place, :, inside : inside + part.shape[1]] = part

    def take(self, place: int, position: int, length: int) -> Kept:
        """A copy of tokens of one row, all in one block."""
        block, inside = divmod(position, self.block)
        found = [
            (layer, [tensor[block, place, :, inside : inside + length] for tensor in pair])
            for layer, pair in self._layers.items()
        ]
        numbers_X = torch.cat([part.reshape(-1) for _, parts in found for part in parts])
        return Kept(numbers_X, tuple((layer, tuple(part.shape for part in parts)) for layer, parts in found))

    def clear(self, places: Sequence[int], length: int) -> None:
        """Zeros for the first tokens of rows whose keys or values may not be finite: a masked key must be."""
        blocks = -(-length // self.block)
        for pair in self._layers.values():
            for kept in pair:
                kept[:blocks, list(places)] = 0

    def beginning(self, layer: int, place: int, length: int) -> tuple[Tensor, Tensor]:
        """The first tokens of one row in one layer [K, length, D]."""
        blocks = -(-length // self.block)
        keys, values = (x[:blocks, place].transpose(0, 1).flatten(1, 2)[:, :length] for x in self._layers[layer])
        return keys, values

    def grow(self, places: int, length: int) -> None:
        """Make room for more rows; those that are there, of at most `length` tokens, are copied once."""
        blocks = -(-length // self.block)
        grown = {}
        for index, pair in self._layers.items():
            keys, values = (zeros((x.shape[0], places, *x.shape[2:]), x) for x in pair)
            for new, old in zip((keys, values), pair, strict=True):
                new[:blocks, : self.used] = old[:blocks, : self.used]
            grown[index] = (keys, values)
        # All layers or none, where memory is not enough.
        self._layers, self.places, self.address = grown, places, new_address()

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Put rows, of at most `length` tokens, into other places."""
        blocks = -(-length // self.block)
        for keys, values in self._layers.values():
            for tensor in (keys[:blocks], values[:blocks]):
                source, target = (torch.tensor(places, device=tensor.device) for places in (sources, targets))
                tensor[:, target] = tensor[:, source]


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the type of another tensor, at its device. On a CPU the system gives memory only where they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # torch would write them, and so would an allocator that gives memory again which it had before.
    memory = mmap.mmap(-1, max(1, math.prod(shape) * like.itemsize))
    return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(shape)).view(shape)


class Filling(NamedTuple):
    """Prompts that move in: packed token `source_N` becomes token `position_N` of the row at `place_N`."""

    shelf: Shelf
    place_N: Tensor
    position_N: Tensor
    source_N: Tensor


class Past(NamedTuple):
    """The first `length` tokens of a row, which are cached and which the rest of its prompt sees."""

    shelf: Shelf
    place: int
    length: int


class CacheStep(NamedTuple):
    """What one forward does with the cache; its first `rows` tokens are those of decoding rows.

    The tokens of `pasts` stand behind all others, where spans name them as ancestors.
    """

    rows: int
    readings: tuple[Reading, ...]
    fillings: tuple[Filling, ...]
    pasts: tuple[Past, ...] = ()


def with_pasts(step: CacheStep, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [K, T, D] with those of the pasts behind them."""
    if not step.pasts:
        return k, v
    pairs = [past.shelf.beginning(layer, past.place, past.length) for past in step.pasts]
    return torch.cat([k, *(keys for keys, _ in pairs)], 1), torch.cat([v, *(values for _, values in pairs)], 1)


def fill(step: CacheStep, layer: int, k: Tensor, v: Tensor) -> None:
    """Keep the keys and values [K, T, D] of packed prompts; a prompt that several rows share is written for each."""
    for filling in step.fillings:
        filling.shelf.write(layer, k, v, filling.place_N, filling.position_N, filling.source_N)

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
from torch.nn import functional

from posttrain.kernels.cpu import bindings

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


def attends_alone(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention reads each row's keys by itself and no further than its length, by a model's configuration."""
    return not config.get("attn_logit_softcapping") and bindings.able(torch.empty(0, dtype=dtype, device=device))


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


class Reading(NamedTuple):
    """Decoding rows of one shelf: tokens [start, start + rows) of the batch stand for its first places.

    Of these only the places `place_N` hold a row, `length_N` tokens long before this one, which is `token_N` of the batch.
    (In a steady step all of them do; `generate/graph_decoding.py`.)
    Rows that see keys of block b stand on its first `rows_B[b]` places.
    """

    shelf: Shelf
    start: int
    rows: int
    place_N: Tensor
    length_N: Tensor
    token_N: Tensor | slice
    seen: int
    rows_B: tuple[int, ...]
    # Which keys each row sees, by window; kept for the other layers.
    kept: dict[int, Tensor]

    def bias(self, window: int, dtype: torch.dtype) -> Tensor:
        """[R, S]: 0 where a key is seen, -inf where not. A place without a row sees its first key."""
        if window not in self.kept:
            mask_RS = self._seen(window)
            zeros_RS = torch.zeros(mask_RS.shape, dtype=dtype, device=mask_RS.device)
            self.kept[window] = zeros_RS.masked_fill_(~mask_RS, float("-inf"))
        return self.kept[window]

    def _seen(self, window: int) -> Tensor:
        device = self.place_N.device
        length_R1 = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        length_R1[self.place_N, 0] = self.length_N
        key_S = torch.arange(self.seen, device=device)[None]
        seen = key_S <= length_R1
        return seen & (key_S > length_R1 - window) if window else seen


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


class Extras(NamedTuple):
    """What some models add to plain attention: a sliding window (0 for none), a soft cap of the scores, and sinks: for each
    head the score [H] of a key whose value is zero."""

    window: int = 0
    softcap: float | None = None
    sinks_H: Tensor | None = None


def softmax_with_sinks(scores: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores [H, ..., S], sinks among them, which take their share away."""
    if sinks_H is None:
        return torch.softmax(scores, -1)
    sinks = sinks_H.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


def decode(q: Tensor, k: Tensor, v: Tensor, layer: int, step: CacheStep, *, scale: float, extra: Extras) -> Tensor:
    """One new token a row: append its key and value, attend to the row's cache. q [H, T, D] -> [H, step.rows, D]."""
    plain = extra.softcap is None and extra.sinks_H is None
    if plain and bindings.able(q) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return _compiled(q, k, v, layer, step, scale, extra.window)
    parts = []
    for reading in step.readings:
        shelf, rows, heads = reading.shelf, reading.rows, len(q)
        shelf.write(layer, k, v, reading.place_N, reading.length_N, reading.token_N)
        keys, values = shelf.layer(layer, k)
        grouped = q[:, reading.start : reading.start + rows].transpose(0, 1).reshape(rows, len(k), heads // len(k), -1)
        if plain and q.is_cuda:
            out = functional.scaled_dot_product_attention(
                grouped, keys[0, :rows, :, : reading.seen], values[0, :rows, :, : reading.seen],
                attn_mask=reading.bias(extra.window, q.dtype)[:, None, None], scale=scale,
            )  # fmt: skip
        else:
            out = _attend(grouped, keys, values, reading, scale, extra)
        parts.append(out.reshape(rows, heads, -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _compiled(q: Tensor, k: Tensor, v: Tensor, layer: int, step: CacheStep, scale: float, window: int) -> Tensor:
    """In one pass over the keys and values of each row, and no further than its length."""
    # Places without a row find zeros.
    out_RHD = q.new_zeros((step.rows, len(q), q.shape[-1]))
    for reading in step.readings:
        assert isinstance(reading.token_N, Tensor)
        where = reading.place_N, reading.length_N, reading.token_N
        bindings.attend(q, k, v, *reading.shelf.layer(layer, k), where, scale, window, out_RHD)
    return out_RHD.transpose(0, 1)


def _attend(q_RKGD: Tensor, keys: Tensor, values: Tensor, reading: Reading, scale: float, extra: Extras) -> Tensor:
    """Plain products over the blocks [blocks, places, K, block, D] that hold the keys seen.

    The keys stand on the left: only the right side of a product is packed, and here it is the small one. The first places of
    a block are one piece of memory; of pieces of them, products would make copies.
    """
    rows, heads, groups, width = q_RKGD.shape
    size = keys.shape[3]
    q_NDG = q_RKGD.reshape(rows * heads, groups, width).transpose(1, 2)
    # Keys of blocks that a row does not reach are not computed, and masked with the others below.
    scores = q_RKGD.new_zeros((rows * heads, groups, len(reading.rows_B) * size), dtype=torch.float32)
    for b, reached in enumerate(reading.rows_B):
        count = reached * heads
        part = torch.bmm(keys[b, :reached].view(count, size, width), q_NDG[:count])
        scores[:count, :, b * size : (b + 1) * size] = part.transpose(1, 2)
    if extra.softcap is not None:
        scores, scale = torch.tanh(scores * (scale / extra.softcap)), extra.softcap
    scores = scores.view(rows, heads * groups, -1)[..., : reading.seen]
    # Adding the mask takes a sixth of the time of filling it in.
    scores = torch.add(reading.bias(extra.window, torch.float32)[:, None], scores, alpha=scale)
    if extra.sinks_H is None:
        weights = torch.softmax(scores, -1)
    else:
        weights = softmax_with_sinks(scores.transpose(0, 1), extra.sinks_H).transpose(0, 1)
    weights = weights.to(q_RKGD.dtype).reshape(rows * heads, groups, -1)
    out = q_RKGD.new_zeros((rows * heads, groups, width), dtype=torch.float32)
    for b, reached in enumerate(reading.rows_B):
        count = reached * heads
        part = weights[:count, :, b * size : (b + 1) * size]
        out[:count] += torch.bmm(part, values[b, :reached].view(count, size, width)[:, : part.shape[2]])
    return out.to(q_RKGD.dtype).view(q_RKGD.shape)

"""Attention of decoding rows over a cache of keys and values that is written in place and never copied as a whole.

Rows with similar needs stand on one shelf: a tensor [places, K, capacity, D] a layer. One forward may hold decoding rows, one
token each, and behind them the packed prompts of rows that join: the first read their shelf, the second fill their places.

    o_r = softmax(scale K_r q_r) V_r     over the tokens of row r, on a CPU as two batched products with K_r and V_r as they lie

The G query heads of a key/value head stand side by side in one product, so no key is repeated. Keys seen and rows computed are
rounded up to few sizes, since a new shape costs more than spare numbers.

R: rows computed, K: key/value heads, G: query heads of each, D: head width, S: keys seen, N: tokens written.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Keys seen are rounded up to multiples of this.
KEYS_ROUND = 32


def bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> int:
    """What the keys and values of one token take in all layers, by a model's configuration."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width * dtype.itemsize)


class Shelf:
    """Keys and values of rows that need at most `capacity` tokens."""

    def __init__(self, places: int, capacity: int) -> None:
        self.places, self.capacity = places, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of one layer; made at the first use, when the shapes are known. Zeros: a masked key must be finite."""
        if index not in self._layers:
            shape = (self.places, like.shape[0], self.capacity, like.shape[-1])
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def grow(self, places: int) -> None:
        """Make room for more rows; those that are there are copied once."""
        for index, pair in self._layers.items():
            keys, values = (x.new_zeros((places, *x.shape[1:])) for x in pair)
            keys[: self.places], values[: self.places] = pair
            self._layers[index] = (keys, values)
        self.places = places

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Put rows, of at most `length` tokens, into other places."""
        for keys, values in self._layers.values():
            for tensor in (keys, values):
                source, target = (torch.tensor(places, device=tensor.device) for places in (sources, targets))
                tensor[target, :, :length] = tensor[source, :, :length]


class Reading(NamedTuple):
    """Decoding rows of one shelf: tokens [start, start + rows) of the batch stand for its first places.

    Of these only the places `place_N` hold a row, which is `length_N` tokens long before this one.
    """

    shelf: Shelf
    start: int
    rows: int
    place_N: Tensor
    length_N: Tensor
    seen: int
    # Which keys each row sees, by window; made at the first use and kept for the other layers.
    masks: dict[int, Tensor]

    def mask(self, window: int) -> Tensor:
        """[R, S]; a place without a row sees its first key."""
        if window not in self.masks:
            device = self.place_N.device
            length_R1 = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
            length_R1[self.place_N, 0] = self.length_N
            key_S = torch.arange(self.seen, device=device)[None]
            seen = key_S <= length_R1
            self.masks[window] = seen & (key_S > length_R1 - window) if window else seen
        return self.masks[window]


class Filling(NamedTuple):
    """Prompts that move in: packed token `source_N` becomes token `position_N` of the row at `place_N`."""

    shelf: Shelf
    place_N: Tensor
    position_N: Tensor
    source_N: Tensor


class CacheStep(NamedTuple):
    """What one forward does with the cache; its first `rows` tokens are those of decoding rows."""

    rows: int
    readings: tuple[Reading, ...]
    fillings: tuple[Filling, ...]


def fill(step: CacheStep, layer: int, k: Tensor, v: Tensor) -> None:
    """Keep the keys and values [K, T, D] of packed prompts; a prompt that several rows share is written for each."""
    for filling in step.fillings:
        keys, values = filling.shelf.layer(layer, k)
        keys[filling.place_N, :, filling.position_N] = k[:, filling.source_N].transpose(0, 1)
        values[filling.place_N, :, filling.position_N] = v[:, filling.source_N].transpose(0, 1)


def decode(
    q: Tensor, k: Tensor, v: Tensor, layer: int, step: CacheStep, *, scale: float, window: int, softcap: float | None
) -> Tensor:
    """One new token a row: append its key and value, attend to the row's cache. q [H, T, D] -> [H, step.rows, D]."""
    parts = []
    for reading in step.readings:
        keys, values = reading.shelf.layer(layer, k)
        token_N = reading.place_N + reading.start
        keys[reading.place_N, :, reading.length_N] = k[:, token_N].transpose(0, 1)
        values[reading.place_N, :, reading.length_N] = v[:, token_N].transpose(0, 1)
        rows, heads = slice(reading.start, reading.start + reading.rows), len(q)
        grouped = q[:, rows].transpose(0, 1).reshape(reading.rows, len(k), heads // len(k), -1)
        seen_keys, seen_values = keys[: reading.rows, :, : reading.seen], values[: reading.rows, :, : reading.seen]
        if softcap is None and q.is_cuda:
            mask = reading.mask(window)[:, None, None]
            out = functional.scaled_dot_product_attention(grouped, seen_keys, seen_values, attn_mask=mask, scale=scale)
        else:
            out = _attend(grouped, seen_keys, seen_values, reading.mask(window), scale, softcap)
        parts.append(out.reshape(reading.rows, heads, -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _attend(q_RKGD: Tensor, k_RKSD: Tensor, v_RKSD: Tensor, seen_RS: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Plain products. The keys stand on the left: a small right side is what gets packed for the product."""
    rows, heads, groups, width = q_RKGD.shape
    flat = (rows * heads, -1, width)
    scores_NSG = torch.bmm(k_RKSD.reshape(flat), q_RKGD.reshape(flat).transpose(1, 2))
    scores = scores_NSG.transpose(1, 2).contiguous().float().mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(rows, heads * groups, -1).masked_fill_(~seen_RS[:, None], float("-inf"))
    weights = torch.softmax(scores, -1).to(q_RKGD.dtype)
    return torch.bmm(weights.view(rows * heads, groups, -1), v_RKSD.reshape(flat)).view(q_RKGD.shape)

"""The table of segments of one packed batch, and the cache of a decoding batch: what the attention functions read.

T: packed tokens, K: key/value heads, D: head width, L: segment length, S: keys seen, R: rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Tokens [start, start + length) of the packed batch, and the spans of all ancestors, oldest first."""

    start: int
    length: int
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def keys(self) -> int:
        """How many keys the last token of the span sees."""
        return self.length + sum(length for _, length in self.ancestors)


class KeyValueCache:
    """Keys and values of the rows of a decoding batch, preallocated: [R, K, capacity, D] a layer."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths_R = torch.zeros(rows, dtype=torch.long)
        # The row that each span of a prefill goes to.
        self.filling: list[int] = list(range(rows))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors of one layer; made at the first use, when the shapes are known."""
        if index not in self._layers:
            shape = (self.rows, like.shape[0], self.capacity, like.shape[-1])
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def keep(self, rows_R: Tensor) -> None:
        """Drop all rows but these, in this order."""
        self.rows = len(rows_R)
        self.lengths_R = self.lengths_R[rows_R]
        self._layers = {i: (k[rows_R], v[rows_R]) for i, (k, v) in self._layers.items()}


class Segments:
    """The table of segments of one packed batch, handed to the attention function through the model's forward."""

    def __init__(self, spans: tuple[Span, ...], *, cache: KeyValueCache | None = None, decoding: bool = False) -> None:
        self.spans, self.cache, self.decoding = spans, cache, decoding
        self._invisible: dict[tuple[int, int, int], Tensor] = {}
        # Made at the first use and kept for the other layers: masks of decoding rows by window, the GPU kernel's table.
        self.masks: dict[int, Tensor] = {}
        self.varlen: Any = None

    def invisible(self, length: int, keys: int, window: int, device: torch.device) -> Tensor:
        """Which of `keys` keys each of the last `length` of their tokens must not see [L, S]; made once a batch and shape."""
        key = (length, keys, window)
        if key not in self._invisible:
            query_L = torch.arange(keys - length, keys, device=device)[:, None]
            key_S = torch.arange(keys, device=device)[None]
            later = key_S > query_L
            self._invisible[key] = later | (key_S <= query_L - window) if window else later
        return self._invisible[key]

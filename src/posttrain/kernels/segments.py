"""The data structures of attention: the spans of a packed batch, and the rows of a cache.

L: segment length, S: keys seen, R: rows computed, N: rows that decode, B: blocks with keys seen, K: key/value heads, D: width.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Span(NamedTuple):
    """Tokens [start, start + length) of the packed batch, and the spans of all ancestors, oldest first."""

    start: int
    length: int
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def keys(self) -> int:
        """Number of keys that the last token of the span sees."""
        return self.length + sum(length for _, length in self.ancestors)


class SegmentTable(Protocol):
    """The spans of one packed batch, and a store for the tables that kernels derive from them, shared by all layers."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans, in the order of their tokens."""

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make()` for this key, computed once."""


def pieces(span: Span) -> tuple[tuple[int, int], ...]:
    """(start, length) of a span's ancestors and of itself, in the order of their tokens."""
    return (*span.ancestors, (span.start, span.length))


def gather(x: Tensor, span: Span) -> Tensor:
    """The rows of x that belong to the span's ancestors and to the span [K, S, D]."""
    if not span.ancestors:
        return x[:, span.start : span.start + span.length]
    return torch.cat([x[:, start : start + length] for start, length in pieces(span)], dim=1)


def invisible(segments: SegmentTable, length: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask [L, S] of the keys that each of the last `length` of `keys` tokens must not see; cached per batch and shape."""

    def make() -> Tensor:
        query_L = torch.arange(keys - length, keys, device=device)[:, None]
        key_S = torch.arange(keys, device=device)[None]
        later = key_S > query_L
        return later | (key_S <= query_L - window) if window else later

    return segments.cached(("invisible", length, keys, window), make)


class Extras(NamedTuple):
    """Extensions of attention that some models have: a sliding window (0: none), a soft cap of the scores, and sinks: for
    each head the score [H] of a key whose value is zero."""

    window: int = 0
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether there is no extension other than a window."""
        return self.softcap is None and self.sinks_H is None


class CacheShelf(Protocol):
    """Keys and values of rows, in tensors [blocks, places, K, block, D] a layer."""

    places: int
    block: int
    # Changes whenever the tensors are replaced.
    address: int

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, allocated at first use with the heads and width of `like` [K, T, D]."""

    def layers(self) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """The tensors of all allocated layers."""

    def write(self, layer: int, k: Tensor, v: Tensor, place_N: Tensor, position_N: Tensor, token_N: Tensor | slice) -> None:
        """Write packed token `token_N` of k and v [K, T, D] as token `position_N` of the row at `place_N`."""


class Reading(NamedTuple):
    """Decoding rows of one shelf: tokens [start, start + rows) of the batch correspond to its first places.

    Only the places `place_N` hold a row. The row has `length_N` tokens before this one, which is `token_N` of the batch.
    (In a step of fixed form all places hold a row; `generate/graph_decoding.py`.)
    The rows that see keys of block b are on the first `rows_B[b]` places.
    """

    shelf: CacheShelf
    start: int
    rows: int
    place_N: Tensor
    length_N: Tensor
    token_N: Tensor | slice
    seen: int
    rows_B: tuple[int, ...]
    # The mask of the keys that each row sees, by window; shared by all layers.
    masks: dict[int, Tensor]

    def bias(self, window: int, dtype: torch.dtype) -> Tensor:
        """[R, S]: 0 where a key is seen, otherwise -inf. A place without a row sees its first key."""
        if window not in self.masks:
            mask_RS = self._seen(window)
            zeros_RS = torch.zeros(mask_RS.shape, dtype=dtype, device=mask_RS.device)
            self.masks[window] = zeros_RS.masked_fill_(~mask_RS, float("-inf"))
        return self.masks[window]

    def _seen(self, window: int) -> Tensor:
        device = self.place_N.device
        length_R1 = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        length_R1[self.place_N, 0] = self.length_N
        key_S = torch.arange(self.seen, device=device)[None]
        seen = key_S <= length_R1
        return seen & (key_S > length_R1 - window) if window else seen


class DecodingSegments(SegmentTable, Protocol):
    """The segments of a step that may also read a cache."""

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The decoding rows by shelf; empty without a cache."""

    def with_readings(self, readings: tuple[Reading, ...]) -> "DecodingSegments":
        """A copy of this step without spans that reads these rows."""

"""What attention reads beside numbers: the spans of a packed batch, and the rows of a cache.

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
        """How many keys the last token of the span sees."""
        return self.length + sum(length for _, length in self.ancestors)


class SegmentTable(Protocol):
    """The spans of one packed batch, and a store for what a kernel derives from them, which all layers share."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans, in the order of their tokens."""

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when this key was first asked for."""


def pieces(span: Span) -> tuple[tuple[int, int], ...]:
    """(start, length) of a span's ancestors and of itself, in the order in which their tokens follow each other."""
    return (*span.ancestors, (span.start, span.length))


def gather(x: Tensor, span: Span) -> Tensor:
    """Rows of the span and its ancestors [K, S, D]."""
    if not span.ancestors:
        return x[:, span.start : span.start + span.length]
    return torch.cat([x[:, start : start + length] for start, length in pieces(span)], dim=1)


def invisible(segments: SegmentTable, length: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which of `keys` keys each of the last `length` of their tokens must not see [L, S]; made once a batch and shape."""

    def make() -> Tensor:
        query_L = torch.arange(keys - length, keys, device=device)[:, None]
        key_S = torch.arange(keys, device=device)[None]
        later = key_S > query_L
        return later | (key_S <= query_L - window) if window else later

    return segments.cached(("invisible", length, keys, window), make)


class Extras(NamedTuple):
    """What some models add to plain attention: a sliding window (0 for none), a soft cap of the scores, and sinks: for each
    head the score [H] of a key whose value is zero."""

    window: int = 0
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but a window."""
        return self.softcap is None and self.sinks_H is None


class CacheShelf(Protocol):
    """Keys and values of rows, in tensors [blocks, places, K, block, D] a layer."""

    places: int
    block: int
    # Another number where the tensors are others.
    address: int

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer; made at the first use, with heads and width as of `like` [K, T, D]."""

    def layers(self) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """The tensors of all layers that there are."""

    def write(self, layer: int, k: Tensor, v: Tensor, place_N: Tensor, position_N: Tensor, token_N: Tensor | slice) -> None:
        """Packed token `token_N` of k and v [K, T, D] becomes token `position_N` of the row at `place_N`."""


class Reading(NamedTuple):
    """Decoding rows of one shelf: tokens [start, start + rows) of the batch stand for its first places.

    Of these only the places `place_N` hold a row, `length_N` tokens long before this one, which is `token_N` of the batch.
    (In a step of fixed form all of them do; `generate/graph_decoding.py`.)
    Rows that see keys of block b stand on its first `rows_B[b]` places.
    """

    shelf: CacheShelf
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


class DecodingSegments(SegmentTable, Protocol):
    """Segments of a step that may also read a cache."""

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The decoding rows, shelf by shelf; none without a cache."""

    def with_readings(self, readings: tuple[Reading, ...]) -> "DecodingSegments":
        """The same step without spans, reading these rows."""

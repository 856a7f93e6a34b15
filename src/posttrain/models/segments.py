"""The table of segments of one packed batch: what the attention functions read.

L: segment length, S: keys seen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.models.cache import CacheStep


class Span(NamedTuple):
    """Tokens [start, start + length) of the packed batch, and the spans of all ancestors, oldest first."""

    start: int
    length: int
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def keys(self) -> int:
        """How many keys the last token of the span sees."""
        return self.length + sum(length for _, length in self.ancestors)


class Segments:
    """The table of segments of one packed batch, handed to the attention function through the model's forward."""

    def __init__(self, spans: tuple[Span, ...], *, step: CacheStep | None = None) -> None:
        # With a cache the spans are those of the tokens behind the decoding rows, and are counted from there.
        self.spans, self.step = spans, step
        # How often attention was asked with a cache.
        self.calls = 0
        self._invisible: dict[tuple[int, int, int], Tensor] = {}
        # The GPU kernel's table, made at the first use and kept for the other layers.
        self.varlen: Any = None
        # The table of the compiled attention on a CPU, likewise.
        self.native: Any = None

    def invisible(self, length: int, keys: int, window: int, device: torch.device) -> Tensor:
        """Which of `keys` keys each of the last `length` of their tokens must not see [L, S]; made once a batch and shape."""
        key = (length, keys, window)
        if key not in self._invisible:
            query_L = torch.arange(keys - length, keys, device=device)[:, None]
            key_S = torch.arange(keys, device=device)[None]
            later = key_S > query_L
            self._invisible[key] = later | (key_S <= query_L - window) if window else later
        return self._invisible[key]

"""The table of segments of one packed batch, which the model's forward passes to the attention function."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from posttrain.kernels import Reading
from posttrain.kernels import Span as Span
from posttrain.models.cache import CacheStep

T = TypeVar("T")


class Segments:
    """The spans of one packed batch, and the cache reads and writes of its forward."""

    def __init__(self, spans: tuple[Span, ...], *, step: CacheStep | None = None) -> None:
        # With a cache, spans cover the tokens after the decoding rows, and their positions count from the first of these.
        self.spans, self.step = spans, step
        # Number of attention calls with a cache.
        self.calls = 0
        self._cached: dict[Hashable, Any] = {}

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make()` for this key, computed once: attention functions derive their tables once a batch."""
        if key not in self._cached:
            self._cached[key] = make()
        table: T = self._cached[key]
        return table

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The decoding rows by shelf; empty without a cache."""
        return () if self.step is None else self.step.readings

    def with_readings(self, readings: tuple[Reading, ...]) -> "Segments":
        """A copy of this step without spans that reads these rows."""
        assert self.step is not None, "only a step with a cache reads rows"
        return Segments((), step=self.step._replace(readings=readings))

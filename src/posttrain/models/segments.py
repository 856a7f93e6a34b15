"""The table of segments of one packed batch, handed to the attention function through the model's forward."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from posttrain.kernels import Reading
from posttrain.kernels import Span as Span
from posttrain.models.cache import CacheStep

T = TypeVar("T")


class Segments:
    """The spans of one packed batch, and what its forward does with the cache."""

    def __init__(self, spans: tuple[Span, ...], *, step: CacheStep | None = None) -> None:
        # With a cache the spans are those of the tokens behind the decoding rows, and are counted from there.
        self.spans, self.step = spans, step
        # How often attention was asked with a cache.
        self.calls = 0
        self._cached: dict[Hashable, Any] = {}

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when this key was first asked for: tables that an attention function derives once a batch."""
        if key not in self._cached:
            self._cached[key] = make()
        found: T = self._cached[key]
        return found

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The decoding rows, shelf by shelf; none without a cache."""
        return () if self.step is None else self.step.readings

    def with_readings(self, readings: tuple[Reading, ...]) -> "Segments":
        """The same step without spans, reading these rows."""
        assert self.step is not None, "only a step with a cache reads rows"
        return Segments((), step=self.step._replace(readings=readings))

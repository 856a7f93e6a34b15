"""Metrics in Prometheus's text format. Only this file imports prometheus_client.

Every application has its own registry. A label is the name of a served policy and never text from a client, so the number of
series is bounded. The series of an unloaded policy are removed when its last request ends.
"""

import collections
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
# The label of requests for a policy that is not served.
UNKNOWN = "unknown"
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0)
_PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics:
    """Counters, gauges and histograms of one server. `read` maps the name of a gauge to its description and its function."""

    def __init__(self, read: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = registry = CollectorRegistry()
        label = ["model"]
        self._requests = Counter(
            "posttrain_requests", "Requests by policy and HTTP status.", ["model", "status"], registry=registry
        )
        self._input = Counter("posttrain_prompt_tokens", "Prompt tokens.", label, registry=registry)
        self._output = Counter("posttrain_completion_tokens", "Completion tokens.", label, registry=registry)
        self._first_token_seconds = Histogram(
            "posttrain_time_to_first_token_seconds", "Time from the request to its first token.", label,
            buckets=_FIRST_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self._token_seconds = Histogram(
            "posttrain_time_per_output_token_seconds", "Time of a completion divided by its tokens.", label,
            buckets=_PER_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self._cached = Counter(
            "posttrain_cached_prompt_tokens", "Prompt tokens found in the prefix cache.", label, registry=registry
        )
        self._open = Gauge("posttrain_completions_open", "Completions that wait or run.", label, registry=registry)
        self._waiting = Gauge(
            "posttrain_completions_waiting", "Open completions without a token yet.", label, registry=registry
        )
        for name, (about, value) in read.items():
            Gauge(name, about, registry=registry).set_function(value)
        # Requests in progress by policy, and unloaded policies that still have some.
        self._in_progress, self._unloaded = collections.Counter[str](), set[str]()

    def begin(self, model: str) -> None:
        """Count a request in progress."""
        self._in_progress[model] += 1
        self._unloaded.discard(model)

    def end(self, model: str, status: int) -> None:
        """End a request in progress. `status` is its HTTP status, or the one that its stream ended with."""
        self.request(model, status)
        self._in_progress[model] -= 1
        if model in self._unloaded:
            self.forget(model)

    def request(self, model: str, status: int) -> None:
        """Count a finished request."""
        self._requests.labels(model, str(status)).inc()

    def prompt(self, model: str, tokens: int) -> None:
        """Count prompt tokens sent to the engine."""
        self._input.labels(model).inc(tokens)

    def token(self, model: str, seconds: float, *, first: bool) -> None:
        """Count a new token, `seconds` after its request."""
        self._output.labels(model).inc()
        if first:
            self._first_token_seconds.labels(model).observe(seconds)

    def pace(self, model: str, seconds: float) -> None:
        """Record the seconds per token of a finished completion."""
        self._token_seconds.labels(model).observe(seconds)

    def cached_tokens(self, model: str, tokens: int) -> None:
        """Count prompt tokens found in the prefix cache."""
        self._cached.labels(model).inc(tokens)

    def completions(self, model: str, open_change: int, waiting_change: int) -> None:
        """Change the number of open completions, and of those without a token."""
        self._open.labels(model).inc(open_change)
        self._waiting.labels(model).inc(waiting_change)

    def forget(self, model: str) -> None:
        """Remove the series of an unloaded policy, at once or after its last request."""
        if self._in_progress[model]:
            self._unloaded.add(model)
            return
        del self._in_progress[model]
        self._unloaded.discard(model)
        every = (
            self._requests,
            self._input,
            self._output,
            self._first_token_seconds,
            self._token_seconds,
            self._cached,
            self._open,
            self._waiting,
        )
        for metric in every:
            metric.remove_by_labels({"model": model})

    def render(self) -> bytes:
        """The metrics in the text format."""
        return generate_latest(self._registry)

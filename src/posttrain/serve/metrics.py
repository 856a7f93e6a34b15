"""What an operator watches, in Prometheus's text format; the only file that imports prometheus_client.

Every application has a registry of its own. A label is the name of a policy that is served, never a client's word, so
there are as many series as policies; one that is unloaded takes its series along.
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
# Where a request names no policy that is served.
UNKNOWN = "unknown"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters, gauges and histograms of one server. `read` are gauges by name: what they are, and what tells it."""

    def __init__(self, read: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = registry = CollectorRegistry()
        label = ["model"]
        self._requests = Counter("posttrain_requests", "Requests by policy and status.", ["model", "status"], registry=registry)
        self._input = Counter("posttrain_prompt_tokens", "Tokens of prompts.", label, registry=registry)
        self._output = Counter("posttrain_completion_tokens", "Tokens of completions.", label, registry=registry)
        self._first = Histogram(
            "posttrain_time_to_first_token_seconds", "From the request to its first token.", label, buckets=_FIRST,
            registry=registry,
        )  # fmt: skip
        self._each = Histogram(
            "posttrain_time_per_output_token_seconds", "Time of a completion by its tokens.", label, buckets=_EACH,
            registry=registry,
        )  # fmt: skip
        self._rows = Gauge("posttrain_completions_open", "Completions that wait or are in flight.", registry=registry)
        for name, (about, value) in read.items():
            Gauge(name, about, registry=registry).set_function(value)

    def request(self, model: str, status: int) -> None:
        """A request is over; `status` is what it was answered with, or what a stream ended in."""
        self._requests.labels(model, str(status)).inc()

    def prompt(self, model: str, tokens: int) -> None:
        """Prompts went to the engine."""
        self._input.labels(model).inc(tokens)

    def token(self, model: str, seconds: float, *, first: bool) -> None:
        """A token came, `seconds` after its request."""
        self._output.labels(model).inc()
        if first:
            self._first.labels(model).observe(seconds)

    def pace(self, model: str, seconds: float) -> None:
        """Seconds a token of a completion that is done."""
        self._each.labels(model).observe(seconds)

    def rows(self, change: int) -> None:
        """Completions were submitted, or are over."""
        self._rows.inc(change)

    def forget(self, model: str) -> None:
        """A policy is served no longer."""
        for metric in (self._requests, self._input, self._output, self._first, self._each):
            metric.remove_by_labels({"model": model})

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

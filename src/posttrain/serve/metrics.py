"""What an operator watches, in Prometheus's text format; the only file that imports prometheus_client.

Every application has a registry of its own. A label is the name of a policy that is served, never a client's word, so
there are as many series as policies; one that is unloaded takes its series along when its last request is over.
"""

import collections
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
        self._found = Counter("posttrain_cached_prompt_tokens", "Tokens of prompts that were known.", label, registry=registry)
        self._open = Gauge("posttrain_completions_open", "Completions that wait or are in flight.", label, registry=registry)
        self._silent = Gauge("posttrain_completions_waiting", "Of these, those without a token.", label, registry=registry)
        for name, (about, value) in read.items():
            Gauge(name, about, registry=registry).set_function(value)
        # Requests that have begun, and policies that are served no longer but have some.
        self._begun, self._gone = collections.Counter[str](), set[str]()

    def begin(self, model: str) -> None:
        """A request for a policy has begun."""
        self._begun[model] += 1
        self._gone.discard(model)

    def end(self, model: str, status: int) -> None:
        """One that had begun is over; `status` is what it was answered with, or what a stream ended in."""
        self.request(model, status)
        self._begun[model] -= 1
        if model in self._gone:
            self.forget(model)

    def request(self, model: str, status: int) -> None:
        """Count a request."""
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

    def found(self, model: str, tokens: int) -> None:
        """Tokens of a prompt were known from before."""
        self._found.labels(model).inc(tokens)

    def rows(self, model: str, there: int, silent: int) -> None:
        """Completions were submitted or are over, and have their first token."""
        self._open.labels(model).inc(there)
        self._silent.labels(model).inc(silent)

    def forget(self, model: str) -> None:
        """A policy is served no longer."""
        if self._begun[model]:
            self._gone.add(model)
            return
        del self._begun[model]
        self._gone.discard(model)
        every = self._requests, self._input, self._output, self._first, self._each, self._found, self._open, self._silent
        for metric in every:
            metric.remove_by_labels({"model": model})

    def render(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

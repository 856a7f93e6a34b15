"""The client of the race `served`: requests that arrive by chance, and what became of each. Knows no server but by its address.

The load is open: an arrival is sent when it is due, however many of those before it are still being answered, so a slow server
is not asked less. Only where STREAMS are open already it is turned away here, and counted. Times are seconds from the start
of the load; the first token counts from the time at which the request was due.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

STREAMS = 64
# Longer than this between two pieces of an answer, and it has failed.
PATIENCE = 300.0
SHARES = (50, 95, 99)


class Arrival(NamedTuple):
    """A request, when it is due, and whom it asks."""

    due: float
    model: str
    prompt: list[int]


class Answer(NamedTuple):
    """`outcome` is ended, refused (429 or 503), failed or turned away; `times` are those at which text came."""

    due: float
    sent: float
    outcome: str
    reason: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    times: tuple[float, ...] = ()


def arrival_times(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` a second: independent gaps, exponential with mean 1 / rate."""
    chance, times, now = random.Random(seed), [], 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        times.append(now)
    return times


def choose_models(models: Sequence[str], traffic: str, count: int, seed: int) -> list[str]:
    """Whom each request asks: all alike (`even`), or the k-th with weight 1 / k (`zipf`)."""
    weights = [1 / (k + 1) if traffic == "zipf" else 1.0 for k in range(len(models))]
    return random.Random(seed).choices(models, weights, k=count)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that `share` percent of them do not exceed (nearest rank); None where there are none."""
    return sorted(values)[max(0, math.ceil(share / 100 * len(values)) - 1)] if values else None


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Milliseconds at p50, p95 and p99 of seconds."""
    found = {f"p{share}": percentile(values, share) for share in SHARES}
    return {name: None if value is None else round(1000 * value, 1) for name, value in found.items()}


async def ask(http: httpx.AsyncClient, arrival: Arrival, settings: dict[str, Any], start: float) -> Answer:
    """One streamed completion. An answer without its usage or its last event has failed."""
    body = {"model": arrival.model, "prompt": arrival.prompt, "stream": True, "stream_options": {"include_usage": True}}
    sent, times, usage, whole = time.perf_counter() - start, [], {}, False
    try:
        async with http.stream("POST", "/v1/completions", json={**body, **settings}) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome = "refused" if response.status_code in (429, 503) else "failed"
                return Answer(arrival.due, sent, outcome, f"{response.status_code}: {text[:200]}")
            async for line in response.aiter_lines():
                whole = whole or line == "data: [DONE]"
                if whole or not line.startswith("data: "):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Answer(arrival.due, sent, "failed", line[:200])
                if chunk["choices"]:
                    times.append(time.perf_counter() - start)
                usage = chunk.get("usage") or usage
    except httpx.HTTPError as error:
        return Answer(arrival.due, sent, "failed", f"{type(error).__name__} {error}")
    if not whole or not usage:
        return Answer(arrival.due, sent, "failed", "the stream ended early")
    return Answer(arrival.due, sent, "ended", "", usage["prompt_tokens"], usage["completion_tokens"], tuple(times))


async def _load(url: str, plan: Sequence[Arrival], settings: dict[str, Any], streams: int) -> list[Answer]:
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    answers: list[Answer] = []
    running: set[asyncio.Task[Answer]] = set()
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as http:
        start = time.perf_counter()
        for arrival in plan:
            await asyncio.sleep(start + arrival.due - time.perf_counter())
            if len(running) >= streams:
                answers.append(Answer(arrival.due, arrival.due, "turned away", f"{streams} streams are open"))
                continue
            task = asyncio.create_task(ask(http, arrival, settings, start))
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(lambda done: answers.append(done.result()))
        await asyncio.gather(*running)
        await asyncio.sleep(0)  # the callbacks of the last
    return answers


def under_load(
    url: str, plan: Sequence[Arrival], settings: dict[str, Any], *, seconds: float, streams: int = STREAMS
) -> dict[str, Any]:
    """Send a plan and summarise the answers. `settings` are fields that every request has."""
    began = time.process_time(), time.perf_counter()
    answers = asyncio.run(_load(url, plan, settings, streams))
    busy, passed = time.process_time() - began[0], time.perf_counter() - began[1]
    return {**summary(answers, seconds), "client_busy": round(busy / passed, 3)}


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Counts, tokens a second from the start to the last answer's end, and times in ms. The load was `held` if all ended.

    `seconds` is how long requests arrived; in how much more the last of them was answered shows whether they piled up.
    """
    counts = Counter(answer.outcome for answer in answers)
    ended = [answer for answer in answers if answer.outcome == "ended" and answer.times]
    sent = [answer for answer in answers if answer.outcome != "turned away"]
    pace = [(a.times[-1] - a.times[0]) / (a.tokens - 1) for a in ended if a.tokens > 1]
    last = max((a.times[-1] for a in ended), default=0.0)
    gaps = [after - before for a in ended for before, after in zip(a.times, a.times[1:])]
    return {
        "arrivals": len(answers), "arrivals_per_s": round(len(answers) / seconds, 3), "sent": len(sent),
        **{name.replace(" ", "_"): counts[name] for name in ("ended", "refused", "failed", "turned away")},
        "held": len(answers) == counts["ended"] > 0,
        "reasons": dict(Counter(answer.reason for answer in answers if answer.reason).most_common(5)),
        "prompt_tokens": sum(a.prompt_tokens for a in ended), "completion_tokens": sum(a.tokens for a in ended),
        "seconds_to_the_last": round(last, 2), "tokens_per_s": round(sum(a.tokens for a in ended) / last, 2) if last else 0.0,
        "first_token_ms": spread([a.times[0] - a.due for a in ended]), "per_token_ms": spread(pace),
        "between_pieces_ms": spread(gaps), "sent_late_ms": spread([a.sent - a.due for a in sent]),
    }  # fmt: skip


def one_at_a_time(url: str, model: str, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[tuple[int, float]]:
    """Tokens and seconds of each answer, one request after the other. Raises SystemExit where one fails."""

    async def run() -> list[tuple[int, float]]:
        found = []
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as http:
            for prompt in prompts:
                start = time.perf_counter()
                answer = await ask(http, Arrival(0.0, model, prompt), settings, start)
                if answer.outcome != "ended":
                    raise SystemExit(f"{model}: {answer.outcome}: {answer.reason}")
                found.append((answer.tokens, time.perf_counter() - start))
        return found

    return asyncio.run(run())

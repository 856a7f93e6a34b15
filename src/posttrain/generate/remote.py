"""A client of servers with the OpenAI API (`/chat/completions`): judges ask it. Only this file imports httpx.

    requests → replies on disk, by content → the rest in a bounded pool of threads → replies on disk

The same request is sent once, also after a restart. A request that failed for a reason that may pass (no connection, a
time-out, 429, 5xx, a reply that is no chat completion) is repeated with exponential back-off and jitter; `Retry-After` is
honoured by all threads. A stop is answered between requests. Keys and prompts are never written into messages or files.
Left out: streaming, tools, images, and servers that refuse `max_tokens`.
"""

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.artifacts import fingerprint
from posttrain.errors import EndpointError
from posttrain.generate.chat_reply import RemoteReply, parse_refusal, parse_reply, stored_reply, to_stored
from posttrain.generate.reply_cache import ReplyCache
from posttrain.records import Message
from posttrain.stop import StopSignal

if TYPE_CHECKING:
    import httpx

# Seconds before the first repetition; each further wait is twice as long, up to LONGEST_WAIT.
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
# A server that asks for a longer wait than this is not waited for.
LONGEST_RETRY_AFTER = 600.0
# Seconds between checks for a stop while waiting.
POLL_INTERVAL = 0.2
# The largest reply in bytes.
REPLY_BYTES = 16 * 2**20
# Statuses that may pass.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# Statuses that say that the request, and not the server, is the problem.
_REFUSED = {400, 413, 422}
CHAT = "/chat/completions"


class RemoteSettings(NamedTuple):
    """A server and how it may be asked. `key_variable` names the environment variable with the key; 0 sets no limit."""

    address: str
    model: str
    key_variable: str = ""
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 5
    max_requests: int = 0
    max_tokens: int = 0


class RemoteRequest(NamedTuple):
    """A conversation and how to answer it. `top_logprobs` asks for the likeliest first tokens."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    completions: int = 1
    seed: int = 0
    top_logprobs: int = 0

    def body(self, model: str) -> dict[str, Any]:
        """The JSON of the request. Fields with their default are left out, because some servers refuse them."""
        body: dict[str, Any] = {
            "model": model, "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "max_tokens": self.max_tokens, "temperature": self.temperature,
        }  # fmt: skip
        if self.temperature:
            body |= {"n": self.completions, "seed": self.seed}
        if self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body


class _Failure(NamedTuple):
    """Why a request failed that may be repeated, and how long the server asks to wait."""

    problem: str
    wait: float = 0.0
    do: str = ""


class Remote:
    """A server with the replies that it has given. Usable until `close`; several threads may not call `ask` at once."""

    def __init__(self, settings: RemoteSettings, cache: Path, *, where: str, stop: StopSignal | None = None) -> None:
        """Replies are stored in the folder `cache`. Raises EndpointError if httpx is missing or the address is none."""
        self.settings, self.where = settings, where
        self.stop = stop or StopSignal()
        self._address = settings.address.rstrip("/").removesuffix(CHAT)
        self._client = _open_client(settings, self._address, where)
        self.cache = ReplyCache(cache / f"{fingerprint([self._address, settings.model])}.jsonl")
        self._lock, self._resume_at = threading.Lock(), 0.0
        self._sent = 0  # requests in progress that the cache does not count yet

    def close(self) -> None:
        """Close the connections and the file of replies."""
        self._client.close()
        self.cache.close()

    def identity(self) -> dict[str, str]:
        """The address and the model."""
        return {"address": self._address, "model": self.settings.model}

    def ask(self, requests: Sequence[RemoteRequest]) -> list[RemoteReply]:
        """The replies to requests, in order. A request that the server refuses has a reply with the reason.

        Raises EndpointError if the server cannot answer or the budget is used up, Interrupted after a request to stop. All
        replies that arrived are stored before.
        """
        keys = [self._key(request) for request in requests]
        due = {key: request for key, request in zip(keys, requests, strict=True) if self.cache.get(key) is None}
        refused = self._ask_all(due) if due else {}
        replies = []
        for key in keys:
            stored = self.cache.get(key)
            replies.append(refused[key] if stored is None else stored_reply(stored))
        return replies

    def _key(self, request: RemoteRequest) -> str:
        content = json.dumps([self._address, request.body(self.settings.model)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _ask_all(self, due: dict[str, RemoteRequest]) -> dict[str, RemoteReply]:
        """Send requests, and store their replies. Returns those that the server refused."""
        halt = threading.Event()
        refused: dict[str, RemoteReply] = {}
        with ThreadPoolExecutor(min(self.settings.concurrency, len(due)), "endpoint") as pool:
            futures = [pool.submit(self._ask_one, key, request, halt) for key, request in due.items()]
            keys = dict(zip(futures, due, strict=True))
            try:
                for future in as_completed(futures):
                    if (reply := future.result()) is not None:
                        refused[keys[future]] = reply
            except BaseException as error:
                halt.set()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, EndpointError):
                    there = sum(self.cache.get(key) is not None for key in due)
                    kept = f"{there:,} of {len(due):,} replies of this call are kept; run the same command to go on"
                    do = f"{error.do}; {kept}" if error.do else kept
                    raise EndpointError(error.where, error.found, allowed=error.allowed, do=do) from None
                raise
        return refused

    def _ask_one(self, key: str, request: RemoteRequest, halt: threading.Event) -> RemoteReply | None:
        """Send a request until there is a reply, and store it. Returns the reply if it is not stored."""
        body, sent, until = request.body(self.settings.model), 0, 0.0
        reply: RemoteReply | None = None
        try:
            while reply is None:
                self._wait(until, halt)
                if halt.is_set():
                    return None
                self._spend()
                sent += 1
                outcome = self._send(body)
                if isinstance(outcome, RemoteReply):
                    reply = outcome
                elif sent > self.settings.retries:
                    times = f"{sent} times" if sent > 1 else "once"
                    raise EndpointError(self.where, f"{self._address} {outcome.problem}, tried {times}", do=outcome.do)
                else:
                    until = self._next_time(outcome, sent)
        finally:
            if sent:
                self._settle(key, reply, sent)
        return None if reply.kept else reply

    def _settle(self, key: str, reply: RemoteReply | None, sent: int) -> None:
        """Store a reply, if it may be stored, and what it cost."""
        tokens = 0 if reply is None else reply.tokens
        with self._lock:
            self._sent -= sent
            self.cache.requests += sent
            self.cache.tokens += tokens
        self.cache.add(key, to_stored(reply) if reply is not None and reply.kept else None, requests=sent, tokens=tokens)

    def _spend(self) -> None:
        """Count a request. Raises EndpointError if the budget is used up."""
        most, most_tokens = self.settings.max_requests, self.settings.max_tokens
        with self._lock:
            if most and self.cache.requests + self._sent >= most:
                found, field = f"the budget of {most:,} requests is used up", "max_requests"
            elif most_tokens and self.cache.tokens >= most_tokens:
                found, field = f"the budget of {most_tokens:,} tokens is used up ({self.cache.tokens:,})", "max_tokens"
            else:
                self._sent += 1
                return
        raise EndpointError(self.where, found, allowed=f"{field} counts all requests of this run", do=f"raise {field}")

    def _next_time(self, failure: _Failure, sent: int) -> float:
        """When a request may be repeated: exponentially later with jitter. A wait that the server asks for holds for all."""
        if failure.wait > LONGEST_RETRY_AFTER:
            found = f"{self._address} {failure.problem} and asks to wait {failure.wait:,.0f} seconds"
            raise EndpointError(self.where, found, allowed=f"at most {LONGEST_RETRY_AFTER:.0f}", do="run it again later")
        now = time.monotonic()
        if failure.wait:
            with self._lock:
                self._resume_at = max(self._resume_at, now + failure.wait)
        own: float = min(FIRST_WAIT * 2 ** (sent - 1), LONGEST_WAIT)
        return now + own * random.uniform(0.5, 1)

    def _wait(self, until: float, halt: threading.Event) -> None:
        """Wait until `until` and until the server accepts requests. Raises Interrupted after a request to stop."""
        while True:
            self.stop.check("asking a server")
            with self._lock:
                left = max(self._resume_at, until) - time.monotonic()
            if left <= 0 or halt.wait(min(left, POLL_INTERVAL)):
                return

    def _send(self, body: dict[str, Any]) -> RemoteReply | _Failure:
        """Send a request once. Raises EndpointError for a failure that will not pass."""
        import httpx

        try:
            status, headers, content = self._post(body)
        except httpx.TimeoutException:
            return _Failure(f"took longer than timeout = {self.settings.timeout:g} seconds", do="raise timeout")
        except httpx.ConnectError as error:
            return _Failure(f"cannot be reached ({_reason(error)})", do="start the server or correct the address")
        except (httpx.TransportError, httpx.DecodingError) as error:
            return _Failure(f"closed the connection ({type(error).__name__})", do="look into the server's log")
        if status == 200:
            reply = parse_reply(content, body)
            return reply if reply is not None else _Failure("answered with something that is no chat completion")
        refusal = parse_refusal(status, content, body, self._key_text())
        if status in _REFUSED or (status == 403 and "logprob" in refusal.refused):
            return refusal
        if status in _PASSING:
            many = "lower concurrency or raise retries" if status == 429 else "look into the server's log"
            return _Failure(f"answered with status {status}", _retry_after(headers.get("retry-after", "")), many)
        raise self._final(status)

    def _post(self, body: dict[str, Any]) -> tuple[int, "httpx.Headers", bytes]:
        """Status, headers and content. The time limit holds for the whole reply, also if it comes in small parts."""
        import httpx

        until = time.monotonic() + self.settings.timeout
        content = b""
        with self._client.stream("POST", f"{self._address}{CHAT}", json=body) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the reply is not complete")
                if len(content) > REPLY_BYTES:
                    raise httpx.DecodingError("the reply is too long")
        return response.status_code, response.headers, content

    def _final(self, status: int) -> EndpointError:
        """The error for a status that will not pass."""
        variable, model = self.settings.key_variable, self.settings.model
        found = f"{self._address} answered with status {status}"
        if status in (401, 403):
            state = "is not set" if not self._key_text() else "has a key that the server does not accept"
            found += f", and the environment variable {variable} {state}"
            return EndpointError(self.where, found, allowed="a key of this server", do=f"export {variable}=…")
        if status == 404:
            found = f'{self._address} has no model "{model}", or no {CHAT} (status 404)'
            return EndpointError(self.where, found, do="correct model, or the address, which often ends in /v1")
        return EndpointError(self.where, found, allowed="200", do="correct the address; redirects are not followed")

    def _key_text(self) -> str:
        return os.environ.get(self.settings.key_variable, "").strip() if self.settings.key_variable else ""

    def refusal(self, reply: RemoteReply) -> EndpointError:
        """The error for a refused request."""
        return EndpointError(
            self.where, f"{self._address} refused a request: {reply.refused}", do="correct the judge's settings"
        )


def _open_client(settings: RemoteSettings, address: str, where: str) -> "httpx.Client":
    """The HTTP client with the key. Raises EndpointError if httpx is missing, or the address or the key is unusable."""
    try:
        import httpx
    except ImportError:
        raise EndpointError(where, "httpx is not installed", do='pip install "posttrain[endpoints]"') from None
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise EndpointError(where, f"an address that is none ({error})", allowed="http://host:port/v1") from None
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
        do = f"put the key into the environment variable {settings.key_variable or 'of the judge'}"
        raise EndpointError(
            where, "an address with a name, a key or a query, or without a host", allowed="http://host:port/v1", do=do
        )
    key = os.environ.get(settings.key_variable, "").strip() if settings.key_variable else ""
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(where, f"the environment variable {settings.key_variable} has a key with unusual characters")
    return httpx.Client(
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=settings.timeout, follow_redirects=False,
        limits=httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency),
    )  # fmt: skip


def _reason(error: Exception) -> str:
    """The system's reason of a failed connection."""
    text = str(error)
    return text.partition("] ")[2] or text or type(error).__name__


def _retry_after(value: str) -> float:
    """The seconds of a Retry-After header, 0 if there is none. It is a number or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0

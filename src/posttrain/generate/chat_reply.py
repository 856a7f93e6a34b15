"""Replies of the OpenAI chat API: read, checked and stored. `generate/remote.py` receives them.

Of the log-probabilities only those of the first token are kept, which judges read.
"""

import json
from typing import Any, NamedTuple

# Characters of a server's error message that are shown.
SHOWN_CHARACTERS = 200
# A message that repeats so many characters of a prompt is not shown.
REPEATED_CHARACTERS = 12
# A refusal whose message has one of these is about the length of the prompt.
TOO_LONG_WORDS = (
    "context length",
    "context window",
    "maximum context",
    "context of",
    "too long",
    "maximum length",
    "exceeds the maximum",
    "prompt of",
    "too many tokens",
    "shorten it",
)


class RemoteChoice(NamedTuple):
    """One answer. `first` has the likeliest first tokens with their log-probabilities, None if the server gives none."""

    text: str
    ended: bool
    first: tuple[tuple[str, float], ...] | None


class RemoteReply(NamedTuple):
    """The answers to a request and the tokens that the server counted; or the reason why it refused the request."""

    choices: tuple[RemoteChoice, ...]
    tokens: int
    refused: str = ""
    too_long: bool = False

    @property
    def kept(self) -> bool:
        """Whether the reply depends on the content of the request alone, so that it may be stored."""
        return not self.refused or self.too_long


def parse_reply(content: bytes, body: dict[str, Any]) -> RemoteReply | None:
    """The reply in the content of a response, None if it is no chat completion. Tokens that are not counted are estimated."""
    try:
        reply = json.loads(content)
        choices = tuple(_choice(choice) for choice in reply["choices"])
        if not choices:
            return None
        return RemoteReply(choices, _tokens(reply.get("usage"), content, body))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None


def _choice(choice: dict[str, Any]) -> RemoteChoice:
    """Raises TypeError or KeyError if it has no text."""
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise TypeError("content is no text")
    return RemoteChoice(text or "", choice.get("finish_reason") != "length", _first_tokens(choice.get("logprobs")))


def _first_tokens(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    """The likeliest first tokens; () for an answer without a token, None if the server gives no log-probabilities."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return None
    if not content:
        return ()
    listed = content[0].get("top_logprobs") or []
    tokens = tuple((str(item["token"]), float(item["logprob"])) for item in listed)
    if any(not logprob <= 1e-3 for _, logprob in tokens):  # also true for NaN
        raise ValueError("a log-probability is positive")
    return tokens or None


def _tokens(usage: Any, content: bytes, body: dict[str, Any]) -> int:
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if isinstance(total, int) and total >= 0:
        return total
    return (len(json.dumps(body["messages"])) + len(content)) // 4 + 1


def to_stored(reply: RemoteReply) -> dict[str, Any]:
    """A reply as JSON."""
    return {
        "choices": [[choice.text, choice.ended, choice.first] for choice in reply.choices], "tokens": reply.tokens,
        **({"refused": reply.refused, "too_long": reply.too_long} if reply.refused else {}),
    }  # fmt: skip


def stored_reply(value: dict[str, Any]) -> RemoteReply:
    """The reply of `to_stored`."""
    choices = tuple(
        RemoteChoice(text, ended, None if first is None else tuple((token, logprob) for token, logprob in first))
        for text, ended, first in value["choices"]
    )
    return RemoteReply(choices, value["tokens"], value.get("refused", ""), value.get("too_long", False))


def parse_refusal(status: int, content: bytes, body: dict[str, Any], key: str) -> RemoteReply:
    """The refusal in the content of a response. Its reason is the server's message, shortened, if it repeats neither the key
    nor a part of the conversation.
    """
    text = _error_message(content)
    too_long = status == 413 or any(words in text.lower() for words in TOO_LONG_WORDS)
    lines = [" ".join(line.split()) for one in body["messages"] for line in one["content"].splitlines()]
    if (key and key in text) or any(len(line) >= REPEATED_CHARACTERS and line[:60] in text for line in lines):
        text = "its message repeats the request"
    return RemoteReply((), 0, text[:SHOWN_CHARACTERS] or f"status {status}", too_long)


def _error_message(content: bytes) -> str:
    """The message of an error on one line, empty if there is none."""
    try:
        error = json.loads(content).get("error")
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        return ""
    return " ".join(message.split()) if isinstance(message, str) else ""

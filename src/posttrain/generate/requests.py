"""Requests to the engine, its events, and the state of one completion."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.generate.sampling import Draw, SamplingSettings, uniform
from posttrain.generate.text import TextStream
from posttrain.models.lora import LoraAdapter
from posttrain.records import Finish, Rollout


class Request(NamedTuple):
    """A prompt and how to answer it. The `completions` answers have the indices `first`, `first + 1`, ...

    Random numbers are a function of (seed, index, position), so the answers do not depend on other requests. With
    `prompt_logprobs` the prompt is scored too, and `max_new_tokens` may be 0. The engine is fair between owners. `continues`
    says that answers continue the prompt's text: they keep a leading space, which some tokenizers drop at the start of a text.
    """

    prompt: Sequence[int]
    settings: SamplingSettings = SamplingSettings()
    adapter: str = "base"
    first: int = 0
    completions: int = 1
    prompt_logprobs: bool = False
    owner: str = ""
    continues: bool = False


Top = tuple[tuple[int, float], ...]


class TokenScore(NamedTuple):
    """A prompt token with its log-probability given the tokens before it, and the likeliest tokens at its position."""

    token: int
    logprob: float
    top: Top


class Event(NamedTuple):
    """A new token of a completion, or its end, or both. `token` is None if the completion ended without a new one.

    `top` has the `top_logprobs` likeliest tokens under the model's own distribution. `prompt`, if requested, comes with the
    first event: a score for each prompt token but the first. `cached_tokens` is the number of prompt tokens that came from the
    prefix cache. If the completion failed, its last event has the `error` instead of a rollout.
    """

    row: int
    token: int | None
    logprob: float
    model_logprob: float
    rollout: Rollout | None
    top: Top = ()
    prompt: tuple[TokenScore, ...] | None = None
    cached_tokens: int = 0
    error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether this is the last event of its completion."""
        return self.rollout is not None or self.error is not None


class Row:
    """The state of one completion. `number` identifies it to the caller; `adapter` is None for the base."""

    def __init__(
        self, number: int, request: Request, completion: int, adapter: LoraAdapter | None, chat: ChatFormat,
        fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        self.number, self.request, self.adapter = number, request, adapter
        # The hash of the weights, for the prefix cache; None if they may change.
        self.fingerprint = fingerprint
        # Prompt tokens in the cache, and those of them that came from the prefix cache.
        self.filled = self.cached_tokens = 0
        # Whether the row is paused: it keeps its place but gets no tokens.
        self.resting = False
        self.scores: list[TokenScore] = []
        self.prompt, self.settings = tuple(request.prompt), request.settings
        self._index, self._chat = request.first + completion, chat
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        # The error that ended the row, which has no answer then.
        self.error: Exception | None = None
        self.finish: Finish | None = None if self.settings.max_new_tokens or request.prompt_logprobs else "length"
        self._ends = (*sorted(chat.end_ids), *self.settings.stop_ids)
        self._seen_tokens = dict.fromkeys(self.prompt) if self.settings.repetition_penalty != 1 else {}
        self._text = ""
        self._decode = partial(chat.decode, middle=request.continues)
        self._stream: TextStream | None = None
        if self.settings.stop:
            self._stream = TextStream(self._decode, self.settings.stop, after=self.settings.min_new_tokens)

    @property
    def need(self) -> int:
        """Tokens to reserve in the cache: the prompt and all new tokens but the last, which is never computed."""
        return len(self.prompt) + max(0, self.settings.max_new_tokens - 1)

    @property
    def length(self) -> int:
        """Tokens in the cache before the newest one, once the prompt is complete."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self.filled + max(0, len(self.ids) - 1)

    @property
    def over(self) -> bool:
        """Whether the row has ended."""
        return self.finish is not None or self.error is not None

    def draw(self) -> Draw:
        """The inputs of this row to the choice of its next token."""
        settings, position = self.settings, len(self.ids)
        number = uniform(settings.seed, self._index, position) if settings.temperature else 0.0
        return Draw(settings, number, tuple(self._seen_tokens), self._ends if position < settings.min_new_tokens else ())

    def accept(self, token: int, logprob: float, model_logprob: float) -> None:
        """Append a token. A token that ends the completion is its last."""
        self.ids.append(token)
        if self.settings.logprobs:
            self.logprobs.append(logprob)
            self.model_logprobs.append(model_logprob)
        if self._seen_tokens:
            self._seen_tokens[token] = None
        if token in self._chat.end_ids:
            self.finish = "end"
        elif token in self.settings.stop_ids:
            self.finish = "stop id"
        elif self._stream is not None and self._met(self._stream, token):
            self.finish = "stop string"
        elif len(self.ids) >= self.settings.max_new_tokens:
            self.finish = "length"

    def _met(self, stream: TextStream, token: int) -> bool:
        self._text += stream.add(token)
        return stream.stopped

    def rollout(self) -> Rollout:
        """The completion so far."""
        ended = self.finish in ("end", "stop id")
        text = self._text if self.finish == "stop string" else self._decode(self.ids[:-1] if ended else self.ids)
        return Rollout(
            self.prompt, tuple(self.ids), tuple(self.logprobs), text, ended, self.request.adapter, tuple(self.model_logprobs),
            self.finish or "cancelled",
        )  # fmt: skip

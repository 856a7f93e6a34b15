"""What is asked of the engine, what it tells, and one completion on its way."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.generate.sampling import Draw, SamplingSettings, uniform
from posttrain.generate.text import TextStream
from posttrain.models.lora import LoraAdapter
from posttrain.records import Finish, Rollout


class Request(NamedTuple):
    """A prompt, and how it is to be answered. `completions` answers have the indices `first`, `first + 1`, ...

    Randomness is a function of (seed, index, position): the same request gives the same answers in any company. With
    `prompt_logprobs` the prompt is scored too, and `max_new_tokens` may be 0. The engine is fair between owners. An answer that
    `continues` the prompt's text keeps a space in front, which some tokenizers leave out at the beginning of a text.
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
    """A token of a prompt: its log-probability after what stands before it, and the likeliest tokens there."""

    token: int
    logprob: float
    top: Top


class Event(NamedTuple):
    """A token of a completion, or its end, or both. `token` is None where it ended without a new one.

    `top` are the likeliest tokens (`top_logprobs` of them) under the model's own distribution. `prompt`, where it was asked
    for, comes with a completion's first event: a score for each token of the prompt but the first. `found` tokens of the prompt
    were known from before, and not computed. Where computing it failed, its last event has the `error` instead of a rollout.
    """

    row: int
    token: int | None
    logprob: float
    model_logprob: float
    rollout: Rollout | None
    top: Top = ()
    prompt: tuple[TokenScore, ...] | None = None
    found: int = 0
    error: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more comes of this completion."""
        return self.rollout is not None or self.error is not None


class Row:
    """One completion: `number` names it to the caller, `adapter` is what it is computed with."""

    def __init__(
        self, number: int, request: Request, completion: int, adapter: LoraAdapter | None, chat: ChatFormat,
        fingerprint: str | None = None,
    ) -> None:  # fmt: skip
        self.number, self.request, self.adapter = number, request, adapter
        # What the weights are known by, for the cache of prompts; None where they may change.
        self.fingerprint = fingerprint
        # Tokens of the prompt that are in the cache, and that were known from before.
        self.filled = self.found = 0
        # Whether it keeps its place without getting tokens, because others of its owner do.
        self.resting = False
        self.scores: list[TokenScore] = []
        self.prompt, self.settings = tuple(request.prompt), request.settings
        self._index, self._chat = request.first + completion, chat
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        # What computing it failed with; it has no answer then.
        self.error: Exception | None = None
        self.finish: Finish | None = None if self.settings.max_new_tokens or request.prompt_logprobs else "length"
        self._ends = (*sorted(chat.end_ids), *self.settings.stop_ids)
        self._seen = dict.fromkeys(self.prompt) if self.settings.repetition_penalty != 1 else {}
        self._text = ""
        self._decode = partial(chat.decode, middle=request.continues)
        self._stream: TextStream | None = None
        if self.settings.stop:
            self._stream = TextStream(self._decode, self.settings.stop, after=self.settings.min_new_tokens)

    @property
    def need(self) -> int:
        """Tokens that the cache must have room for: the prompt, and all new tokens but the last, which is never computed."""
        return len(self.prompt) + max(0, self.settings.max_new_tokens - 1)

    @property
    def length(self) -> int:
        """Tokens in the cache before the newest, once the prompt is filled."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self.filled + max(0, len(self.ids) - 1)

    @property
    def over(self) -> bool:
        """Whether it gets no more tokens."""
        return self.finish is not None or self.error is not None

    def draw(self) -> Draw:
        """What this row brings to its next choice."""
        settings, position = self.settings, len(self.ids)
        number = uniform(settings.seed, self._index, position) if settings.temperature else 0.0
        return Draw(settings, number, tuple(self._seen), self._ends if position < settings.min_new_tokens else ())

    def accept(self, token: int, logprob: float, model_logprob: float) -> None:
        """Take one token; what ends a completion is kept as its last."""
        self.ids.append(token)
        if self.settings.logprobs:
            self.logprobs.append(logprob)
            self.model_logprobs.append(model_logprob)
        if self._seen:
            self._seen[token] = None
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
        """The completion as it stands."""
        ended = self.finish in ("end", "stop id")
        text = self._text if self.finish == "stop string" else self._decode(self.ids[:-1] if ended else self.ids)
        return Rollout(
            self.prompt, tuple(self.ids), tuple(self.logprobs), text, ended, self.request.adapter, tuple(self.model_logprobs),
            self.finish or "cancelled",
        )  # fmt: skip

"""From the engine's events to what clients read: whole answers, and server-sent events.

A `Flow` is one HTTP request on its way: an engine request a prompt, of which each completion becomes a `Choice`. Both kinds
of API read the same flow; they differ only in their shapes. Prompts of one request are all computed at once and told in
their order. The token that ends an answer is counted and not shown; without a template it has its log-probability.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.generate.requests import Event, Request, TokenScore
from posttrain.generate.text import TextStream
from posttrain.generate.worker import Answer, Server
from posttrain.serve.errors import Refusal
from posttrain.serve.limits import Limits
from posttrain.serve.metrics import Metrics
from posttrain.serve.parse import Ask
from posttrain.serve.responses import FinishReason, PromptTokensDetails, Usage
from posttrain.serve.store import Served
from posttrain.serve.turns import in_turn

FINISH: dict[str, FinishReason] = {"end": "stop", "stop id": "stop", "stop string": "stop", "length": "length"}
# Tokens that the loop is woken for, where nobody reads them one by one.
TOGETHER = 16


class Shown(NamedTuple):
    """A token with its log-probability (None for the first of a prompt), the likeliest ones, and where its text begins."""

    score: TokenScore
    known: bool
    offset: int


class Choice:
    """One completion as it grows. `told` scores are those that no chunk has held yet."""

    def __init__(
        self, index: int, prompt: Sequence[int], echoed: str, ask: Ask, chat: ChatFormat, *, continues: bool = False
    ) -> None:  # fmt: skip
        self.index, self.text, self.count = index, echoed, 0
        self.finish: FinishReason | None = None
        self.told: list[Shown] = []
        self._prompt, self._echoed, self._ask, self._chat = prompt, echoed, ask, chat
        settings = ask.settings
        self._pieces = TextStream(partial(chat.decode, middle=continues), settings.stop, after=settings.min_new_tokens)
        self._places = TextStream(partial(chat.decode, middle=continues))
        self._offset = 0

    def take(self, event: Event) -> str:
        """The text that an event adds."""
        piece, rollout = "", event.rollout
        if event.prompt is not None and self._ask.echoed is not None:
            self._show_prompt(event.prompt)
        if event.token is not None:
            self.count += 1
            ends = rollout is not None and rollout.ended
            if not ends:
                piece = self._pieces.add(event.token)
            # A harness asks for one token more than it wants and drops the last entry, whatever that token was.
            if self._ask.scored and not (ends and self._ask.chat):
                self._show(TokenScore(event.token, event.model_logprob, event.top))
        if rollout is not None:
            piece += self._pieces.end()
            self.finish = FINISH.get(rollout.finish)
        self.text += piece
        return piece

    def _show_prompt(self, scores: Sequence[TokenScore]) -> None:
        """Control tokens are part of a prompt that was written, but for the BOS that was put in front of it."""
        answer, first = self._places, TokenScore(self._prompt[0], 0.0, ())
        decode = partial(self._chat.decode, special=self._ask.written, middle=False)
        self._places = TextStream(decode)
        self._show(first, known=False)
        if first.token == self._chat.bos_id and not self._echoed.startswith(self._chat.decode([first.token], special=True)):
            self._places, self._offset = TextStream(decode), 0
        for score in scores:
            self._show(score)
        self._places, self._offset = answer, len(self._echoed)

    def _show(self, score: TokenScore, *, known: bool = True) -> None:
        self.told.append(Shown(score, known, self._offset))
        self._offset += len(self._places.add(score.token))

    def tell(self) -> list[Shown]:
        """Scores since the last time."""
        told, self.told = self.told, []
        return told


class Flow:
    """The completions of one HTTP request. `cancel` must be called at its end, however it ends.

    Raises BusyError where the engine has no room, ModelError where it cannot answer.
    """

    def __init__(
        self, ask: Ask, served: Served, *, server: Server, chat: ChatFormat, owner: str, limits: Limits, metrics: Metrics
    ) -> None:
        self.ask, self.served, self.chat = ask, served, chat
        self.id, self.created = uuid.uuid4().hex, int(time.time())
        self._metrics, self._began = metrics, time.monotonic()
        self._first_by, self._end_by = self._began + limits.queue_seconds, self._began + limits.request_seconds
        self._answers: list[Answer] = []
        # Answers that were read to their end, completions that were not, and those of them that have no token yet.
        self._over = self._open = self._silent = 0
        # Tokens of the prompts that were known from before.
        self._found = 0
        self.choices = [
            Choice(place * ask.n + i, prompt, ask.echoed[place] if ask.echoed else "", ask, chat, continues=continues)
            for place, (prompt, continues) in enumerate(zip(ask.prompts, ask.continues, strict=True))
            for i in range(ask.n)
        ]
        try:
            for prompt, continues in zip(ask.prompts, ask.continues, strict=True):
                request = Request(
                    prompt, ask.settings, served.engine_name, completions=ask.n, owner=owner,
                    prompt_logprobs=ask.scored and ask.echoed is not None, continues=continues,
                )  # fmt: skip
                self._answers.append(server.submit(request, together=1 if ask.stream else TOGETHER))
        except BaseException:
            self.cancel()
            raise
        self._open = self._silent = len(self.choices)
        metrics.rows(served.name, self._open, self._silent)
        metrics.prompt(served.name, sum(map(len, ask.prompts)))

    async def events(self) -> AsyncIterator[tuple[Choice, str]]:
        """Every event as the completion that grew and the text that it grew by.

        Raises Refusal when a limit of time is over or the server goes down; what the engine died of as it is.
        """
        for place, answer in enumerate(self._answers):
            while (event := await self._next(answer)) is not None:
                choice = self.choices[place * self.ask.n + event.row]
                self._count(event, first=choice.count == 0)
                # Beside the loop where a whole prompt is told, which takes long.
                piece = await in_turn(choice.take, event) if event.prompt else choice.take(event)
                if event.rollout is not None and event.rollout.finish == "not finite":
                    found = "gives numbers that are not finite"
                    raise Refusal(500, f'model "{self.served.name}"', found, do="use another model", code="not_finite")
                if event.rollout is not None and choice.finish is None:
                    raise Refusal(503, "server", "going down", do="ask again later", code="shutting_down")
                yield choice, piece
            self._over += 1

    async def _next(self, answer: Answer) -> Event | None:
        by, what = min((self._first_by, "no token within the queue's limit"), (self._end_by, "longer than a request may take"))
        try:
            if answer.ready:
                event = await anext(answer, None)
            else:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + by - time.monotonic()):
                    event = await anext(answer, None)
        except TimeoutError:
            raise Refusal(503, "server", what, do="ask again later, or for less", code="timeout") from None
        self._first_by = self._end_by
        return event

    def _count(self, event: Event, *, first: bool) -> None:
        name, ends = self.served.name, event.rollout is not None
        if event.token is not None:
            self._metrics.token(name, time.monotonic() - self._began, first=first)
        if first and event.row == 0:  # a prompt counts once
            self._found += event.found
            self._metrics.found(name, event.found)
        self._open, self._silent = self._open - ends, self._silent - first
        self._metrics.rows(name, -int(ends), -int(first))
        if event.rollout is not None and len(event.rollout.completion_ids) > 1:
            self._metrics.pace(name, (time.monotonic() - self._began) / len(event.rollout.completion_ids))

    def cancel(self) -> None:
        """End what is left of it."""
        self._metrics.rows(self.served.name, -self._open, -self._silent)
        self._open = self._silent = 0
        for answer in self._answers[self._over :]:
            answer.cancel()

    def usage(self) -> Usage:
        """Tokens so far."""
        prompt, completion = sum(map(len, self.ask.prompts)), sum(choice.count for choice in self.choices)
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._found),
        )  # fmt: skip

    def token_text(self, token: int) -> str:
        """What a token says by itself."""
        return self.chat.decode([token], special=True)

"""Turn the engine's events into the completions of one HTTP request.

A `Flow` is one HTTP request in progress. It submits one engine request per prompt; each completion is a `Choice`. Both APIs
read the same flow and differ only in their response models (`streaming.py`). All prompts of a request run at once; their
answers are returned in order. The token that ends an answer is counted but not shown; /v1/completions returns its score.
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
from posttrain.serve.metrics import ServerMetrics
from posttrain.serve.parse import ParsedRequest
from posttrain.serve.responses import FinishReason, PromptTokensDetails, Usage
from posttrain.serve.store import ServedModel
from posttrain.serve.turns import run_in_text_thread

FINISH: dict[str, FinishReason] = {"end": "stop", "stop id": "stop", "stop string": "stop", "length": "length"}
# Tokens per wake-up of the event loop for an answer that is not streamed.
WHOLE_ANSWER_TOKENS = 16


class ScoredToken(NamedTuple):
    """A token with its log-probability, the likeliest alternatives and the offset of its text. The first token of a prompt has
    no log-probability."""

    score: TokenScore
    has_logprob: bool
    offset: int


class Choice:
    """One completion in progress. `pending` holds the token scores that no chunk has returned yet."""

    def __init__(
        self, index: int, prompt: Sequence[int], echoed: str, parsed: ParsedRequest, chat: ChatFormat, *,
        continues: bool = False,
    ) -> None:  # fmt: skip
        self.index, self.text, self.count = index, echoed, 0
        self.finish: FinishReason | None = None
        self.pending: list[ScoredToken] = []
        self._prompt, self._echoed, self._parsed, self._chat = prompt, echoed, parsed, chat
        settings = parsed.settings
        self._pieces = TextStream(partial(chat.decode, middle=continues), settings.stop, after=settings.min_new_tokens)
        self._places = TextStream(partial(chat.decode, middle=continues))
        self._offset = 0

    def add(self, event: Event) -> str:
        """Add an event and return the text it adds."""
        piece, rollout = "", event.rollout
        if event.prompt is not None and self._parsed.echoed is not None:
            self._show_prompt(event.prompt)
        if event.token is not None:
            self.count += 1
            ends = rollout is not None and rollout.ended
            if not ends:
                piece = self._pieces.add(event.token)
            # Evaluation harnesses request one extra token and drop the last entry, so an end token needs an entry too.
            if self._parsed.scored and not (ends and self._parsed.chat):
                self._show(TokenScore(event.token, event.model_logprob, event.top))
        if rollout is not None:
            piece += self._pieces.end()
            self.finish = FINISH.get(rollout.finish)
        self.text += piece
        return piece

    def _show_prompt(self, scores: Sequence[TokenScore]) -> None:
        """Score the echoed prompt. A text prompt includes its control tokens, except a BOS that the tokenizer added."""
        answer, first = self._places, TokenScore(self._prompt[0], 0.0, ())
        decode = partial(self._chat.decode, special=self._parsed.written, middle=False)
        self._places = TextStream(decode)
        self._show(first, has_logprob=False)
        if first.token == self._chat.bos_id and not self._echoed.startswith(self._chat.decode([first.token], special=True)):
            self._places, self._offset = TextStream(decode), 0
        for score in scores:
            self._show(score)
        self._places, self._offset = answer, len(self._echoed)

    def _show(self, score: TokenScore, *, has_logprob: bool = True) -> None:
        self.pending.append(ScoredToken(score, has_logprob, self._offset))
        self._offset += len(self._places.add(score.token))

    def take_pending(self) -> list[ScoredToken]:
        """Return the pending scores and clear them."""
        pending, self.pending = self.pending, []
        return pending


class Flow:
    """The completions of one HTTP request. Always call `cancel` when it ends.

    Raises BusyError if the engine has no room, ModelError if it cannot answer.
    """

    def __init__(
        self,
        parsed: ParsedRequest,
        served: ServedModel,
        *,
        server: Server,
        chat: ChatFormat,
        owner: str,
        limits: Limits,
        metrics: ServerMetrics,
    ) -> None:
        self.parsed, self.served, self.chat = parsed, served, chat
        self.id, self.created = uuid.uuid4().hex, int(time.time())
        self._metrics, self._began = metrics, time.monotonic()
        self._first_by, self._end_by = self._began + limits.queue_seconds, self._began + limits.request_seconds
        self._answers: list[Answer] = []
        # Prompts whose answers were read to the end; completions still open; open completions without a token.
        self._over = self._open = self._silent = 0
        # Prompt tokens found in the prefix cache.
        self._cached_tokens = 0
        self.choices = [
            Choice(
                position * parsed.n + i,
                prompt,
                parsed.echoed[position] if parsed.echoed else "",
                parsed,
                chat,
                continues=continues,
            )
            for position, (prompt, continues) in enumerate(zip(parsed.prompts, parsed.continues, strict=True))
            for i in range(parsed.n)
        ]
        try:
            for prompt, continues in zip(parsed.prompts, parsed.continues, strict=True):
                request = Request(
                    prompt, parsed.settings, served.engine_name, completions=parsed.n, owner=owner,
                    prompt_logprobs=parsed.scored and parsed.echoed is not None, continues=continues,
                )  # fmt: skip
                self._answers.append(server.submit(request, together=1 if parsed.stream else WHOLE_ANSWER_TOKENS))
        except BaseException:
            self.cancel()
            raise
        self._open = self._silent = len(self.choices)
        metrics.completions(served.name, self._open, self._silent)
        metrics.prompt(served.name, sum(map(len, parsed.prompts)))

    async def events(self) -> AsyncIterator[tuple[Choice, str]]:
        """Yield each event as its completion and the text it adds.

        Raises Refusal at a time limit or a shutdown. An engine failure is raised unchanged.
        """
        for position, answer in enumerate(self._answers):
            while (event := await self._next(answer)) is not None:
                choice = self.choices[position * self.parsed.n + event.row]
                self._count(event, first=choice.count == 0)
                # Scoring an echoed prompt takes long, so it runs outside the event loop.
                piece = await run_in_text_thread(choice.add, event) if event.prompt else choice.add(event)
                if event.rollout is not None and event.rollout.finish == "not finite":
                    problem = "produced logits that are not finite"
                    raise Refusal(500, f'model "{self.served.name}"', problem, do="use another model", code="not_finite")
                if event.rollout is not None and choice.finish is None:
                    raise Refusal(503, "server", "shutting down", do="try again later", code="shutting_down")
                yield choice, piece
            self._over += 1

    async def _next(self, answer: Answer) -> Event | None:
        limits = (self._end_by, "not finished within --request-seconds"), (self._first_by, "no token within --queue-seconds")
        deadline, reason = min(limits, key=lambda limit: limit[0])  # at a tie the first: after a token both deadlines are equal
        try:
            if answer.ready:
                event = await anext(answer, None)
            else:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    event = await anext(answer, None)
        except TimeoutError:
            raise Refusal(503, "server", reason, do="try again later, or request fewer tokens", code="timeout") from None
        self._first_by = self._end_by
        return event

    def _count(self, event: Event, *, first: bool) -> None:
        name, ends = self.served.name, event.rollout is not None
        if event.token is not None:
            self._metrics.token(name, time.monotonic() - self._began, first=first)
        if first and event.row == 0:  # a prompt counts once
            self._cached_tokens += event.cached_tokens
            self._metrics.cached_tokens(name, event.cached_tokens)
        self._open, self._silent = self._open - ends, self._silent - first
        self._metrics.completions(name, -int(ends), -int(first))
        if event.rollout is not None and len(event.rollout.completion_ids) > 1:
            self._metrics.pace(name, (time.monotonic() - self._began) / len(event.rollout.completion_ids))

    def cancel(self) -> None:
        """Cancel the answers that are still running."""
        self._metrics.completions(self.served.name, -self._open, -self._silent)
        self._open = self._silent = 0
        for answer in self._answers[self._over :]:
            answer.cancel()

    def usage(self) -> Usage:
        """Token counts so far."""
        prompt, completion = sum(map(len, self.parsed.prompts)), sum(choice.count for choice in self.choices)
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
        )  # fmt: skip

    def token_text(self, token: int) -> str:
        """The text of a single token."""
        return self.chat.decode([token], special=True)

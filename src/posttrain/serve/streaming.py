"""Answers of a flow in the shapes of the two APIs: chat completions and completions, whole or as server-sent events.

A chat stream begins with the role of each completion and ends with its `finish_reason`; then the usage, where it was asked
for, and `[DONE]`. An error after the start is an event with the envelope, and no `[DONE]` follows.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Sequence

from pydantic import BaseModel

from posttrain.generate.requests import TokenScore
from posttrain.serve.answering import Choice, Flow, Shown
from posttrain.serve.errors import encode, refusal
from posttrain.serve.responses import (
    Answered,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from posttrain.serve.turns import in_turn

# JSON has no infinity; a token that cannot be is this unlikely.
LEAST = -9999.0
# In the metrics: a client that left before its answer was whole.
LEFT = 499
# Tokens that are told at once: those of a prompt that is echoed, and not the one or two of a step.
MANY = 16
_LOG = logging.getLogger("posttrain.serve")


def chat_answer(flow: Flow) -> ChatCompletion:
    """The whole answer, of a flow that is over."""
    choices = []
    for choice in flow.choices:
        assert choice.finish is not None
        message = Answered(role="assistant", content=choice.text, refusal=None)
        logprobs = _chat_logprobs(flow, choice.tell())
        choices.append(ChatChoice(index=choice.index, message=message, logprobs=logprobs, finish_reason=choice.finish))
    return ChatCompletion(
        id=f"chatcmpl-{flow.id}", object="chat.completion", created=flow.created, model=flow.served.name, choices=choices,
        usage=flow.usage(), system_fingerprint=_fingerprint(flow),
    )  # fmt: skip


def completion_answer(flow: Flow) -> Completion:
    """The whole answer, of a flow that is over."""
    return _completion(flow, [_completion_choice(flow, choice, choice.text) for choice in flow.choices], usage=True)


async def chat_stream(flow: Flow) -> AsyncIterator[BaseModel]:
    """Chunks of a chat completion."""
    begun = set()
    async for choice, piece in flow.events():
        if choice.index not in begun:
            begun.add(choice.index)
            yield _chat_chunk(flow, choice, Delta(role="assistant", content=""))
        told = choice.tell()
        if piece or told:
            yield _chat_chunk(flow, choice, Delta(content=piece), told)
        if choice.finish is not None:
            yield _chat_chunk(flow, choice, Delta(), finished=True)
    if flow.ask.usage:
        yield _chat_chunk(flow, None, Delta(), usage=True)


async def completion_stream(flow: Flow) -> AsyncIterator[BaseModel]:
    """Chunks of a completion; what is echoed comes with the first."""
    begun = set()
    async for choice, piece in flow.events():
        if choice.index not in begun:
            begun.add(choice.index)
            piece = choice.text
        if len(choice.told) > MANY:
            yield _completion(flow, [await in_turn(_completion_choice, flow, choice, piece)])
        elif piece or choice.told or choice.finish is not None:
            yield _completion(flow, [_completion_choice(flow, choice, piece)])
    if flow.ask.usage:
        yield _completion(flow, [], usage=True)


def chunks_of(flow: Flow) -> AsyncIterator[BaseModel]:
    """The stream of a flow in the shape of its API."""
    return chat_stream(flow) if flow.ask.chat else completion_stream(flow)


async def answer_of(flow: Flow) -> bytes:
    """The whole answer of a flow in the shape of its API, as JSON."""
    async for _ in flow.events():
        pass
    make = chat_answer if flow.ask.chat else completion_answer
    # Beside the loop: log-probabilities of many tokens take long to write down.
    return await in_turn(lambda: _json(make(flow)))


async def server_sent(first: BaseModel, rest: AsyncIterator[BaseModel]) -> AsyncIterator[tuple[bytes, int]]:
    """Events as they go over the wire, each with what the request is answered with if it was the last: 200 or an error."""
    try:
        yield _event(first), LEFT
        async for chunk in rest:
            yield _event(chunk), LEFT
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it was, the client must not take the answer for whole
        problem = refusal(error)
        if problem.status == 500:
            _LOG.exception("an answer ended in a defect", exc_info=error)
        yield b"data: " + encode(problem.body()) + b"\n\n", problem.status
    else:
        yield b"data: [DONE]\n\n", 200


def _event(chunk: BaseModel) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def _json(value: BaseModel) -> bytes:
    return value.model_dump_json(exclude_unset=True).encode()


def _fingerprint(flow: Flow) -> str:
    return f"fp_{flow.served.fingerprint[:16]}"


def _chat_chunk(
    flow: Flow, choice: Choice | None, delta: Delta, told: Sequence[Shown] = (), *, finished: bool = False,
    usage: bool = False,
) -> ChatChunk:  # fmt: skip
    choices = []
    if choice is not None:
        logprobs = _chat_logprobs(flow, told) if told else None
        finish = choice.finish if finished else None
        choices = [ChatChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, finish_reason=finish)]
    chunk = ChatChunk(
        id=f"chatcmpl-{flow.id}", object="chat.completion.chunk", created=flow.created, model=flow.served.name,
        choices=choices, system_fingerprint=_fingerprint(flow),
    )  # fmt: skip
    if flow.ask.usage:
        chunk.usage = flow.usage() if usage else None
    return chunk


def _completion(flow: Flow, choices: list[CompletionChoice], *, usage: bool = False) -> Completion:
    found = Completion(
        id=f"cmpl-{flow.id}", object="text_completion", created=flow.created, model=flow.served.name, choices=choices,
        system_fingerprint=_fingerprint(flow),
    )  # fmt: skip
    if usage or flow.ask.usage:
        found.usage = flow.usage() if usage else None
    return found


def _completion_choice(flow: Flow, choice: Choice, text: str) -> CompletionChoice:
    logprobs = _completion_logprobs(flow, choice.tell()) if flow.ask.scored else None
    return CompletionChoice(index=choice.index, text=text, logprobs=logprobs, finish_reason=choice.finish)


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


def _bytes(text: str) -> list[int] | None:
    return None if "\ufffd" in text else list(text.encode())


def _chat_logprobs(flow: Flow, told: Sequence[Shown]) -> ChatLogprobs | None:
    if not flow.ask.scored:
        return None
    content = []
    for score, _, _ in told:
        text = flow.token_text(score.token)
        others = [(flow.token_text(token), logprob) for token, logprob in score.top]
        top = [TopLogprob(token=t, bytes=_bytes(t), logprob=_number(p)) for t, p in others]
        content.append(TokenLogprob(token=text, bytes=_bytes(text), logprob=_number(score.logprob), top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def _by_text(flow: Flow, score: TokenScore) -> dict[str, float]:
    """The likeliest tokens, and the one that stands there; of several with one text (parts of characters) the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(flow.token_text(token), _number(logprob))
    return found


def _completion_logprobs(flow: Flow, told: Sequence[Shown]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[flow.token_text(shown.score.token) for shown in told],
        token_logprobs=[_number(shown.score.logprob) if shown.known else None for shown in told],
        top_logprobs=[_by_text(flow, shown.score) if shown.known else None for shown in told],
        text_offset=[shown.offset for shown in told],
    )

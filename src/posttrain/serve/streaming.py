"""The answers of a flow as response models of the two APIs: chat completions and completions, whole or as server-sent events.

A chat stream starts with the role of each completion and ends with its `finish_reason`; then come the usage, if requested,
and `[DONE]`. An error after the start is an event with the error envelope, and no `[DONE]` follows.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Sequence

from pydantic import BaseModel

from posttrain.generate.requests import TokenScore
from posttrain.serve.answering import Choice, Flow, ScoredToken
from posttrain.serve.errors import encode, refusal
from posttrain.serve.responses import (
    AssistantMessage,
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
from posttrain.serve.turns import run_in_text_thread

# JSON has no infinity: this stands for a log-probability of −inf.
LOWEST_LOGPROB = -9999.0
# Status in the metrics: the client disconnected before the end of its answer (nginx's 499).
CLIENT_CLOSED = 499
# A chunk with more scores than this holds an echoed prompt; it is serialised outside the event loop.
LONG_ECHO_TOKENS = 16
_LOG = logging.getLogger("posttrain.serve")


def chat_answer(flow: Flow) -> ChatCompletion:
    """The whole answer of a finished flow."""
    choices = []
    for choice in flow.choices:
        assert choice.finish is not None
        message = AssistantMessage(role="assistant", content=choice.text, refusal=None)
        logprobs = _chat_logprobs(flow, choice.take_pending())
        choices.append(ChatChoice(index=choice.index, message=message, logprobs=logprobs, finish_reason=choice.finish))
    return ChatCompletion(
        id=f"chatcmpl-{flow.id}", object="chat.completion", created=flow.created, model=flow.served.name, choices=choices,
        usage=flow.usage(), system_fingerprint=_fingerprint(flow),
    )  # fmt: skip


def completion_answer(flow: Flow) -> Completion:
    """The whole answer of a finished flow."""
    return _completion(flow, [_completion_choice(flow, choice, choice.text) for choice in flow.choices], usage=True)


async def chat_stream(flow: Flow) -> AsyncIterator[BaseModel]:
    """Chunks of a chat completion."""
    started = set()
    async for choice, piece in flow.events():
        if choice.index not in started:
            started.add(choice.index)
            yield _chat_chunk(flow, choice, Delta(role="assistant", content=""))
        scores = choice.take_pending()
        if piece or scores:
            yield _chat_chunk(flow, choice, Delta(content=piece), scores)
        if choice.finish is not None:
            yield _chat_chunk(flow, choice, Delta(), finished=True)
    if flow.parsed.usage:
        yield _chat_chunk(flow, None, Delta(), usage=True)


async def completion_stream(flow: Flow) -> AsyncIterator[BaseModel]:
    """Chunks of a completion. The first chunk contains the echoed prompt."""
    started = set()
    async for choice, piece in flow.events():
        if choice.index not in started:
            started.add(choice.index)
            piece = choice.text
        if len(choice.pending) > LONG_ECHO_TOKENS:
            yield _completion(flow, [await run_in_text_thread(_completion_choice, flow, choice, piece)])
        elif piece or choice.pending or choice.finish is not None:
            yield _completion(flow, [_completion_choice(flow, choice, piece)])
    if flow.parsed.usage:
        yield _completion(flow, [], usage=True)


def chunks_of(flow: Flow) -> AsyncIterator[BaseModel]:
    """The chunks of a flow in the format of its API."""
    return chat_stream(flow) if flow.parsed.chat else completion_stream(flow)


async def answer_of(flow: Flow) -> bytes:
    """The whole answer of a flow in the format of its API, as JSON."""
    async for _ in flow.events():
        pass
    make = chat_answer if flow.parsed.chat else completion_answer
    # Outside the event loop: serialising many log-probabilities takes long.
    return await run_in_text_thread(lambda: _json(make(flow)))


async def server_sent(first: BaseModel, rest: AsyncIterator[BaseModel]) -> AsyncIterator[tuple[bytes, int]]:
    """Server-sent events as bytes, each with the status to record if it is the last one."""
    try:
        yield _event(first), CLIENT_CLOSED
        async for chunk in rest:
            yield _event(chunk), CLIENT_CLOSED
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - on any failure the client must learn that the answer is incomplete
        problem = refusal(error)
        if problem.status == 500:
            _LOG.exception("an answer ended with an internal error", exc_info=error)
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
    flow: Flow, choice: Choice | None, delta: Delta, scores: Sequence[ScoredToken] = (), *, finished: bool = False,
    usage: bool = False,
) -> ChatChunk:  # fmt: skip
    choices = []
    if choice is not None:
        logprobs = _chat_logprobs(flow, scores) if scores else None
        finish = choice.finish if finished else None
        choices = [ChatChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, finish_reason=finish)]
    chunk = ChatChunk(
        id=f"chatcmpl-{flow.id}", object="chat.completion.chunk", created=flow.created, model=flow.served.name,
        choices=choices, system_fingerprint=_fingerprint(flow),
    )  # fmt: skip
    if flow.parsed.usage:
        chunk.usage = flow.usage() if usage else None
    return chunk


def _completion(flow: Flow, choices: list[CompletionChoice], *, usage: bool = False) -> Completion:
    completion = Completion(
        id=f"cmpl-{flow.id}", object="text_completion", created=flow.created, model=flow.served.name, choices=choices,
        system_fingerprint=_fingerprint(flow),
    )  # fmt: skip
    if usage or flow.parsed.usage:
        completion.usage = flow.usage() if usage else None
    return completion


def _completion_choice(flow: Flow, choice: Choice, text: str) -> CompletionChoice:
    logprobs = _completion_logprobs(flow, choice.take_pending()) if flow.parsed.scored else None
    return CompletionChoice(index=choice.index, text=text, logprobs=logprobs, finish_reason=choice.finish)


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def _bytes(text: str) -> list[int] | None:
    return None if "\ufffd" in text else list(text.encode())


def _chat_logprobs(flow: Flow, scores: Sequence[ScoredToken]) -> ChatLogprobs | None:
    if not flow.parsed.scored:
        return None
    content = []
    for score, _, _ in scores:
        text = flow.token_text(score.token)
        alternatives = [(flow.token_text(token), logprob) for token, logprob in score.top]
        top = [TopLogprob(token=t, bytes=_bytes(t), logprob=_number(p)) for t, p in alternatives]
        content.append(TokenLogprob(token=text, bytes=_bytes(text), logprob=_number(score.logprob), top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def _by_text(flow: Flow, score: TokenScore) -> dict[str, float]:
    """Log-probabilities of the likeliest tokens and of the chosen one. Of tokens with equal text the likeliest wins."""
    by_text: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        by_text.setdefault(flow.token_text(token), _number(logprob))
    return by_text


def _completion_logprobs(flow: Flow, scores: Sequence[ScoredToken]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[flow.token_text(shown.score.token) for shown in scores],
        token_logprobs=[_number(shown.score.logprob) if shown.has_logprob else None for shown in scores],
        top_logprobs=[_by_text(flow, shown.score) if shown.has_logprob else None for shown in scores],
        text_offset=[shown.offset for shown in scores],
    )

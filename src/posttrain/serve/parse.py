"""Convert request bodies for the engine: prompts become tokens, fields become sampling settings.

Lengths are checked first, in the event loop. Templates and tokenizers are slow on long prompts and run in a thread.
Conversations use the same renderer as training, so a prompt has the same token ids.
"""

import secrets
from functools import partial
from typing import NamedTuple

from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.records import Message
from posttrain.serve.errors import Refusal
from posttrain.serve.limits import Limits
from posttrain.serve.protocol import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, TokenizeRequest
from posttrain.serve.turns import run_in_text_thread

# Default number of new tokens of /v1/completions, as in the OpenAI API.
COMPLETION_TOKENS = 16


class ParsedRequest(NamedTuple):
    """The prompts of one request as token ids, the sampling settings and the completions per prompt. `echoed` is the text
    before each answer. `written` says that the prompts were text and not token ids."""

    prompts: list[list[int]]
    settings: SamplingSettings
    n: int
    chat: bool
    echoed: list[str] | None = None
    scored: bool = False
    stream: bool = False
    usage: bool = False
    written: bool = False
    # For each prompt, whether answers continue its text. Always False for chat.
    continues: tuple[bool, ...] = (False,)


async def parse_chat(body: ChatRequest, base: BaseModel, limits: Limits) -> ParsedRequest:
    """Parse a chat request. Raises Refusal for invalid or too long input, DataError if the template rejects the messages."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs", "needs logprobs", do='set "logprobs": true', param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refusal(
            400, "max_tokens", "set together with max_completion_tokens", do="set only one of them", param="max_tokens"
        )
    n = body.n or 1
    limits.check_completions(1, n)
    ids = await _render(body.messages, base, limits)
    requested = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    longest = limits.tokens(requested, limits.default_tokens, len(ids), base.context)
    settings = _settings(body, base, longest, bool(body.logprobs), body.top_logprobs or 0)
    return ParsedRequest([ids], settings, n, True, None, bool(body.logprobs), bool(body.stream), _usage(body))


async def parse_completion(body: CompletionRequest, base: BaseModel, limits: Limits) -> ParsedRequest:
    """Parse a completion request. Raises Refusal for invalid or too long input."""
    prompts, n = body.prompts, body.n or 1
    limits.check_completions(len(prompts), n)
    limits.check_text("prompt", sum(len(prompt) for prompt in prompts if isinstance(prompt, str)))
    vocabulary, ids = base.vocabulary, []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids.append(await run_in_text_thread(base.chat.encode_text, prompt, control=True))
        else:
            ids.append(prompt)
        if not ids[-1]:
            raise Refusal(400, "prompt", "an empty prompt", do="give at least one token", param="prompt")
        if max(ids[-1]) >= vocabulary:  # text can contain a special token that has no row in the embedding
            raise Refusal(400, "prompt", f"token id {max(ids[-1])}", allowed=f"0 to {vocabulary - 1}", param="prompt")
    longest = max(len(prompt) for prompt in ids)
    tokens = limits.tokens(body.max_tokens, COMPLETION_TOKENS, longest, base.context)
    scored = body.logprobs is not None
    settings = _settings(body, base, tokens, scored, body.logprobs or 0)
    echoed = None
    if body.echo:
        texts = zip(prompts, ids, strict=True)
        decode = partial(base.chat.decode, middle=False)
        echoed = [p if isinstance(p, str) else await run_in_text_thread(decode, i) for p, i in texts]
    written = isinstance(prompts[0], str)
    continues = tuple([await run_in_text_thread(base.chat.has_text, prompt) for prompt in ids])
    return ParsedRequest(ids, settings, n, False, echoed, scored, bool(body.stream), _usage(body), written, continues)


async def tokenize(body: TokenizeRequest, base: BaseModel, limits: Limits) -> list[int]:
    """Token ids of a text as /v1/completions reads it, or of messages. With `add_generation_prompt` false, the ids are those of
    a whole training conversation.

    Raises Refusal unless exactly one of `prompt` and `messages` is set.
    """
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "prompt", "prompt and messages", allowed="exactly one of them", param="prompt")
    if body.messages is not None:
        return await _render(body.messages, base, limits, prompt=body.add_generation_prompt is not False)
    assert body.prompt is not None
    limits.check_text("prompt", len(body.prompt))
    return await run_in_text_thread(base.chat.encode_text, body.prompt, control=True)


async def _render(turns: list[ChatMessage], base: BaseModel, limits: Limits, *, prompt: bool = True) -> list[int]:
    messages = [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in turns]
    limits.check_text("messages", sum(len(message.content) for message in messages))
    if prompt:
        return await run_in_text_thread(base.chat.encode_prompt, messages)
    return (await run_in_text_thread(base.chat.encode, messages)).ids


def _settings(body: GenerationRequest, base: BaseModel, tokens: int, scored: bool, top: int) -> SamplingSettings:
    least = body.min_tokens or 0
    if least > tokens:
        raise Refusal(400, "min_tokens", str(least), allowed=f"at most max_tokens ({tokens})", param="min_tokens")
    bias = tuple((int(token), float(value)) for token, value in (body.logit_bias or {}).items())
    vocabulary = base.vocabulary
    unknown = next((token for token, _ in bias if token >= vocabulary), None)
    if unknown is not None:
        raise Refusal(400, "logit_bias", f"token id {unknown}", allowed=f"0 to {vocabulary - 1}", param="logit_bias")
    return SamplingSettings(
        max_new_tokens=tokens, temperature=_or(body.temperature, 1.0), top_p=_or(body.top_p, 1.0),
        seed=secrets.randbits(63) if body.seed is None else body.seed, logprobs=scored, top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0), repetition_penalty=_or(body.repetition_penalty, 1.0), min_new_tokens=least,
        stop=body.stops, logit_bias=bias, top_logprobs=top,
    )  # fmt: skip


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _usage(body: GenerationRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)

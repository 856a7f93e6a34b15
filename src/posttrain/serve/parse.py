"""From what a client sends to what the engine is asked: prompts become tokens, fields become sampling settings.

Lengths are checked first, on the event loop; templates and tokenizers, which take time on long prompts, then run in a
thread. Conversations go through the base's one renderer, so a prompt has the ids that training gave it.
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
from posttrain.serve.turns import in_turn

# New tokens of /v1/completions where none are named, as in the openai package.
COMPLETION_TOKENS = 16


class Ask(NamedTuple):
    """Prompts of one request as token ids, how each is answered and how often. `echoed` stands before each answer; it is what
    the client wrote where the prompts were `written` as text."""

    prompts: list[list[int]]
    settings: SamplingSettings
    n: int
    chat: bool
    echoed: list[str] | None = None
    scored: bool = False
    stream: bool = False
    usage: bool = False
    written: bool = False
    # Of each prompt whether it has a text that its answers continue; those of a chat never do.
    continues: tuple[bool, ...] = (False,)


async def chat_ask(body: ChatRequest, base: BaseModel, limits: Limits) -> Ask:
    """Raises Refusal for what is too long or cannot be, DataError where the template refuses the conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs", "no logprobs", do='set "logprobs": true as well', param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refusal(400, "max_tokens", "max_completion_tokens as well", do="give one of them", param="max_tokens")
    n = body.n or 1
    limits.check_completions(1, n)
    ids = await _render(body.messages, base, limits)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    longest = limits.tokens(asked, limits.default_tokens, len(ids), base.context)
    settings = _settings(body, base, longest, bool(body.logprobs), body.top_logprobs or 0)
    return Ask([ids], settings, n, True, None, bool(body.logprobs), bool(body.stream), _usage(body))


async def completion_ask(body: CompletionRequest, base: BaseModel, limits: Limits) -> Ask:
    """Raises Refusal for what is too long or cannot be."""
    prompts, n = body.prompts, body.n or 1
    limits.check_completions(len(prompts), n)
    limits.check_text("prompt", sum(len(prompt) for prompt in prompts if isinstance(prompt, str)))
    vocabulary, ids = base.vocabulary, []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids.append(await in_turn(base.chat.encode_text, prompt, control=True))
        else:
            ids.append(prompt)
        if not ids[-1]:
            raise Refusal(400, "prompt", "an empty prompt", do="give at least one token", param="prompt")
        if max(ids[-1]) >= vocabulary:  # a text may spell a special token for which the embedding has no row
            raise Refusal(400, "prompt", f"token id {max(ids[-1])}", allowed=f"0 to {vocabulary - 1}", param="prompt")
    longest = max(len(prompt) for prompt in ids)
    tokens = limits.tokens(body.max_tokens, COMPLETION_TOKENS, longest, base.context)
    scored = body.logprobs is not None
    settings = _settings(body, base, tokens, scored, body.logprobs or 0)
    echoed = None
    if body.echo:
        texts = zip(prompts, ids, strict=True)
        decode = partial(base.chat.decode, middle=False)
        echoed = [p if isinstance(p, str) else await in_turn(decode, i) for p, i in texts]
    written = isinstance(prompts[0], str)
    continues = tuple([await in_turn(base.chat.has_text, prompt) for prompt in ids])
    return Ask(ids, settings, n, False, echoed, scored, bool(body.stream), _usage(body), written, continues)


async def tokenize(body: TokenizeRequest, base: BaseModel, limits: Limits) -> list[int]:
    """Ids of a text as /v1/completions reads it, or of a conversation; without `add_generation_prompt` those that training
    gives the whole of it.

    Raises Refusal unless there is one of both.
    """
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "prompt", "prompt and messages", allowed="one of both", param="prompt")
    if body.messages is not None:
        return await _render(body.messages, base, limits, prompt=body.add_generation_prompt is not False)
    assert body.prompt is not None
    limits.check_text("prompt", len(body.prompt))
    return await in_turn(base.chat.encode_text, body.prompt, control=True)


async def _render(turns: list[ChatMessage], base: BaseModel, limits: Limits, *, prompt: bool = True) -> list[int]:
    messages = [Message("system" if turn.role == "developer" else turn.role, turn.text) for turn in turns]
    limits.check_text("messages", sum(len(message.content) for message in messages))
    if prompt:
        return await in_turn(base.chat.encode_prompt, messages)
    return (await in_turn(base.chat.encode, messages)).ids


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

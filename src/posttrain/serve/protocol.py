"""Request bodies: the OpenAI API, with the additions of vLLM for sampling, tokenising and adapters.

A field that would change the answer and is not supported is refused, unless its value asks for the default behaviour
(`"tools": []`). A field that does not affect the answer is ignored. Any other unknown field is refused. Fixed length limits
apply here, before any computation.
"""

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

STOPS, STOP_CHARS, BIASES, MESSAGES, PROMPTS, TOP_LOGPROBS, FIELDS = 16, 256, 1024, 256, 128, 20, 64
# Fields that do not affect the answer.
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
})  # fmt: skip
# Unsupported fields that would change the answer, with the values that ask for the default behaviour; `null` is always one.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (), "suffix": ("",),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": (), "frequency_penalty": (0,),
    "presence_penalty": (0,), "best_of": (1,), "moderation": (),
}  # fmt: skip
# The same for the fields of a message, as clients send earlier answers back.
MESSAGE_IGNORED = frozenset({"name"})
MESSAGE_REFUSED: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],), "tool_call_id": (), "function_call": (), "audio": (), "refusal": (), "annotations": ([],),
}  # fmt: skip


def _encodable(text: str) -> str:
    """Reject a lone surrogate, which JSON can contain and UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("contains a lone surrogate, which is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
Id = Annotated[int, Field(ge=0, le=2**31)]
StopText = Annotated[Text, Field(min_length=1, max_length=STOP_CHARS)]


def _drop(raw: Any, ignored: frozenset[str], refused: dict[str, tuple[Any, ...]]) -> Any:
    """Remove the fields that do not affect the answer."""
    if not isinstance(raw, dict):
        return raw
    return {
        name: value
        for name, value in raw.items()
        if name not in ignored and not (name in refused and (value is None or value in refused[name]))
    }


class Body(BaseModel):
    """A JSON object with strict types and no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, raw: Any) -> Any:
        # Checked first: thousands of unknown fields would give thousands of validation errors.
        if isinstance(raw, dict) and len(raw) > FIELDS:
            raise ValueError(f"{len(raw)} fields, more than {FIELDS}")
        return raw


class TextPart(Body):
    """A text part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """A message. `developer` means the same as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, raw: Any) -> Any:
        return _drop(raw, MESSAGE_IGNORED, MESSAGE_REFUSED)

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(Body):
    """Fields of both kinds of completion."""

    model: Name
    n: Annotated[int, Field(ge=1, le=PROMPTS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=STOPS, fail_fast=True)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=BIASES),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, raw: Any) -> Any:
        raw = _drop(raw, IGNORED, REFUSED)
        if isinstance(raw, dict) and isinstance(bias := raw.get("logit_bias"), dict) and len(bias) > BIASES:
            return {**raw, "logit_bias": dict(itertools.islice(bias.items(), BIASES + 1))}
        return raw

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. With `echo`, `max_tokens` 0 scores the prompt and generates nothing."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=PROMPTS, fail_fast=True)]
        | Annotated[list[Id], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=PROMPTS, fail_fast=True),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, all text or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages rendered with the model's template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Id], Field(max_length=2**16, fail_fast=True)]


class LoadAdapterRequest(Body):
    """POST /v1/load_lora_adapter. `load_inplace` allows replacing the weights of an existing name."""

    lora_name: Name
    lora_path: Annotated[Text, Field(min_length=1, max_length=1024)]
    load_inplace: bool | None = None


class UnloadAdapterRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Name

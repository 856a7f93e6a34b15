"""Response bodies of the OpenAI API. Not included: tool calls, audio, refusals and token details other than `cached_tokens`."""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts. A prompt with several completions counts once. The token that ends an answer is counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """An alternative token. `bytes` is null if the token alone is not a whole character."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(BaseModel):
    """A token of an answer with its log-probability under the model's own distribution."""

    token: str
    bytes: list[int] | None
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry per token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """A completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions. `system_fingerprint` is the start of the content hash of the policy."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class Delta(BaseModel):
    """The new part of a message in a chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The new part of one completion in a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A server-sent event of /v1/chat/completions; `usage` is present if requested."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class CompletionLogprobs(BaseModel):
    """One entry per token in each list. The first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A completion, or its new part in a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer of /v1/completions, or one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str


class ModelCard(BaseModel):
    """A served policy. `root` is the base, `parent` the policy that its training started from."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    fingerprint: str
    stage: str | None
    scores: dict[str, float] | None
    max_model_len: int


class ModelList(BaseModel):
    """All served policies, the base first."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(BaseModel):
    """The answer of /detokenize."""

    prompt: str


class Status(BaseModel):
    """The answer of /health and /ready."""

    status: Literal["ok", "ready"]


class ErrorDetail(BaseModel):
    """The content of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail

"""The limits of one server. They are checked before a prompt is tokenised.

`protocol.py` holds the fixed limits of single fields (stop strings, logit biases, messages).
"""

from typing import NamedTuple

from posttrain.serve.errors import Refusal


class Limits(NamedTuple):
    """Sizes in bytes, characters and tokens, times in seconds."""

    body_bytes: int = 2**20
    prompt_chars: int = 2**18
    max_tokens: int = 4096
    default_tokens: int = 512
    completions: int = 16
    queue: int = 256
    body_seconds: float = 30.0
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    shutdown_seconds: float = 30.0
    header_seconds: float = 10.0

    def check_completions(self, prompts: int, n: int) -> None:
        """Raise Refusal if a request asks for too many completions."""
        if prompts * n > self.completions:
            completions = f"{n} completions for each of {prompts} prompts" if prompts > 1 else f"{n} completions"
            raise Refusal(400, "n", completions, allowed=f"at most {self.completions} per request", param="n")

    def check_text(self, field: str, characters: int) -> None:
        """Raise Refusal for a prompt with too many characters."""
        if characters > self.prompt_chars:
            raise Refusal(
                400, field, f"{characters} characters", allowed=f"at most {self.prompt_chars}", do="shorten it", param=field,
                code="context_length_exceeded",
            )  # fmt: skip

    def tokens(self, requested: int | None, default: int, prompt: int, context: int) -> int:
        """The number of new tokens of an answer. Raises Refusal if it exceeds the limit of the server or of the model."""
        if requested is not None and requested > self.max_tokens:
            raise Refusal(400, "max_tokens", str(requested), allowed=f"at most {self.max_tokens}", param="max_tokens")
        room = context - prompt
        tokens = min(default, self.max_tokens, max(room, 1)) if requested is None else requested
        if tokens > room:
            raise Refusal(
                400, "max_tokens", f"a prompt of {prompt} tokens and {tokens} new ones", allowed=f"together at most {context}",
                do="shorten the prompt or max_tokens", param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return tokens

"""What one server gives away at most. Everything here is checked before a prompt is tokenised.

Lengths of fields that no server needs longer (stop strings, logit biases, messages) stand in `protocol.py`.
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
        """Raise Refusal where one request asks for too many."""
        if prompts * n > self.completions:
            found = f"{n} completions of each of {prompts} prompts" if prompts > 1 else f"{n} completions"
            raise Refusal(400, "n", found, allowed=f"at most {self.completions} a request", param="n")

    def check_text(self, field: str, characters: int) -> None:
        """Raise Refusal for a prompt that is too long to be looked at."""
        if characters > self.prompt_chars:
            raise Refusal(
                400, field, f"{characters} characters", allowed=f"at most {self.prompt_chars}", do="shorten it", param=field,
                code="context_length_exceeded",
            )  # fmt: skip

    def tokens(self, asked: int | None, default: int, prompt: int, context: int) -> int:
        """How many new tokens an answer may have. Raises Refusal where it is more than this server or the model allows."""
        if asked is not None and asked > self.max_tokens:
            raise Refusal(400, "max_tokens", str(asked), allowed=f"at most {self.max_tokens}", param="max_tokens")
        room = context - prompt
        wanted = min(default, self.max_tokens, max(room, 1)) if asked is None else asked
        if wanted > room:
            raise Refusal(
                400, "max_tokens", f"a prompt of {prompt} tokens and {wanted} new ones", allowed=f"together at most {context}",
                do="shorten the prompt or max_tokens", param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return wanted

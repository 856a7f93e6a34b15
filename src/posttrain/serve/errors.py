"""The error envelope of the openai package, used for every error response.

    {"error": {"message", "type", "param", "code"}}

`Refusal` adds the HTTP status. Responses contain no traceback, no file name and no text of the request.
"""

import json
from typing import Any

from posttrain.errors import AdapterError, BusyError, PosttrainError

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "unavailable_error",
}  # fmt: skip
# Seconds after which a refused client may retry.
RETRY_AFTER = 1


class Refusal(PosttrainError):
    """An error response. `param` names the invalid field, `code` is machine-readable, `scheme` is the authentication scheme of
    a 401."""

    def __init__(
        self, status: int, where: str, found: str, *, allowed: str = "", do: str = "", param: str | None = None,
        code: str | None = None, scheme: str = "bearer",
    ) -> None:  # fmt: skip
        super().__init__(where, found, allowed=allowed, do=do)
        self.status, self.param, self.code, self.scheme = status, param, code, scheme

    def headers(self) -> dict[str, str]:
        """The HTTP headers of this status."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER)}
        challenge = 'Basic realm="posttrain", charset="UTF-8"' if self.scheme == "basic" else "Bearer"
        return {"www-authenticate": challenge} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        """The JSON envelope."""
        kind = TYPES.get(self.status, TYPES[400])
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: BaseException) -> Refusal:
    """Convert any exception. The message of an internal error is not sent; only its type is."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, BusyError):
        return Refusal(429, error.where, error.found, allowed=error.allowed, do=error.do, code="queue_full")
    if isinstance(error, AdapterError):
        return Refusal(404, error.where, error.found, allowed=error.allowed, do=error.do, param="model", code="model_not_found")
    if isinstance(error, PosttrainError):
        return Refusal(400, error.where, error.found, allowed=error.allowed, do=error.do)
    return Refusal(500, "server", f"internal error: {type(error).__name__}", do="see the server's log", code="internal_error")


def encode(value: Any) -> bytes:
    """JSON as UTF-8. A lone surrogate, which UTF-8 cannot encode, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")

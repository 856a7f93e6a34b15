"""The routes. Each parses a request, calls the service and returns a response model. Only this file imports FastAPI.

Not included: the documentation pages of FastAPI, which load scripts from other hosts. The schema is at /openapi.json.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import pydantic
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from posttrain import __version__
from posttrain.errors import PosttrainError
from posttrain.serve.connections import connection_limit
from posttrain.serve.errors import Refusal, encode, refusal
from posttrain.serve.keys import KeyFile
from posttrain.serve.metrics import CONTENT_TYPE, UNKNOWN
from posttrain.serve.middleware import OWNER, Middleware
from posttrain.serve.parse import tokenize
from posttrain.serve.protocol import (
    MESSAGE_REFUSED,
    REFUSED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from posttrain.serve.responses import (
    ChatCompletion,
    Completion,
    Detokenized,
    ErrorBody,
    ModelCard,
    ModelList,
    Status,
    Tokens,
)
from posttrain.serve.service import Service
from posttrain.serve.streaming import CLIENT_CLOSED, answer_of, chunks_of, server_sent
from posttrain.serve.turns import run_in_text_thread

PLAYGROUND = files("posttrain") / "serve" / "playground.html"
# One owner may hold 1 / OWNER_FRACTION of the connection limit as admitted requests. All owners together hold at most two
# thirds of it, which leaves connections for new clients.
OWNER_FRACTION = 7
# Routes that generate text; the metrics count their requests.
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in ("4XX", "5XX")}


def build_app(service: Service, *, keys: KeyFile | None, hosts: frozenset[str]) -> Middleware:
    """Build the application: the routes behind the middleware. Without keys, only requests to `hosts` are admitted."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="posttrain", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
        responses=_ERRORS,
    )  # fmt: skip
    middleware = Middleware(
        app, keys=keys, hosts=hosts, limits=service.limits,
        places=max(1, min(service.places, connection_limit() // OWNER_FRACTION)),
        refused=lambda status: service.metrics.request(UNKNOWN, status),
    )  # fmt: skip
    _add_errors(app, service)
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_monitoring(app, service, middleware)
    return middleware


def _add_generation(app: FastAPI, service: Service) -> None:
    async def generate(body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Return an answer or stream it. An error before the first token sets the HTTP status in both cases."""
        model = service.name_of(body.model)
        service.metrics.begin(model)
        flow = None
        try:
            flow = await service.open(body, request.scope[OWNER])
            if not flow.parsed.stream:
                answer = await answer_of(flow)
                flow.cancel()
                service.metrics.end(model, 200)
                return Response(answer, media_type="application/json")
            chunks = chunks_of(flow)
            first = await anext(chunks)
        except BaseException as error:
            if flow is not None:
                flow.cancel()
            service.metrics.end(model, _status(error))
            raise

        async def stream() -> AsyncIterator[bytes]:
            status = CLIENT_CLOSED
            try:
                async for event, final_status in server_sent(first, chunks):
                    status = final_status
                    yield event
            finally:
                flow.cancel()
                service.metrics.end(model, status)

        return StreamingResponse(stream(), media_type="text/event-stream")

    streamed: dict[str, Any] = {"content": {"text/event-stream": {}}}

    @app.post(GENERATION_PATHS[0], responses={200: {"model": ChatCompletion, **streamed}})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await generate(body, request)

    @app.post(GENERATION_PATHS[1], responses={200: {"model": Completion, **streamed}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await generate(body, request)


def _status(error: BaseException) -> int:
    return CLIENT_CLOSED if isinstance(error, asyncio.CancelledError) else refusal(error).status


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        return _json(ModelList(object="list", data=service.cards()))

    @app.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}})
    async def one_model(model: str) -> Response:
        return _json(service.card(model))

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.post("/v1/load_lora_adapter", responses=text)
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        return Response(await service.load(body), media_type="text/plain")

    @app.post("/v1/unload_lora_adapter", responses=text)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        return Response(await service.unload(body.lora_name), media_type="text/plain")


def _add_tokens(app: FastAPI, service: Service) -> None:
    base = service.base

    @app.post("/tokenize", responses={200: {"model": Tokens}})
    async def tokens(body: TokenizeRequest) -> Response:
        if body.model is not None:
            service.card(body.model)
        ids = await tokenize(body, base, service.limits)
        return _json(Tokens(count=len(ids), max_model_len=base.context, tokens=ids))

    @app.post("/detokenize", responses={200: {"model": Detokenized}})
    async def text(body: DetokenizeRequest) -> Response:
        if body.model is not None:
            service.card(body.model)
        vocabulary = base.vocabulary
        if body.tokens and max(body.tokens) >= vocabulary:
            raise Refusal(400, "tokens", f"token id {max(body.tokens)}", allowed=f"0 to {vocabulary - 1}", param="tokens")
        return _json(Detokenized(prompt=await run_in_text_thread(base.chat.decode, body.tokens, True, middle=False)))


def _add_monitoring(app: FastAPI, service: Service, middleware: Middleware) -> None:
    @app.get("/health", responses={200: {"model": Status}})
    async def health() -> Response:
        return _json(Status(status="ok"))

    @app.get("/ready", responses={200: {"model": Status}})
    async def ready() -> Response:
        if middleware.draining or not service.ready:
            raise Refusal(503, "server", "not ready", do="try again later", code="not_ready")
        return _json(Status(status="ready"))

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    if not PLAYGROUND.is_file():
        return
    page = PLAYGROUND.read_text(encoding="utf-8")
    policy = page_policy(page)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": policy})


def page_policy(page: str) -> str:
    """A content security policy that allows only the page's own scripts and styles, by their hashes."""
    allowed = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(problem: Refusal, more: dict[str, str] | None = None) -> Response:
        body, headers = encode(problem.body()), {**(more or {}), **problem.headers()}
        return Response(body, problem.status, headers, media_type="application/json")

    @app.exception_handler(PosttrainError)
    async def posttrain_error(request: Request, error: PosttrainError) -> Response:
        return answer(refusal(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        if request.url.path in GENERATION_PATHS:
            model = error.body.get("model") if isinstance(error.body, dict) else None
            service.metrics.request(service.name_of(model) if isinstance(model, str) else UNKNOWN, 400)
        return answer(_validation_refusal(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return answer(Refusal(error.status_code, "request", error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(refusal(error))


def _validation_refusal(error: RequestValidationError) -> Refusal:
    """Report the validation error with the longest path: for a union of types, the alternative that matched furthest."""
    located = [(_error_path(error.body, e["loc"][1:], missing=e["type"] == "missing"), e) for e in error.errors()[:50]]
    path, deepest = max(located, key=lambda pair: len(pair[0]))
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")[:200]
    message = deepest["msg"].removeprefix("Value error, ")
    if deepest["type"] == "extra_forbidden":
        message = "not supported" if path[-1] in (*REFUSED, *MESSAGE_REFUSED) else "no such field"
    return Refusal(400, param or "body", message, param=param or None)


def _error_path(body: Any, loc: Sequence[int | str], *, missing: bool) -> list[int | str]:
    """The path of an error in the body. pydantic's `loc` also contains type names, which are skipped."""
    path = []
    for part in loc:
        if isinstance(part, int):
            exists = isinstance(body, list) and part < len(body)
        else:
            exists = isinstance(body, dict) and part in body
        if exists:
            body = body[part]
            path.append(part)
    return [*path, *loc[-1:]] if missing else path


def _json(value: pydantic.BaseModel) -> Response:
    return Response(value.model_dump_json(exclude_unset=True), media_type="application/json")

"""The service behind the routes: one engine, its policies, and a flow for each request.

Authentication is in `middleware.py`, the HTTP routes in `app.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from posttrain.errors import AdapterError, BusyError
from posttrain.generate.engine import ROWS
from posttrain.generate.worker import Server, serving
from posttrain.models.base_model import BaseModel
from posttrain.serve.answering import Flow
from posttrain.serve.errors import Refusal
from posttrain.serve.limits import Limits
from posttrain.serve.metrics import UNKNOWN, ServerMetrics
from posttrain.serve.parse import parse_chat, parse_completion
from posttrain.serve.protocol import ChatRequest, CompletionRequest, LoadAdapterRequest
from posttrain.serve.responses import ModelCard
from posttrain.serve.store import AdapterStore, ServedModel


class Service:
    """One base and its adapters. Requests are answered within `running`."""

    def __init__(self, base: BaseModel, store: AdapterStore, limits: Limits) -> None:
        self.base, self.store, self.limits = base, store, limits
        self.created = int(time.time())
        # Requests that may be admitted: those in the batch and those in the queue.
        self.places = ROWS[base.device.type] + limits.queue
        self._server: Server | None = None
        self.metrics = ServerMetrics({
            "posttrain_queue_length": ("Completions that have not started.", lambda: self._of(lambda s: s.waiting)),
            "posttrain_prefix_tokens_asked": ("Prompt tokens looked up.", lambda: self._of(lambda s: s.prefixes.asked)),
            "posttrain_prefix_tokens_found": ("Of these, found in the cache.", lambda: self._of(lambda s: s.prefixes.hits)),
            "posttrain_prefix_bytes": ("Memory of the prefix cache.", lambda: self._of(lambda s: s.prefixes.bytes)),
        })  # fmt: skip

    def _of(self, number: Callable[[Server], int]) -> int:
        return 0 if self._server is None else number(self._server)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine's thread within the block."""
        async with serving(self.base, self.places) as self._server:
            yield

    @property
    def ready(self) -> bool:
        """Whether the engine accepts requests."""
        return self._server is not None and not self._server.stopped

    @property
    def idle(self) -> bool:
        """Whether the engine has nothing to do."""
        return self._server is None or self._server.idle

    async def stop(self) -> None:
        """Stop the engine. Running requests end with an error."""
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    async def open(self, body: ChatRequest | CompletionRequest, owner: str) -> Flow:
        """Start a request. Raises an error that `refusal` converts; AdapterError for a model that is not served."""
        try:
            async with asyncio.timeout(self.limits.queue_seconds):
                served = await self.store.use(body.model)
        except TimeoutError:
            problem = f"the adapter of {body.model!r} was not loaded within --queue-seconds"
            raise Refusal(503, "server", problem, do="try again later", code="timeout") from None
        if isinstance(body, ChatRequest):
            parsed = await parse_chat(body, self.base, self.limits)
        else:
            parsed = await parse_completion(body, self.base, self.limits)
        assert self._server is not None
        try:
            # With keys the engine is shared fairly between their owners, without keys between policies.
            return Flow(
                parsed, served, server=self._server, chat=self.base.chat, owner=owner or served.name, limits=self.limits,
                metrics=self.metrics,
            )  # fmt: skip
        except BusyError:
            if not self._server.stopped:
                raise
            raise Refusal(503, "server", "the engine has stopped", do="restart the server", code="stopped") from None

    def name_of(self, model: str) -> str:
        """The metrics label of a model."""
        return model if model in self.store else UNKNOWN

    def cards(self) -> list[ModelCard]:
        """The cards of all served policies."""
        return [self._card(served) for served in self.store.models()]

    def card(self, name: str) -> ModelCard:
        """The card of a policy. Raises AdapterError if it is not served."""
        match = next((card for card in self.cards() if card.id == name), None)
        if match is None:
            names = ", ".join(served.name for served in self.store.models())
            raise AdapterError("model", f'"{name}" is not served', allowed=f"there is: {names}")
        return match

    def _card(self, served: ServedModel) -> ModelCard:
        return ModelCard(
            id=served.name, object="model", created=self.created, owned_by="posttrain", root=served.root, parent=served.parent,
            fingerprint=served.fingerprint, stage=served.stage, scores=served.scores, max_model_len=self.base.context,
        )  # fmt: skip

    async def load(self, body: LoadAdapterRequest) -> str:
        """Load an adapter, or replace the weights of a name. Raises Refusal."""
        try:
            served = await self.store.load(body.lora_name, body.lora_path, replace=bool(body.load_inplace))
        except AdapterError as error:
            raise Refusal(400, error.where, error.found, allowed=error.allowed, do=error.do, code="adapter") from None
        return f"Success: LoRA adapter '{served.name}' added successfully."

    async def unload(self, name: str) -> str:
        """Unload an adapter; its running requests finish. Raises AdapterError if it is not served."""
        await self.store.unload(name)
        self.metrics.forget(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

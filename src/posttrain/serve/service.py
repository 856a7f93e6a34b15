"""What a server does, without the web around it: one engine, its policies, and a flow for each request.

Left out: who may ask, and in which protocol (`gate.py`, `app.py`).
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
from posttrain.serve.metrics import UNKNOWN, Metrics
from posttrain.serve.parse import chat_ask, completion_ask
from posttrain.serve.protocol import ChatRequest, CompletionRequest, LoadAdapterRequest
from posttrain.serve.responses import ModelCard
from posttrain.serve.store import AdapterStore, Served


class Service:
    """One base and its adapters. Answers inside of `running`."""

    def __init__(self, base: BaseModel, store: AdapterStore, limits: Limits) -> None:
        self.base, self.store, self.limits = base, store, limits
        self.created = int(time.time())
        # Requests that may be inside: those that are computed, and those that wait.
        self.places = ROWS[base.device.type] + limits.queue
        self._server: Server | None = None
        self.metrics = Metrics({
            "posttrain_queue_length": ("Completions that have not begun.", lambda: self._of(lambda s: s.waiting)),
            "posttrain_prefix_tokens_asked": ("Tokens of prompts looked for.", lambda: self._of(lambda s: s.prefixes.asked)),
            "posttrain_prefix_tokens_found": ("Of these, not computed again.", lambda: self._of(lambda s: s.prefixes.hits)),
            "posttrain_prefix_bytes": ("Memory of prompts that are kept.", lambda: self._of(lambda s: s.prefixes.bytes)),
        })  # fmt: skip

    def _of(self, number: Callable[[Server], int]) -> int:
        return 0 if self._server is None else number(self._server)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine's thread runs inside."""
        async with serving(self.base, self.places) as self._server:
            yield

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._server is not None and not self._server.stopped

    @property
    def idle(self) -> bool:
        """Whether the engine has nothing to do."""
        return self._server is None or self._server.idle

    async def stop(self) -> None:
        """End what is in flight, with an error for each; nothing is taken any more."""
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    async def open(self, body: ChatRequest | CompletionRequest, owner: str) -> Flow:
        """A flow of a request. Raises what `refusal` knows; an AdapterError for a model that is not served."""
        try:
            async with asyncio.timeout(self.limits.queue_seconds):
                served = await self.store.use(body.model)
        except TimeoutError:
            found = f"the adapter of {body.model!r} was not read within the queue's limit"
            raise Refusal(503, "server", found, do="ask again later", code="timeout") from None
        if isinstance(body, ChatRequest):
            ask = await chat_ask(body, self.base, self.limits)
        else:
            ask = await completion_ask(body, self.base, self.limits)
        assert self._server is not None
        try:
            # Without keys the policies share the engine fairly, with keys their holders do.
            return Flow(
                ask, served, server=self._server, chat=self.base.chat, owner=owner or served.name, limits=self.limits,
                metrics=self.metrics,
            )  # fmt: skip
        except BusyError:
            if not self._server.stopped:
                raise
            raise Refusal(503, "server", "the engine has stopped", do="start the server again", code="stopped") from None

    def name_of(self, model: str) -> str:
        """A name for the metrics."""
        return model if model in self.store else UNKNOWN

    def cards(self) -> list[ModelCard]:
        """What can be asked for."""
        return [self._card(served) for served in self.store.models()]

    def card(self, name: str) -> ModelCard:
        """One of them. Raises AdapterError."""
        found = next((card for card in self.cards() if card.id == name), None)
        if found is None:
            there = ", ".join(served.name for served in self.store.models())
            raise AdapterError("model", f'"{name}" is not served', allowed=f"there is: {there}")
        return found

    def _card(self, served: Served) -> ModelCard:
        return ModelCard(
            id=served.name, object="model", created=self.created, owned_by="posttrain", root=served.root, parent=served.parent,
            fingerprint=served.fingerprint, stage=served.stage, scores=served.scores, max_model_len=self.base.context,
        )  # fmt: skip

    async def load(self, body: LoadAdapterRequest) -> str:
        """Serve another adapter, or other weights under a name. Raises Refusal."""
        try:
            served = await self.store.load(body.lora_name, body.lora_path, replace=bool(body.load_inplace))
        except AdapterError as error:
            raise Refusal(400, error.where, error.found, allowed=error.allowed, do=error.do, code="adapter") from None
        return f"Success: LoRA adapter '{served.name}' added successfully."

    async def unload(self, name: str) -> str:
        """Serve an adapter no longer; what it is answering ends well. Raises AdapterError."""
        await self.store.unload(name)
        self.metrics.forget(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

"""Start the server for a target on disk, and shut it down on SIGTERM.

After the first SIGTERM or Ctrl-C, /ready and new requests get 503. Running requests have `shutdown_seconds` to finish; after
that they end with an error. A second signal ends the wait. The exit code is 0.
"""

import asyncio
import gc
import json
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn

from posttrain.artifacts import read_manifest, verify_files
from posttrain.errors import RecipeError
from posttrain.models.adapter_config import ADAPTER_CONFIG
from posttrain.models.adapter_files import ADAPTER_WEIGHTS, FULL_WEIGHTS
from posttrain.models.target import Target, open_target
from posttrain.serve.app import build_app
from posttrain.serve.connections import ACCEPTED_AT_ONCE, Connections, connection_limit, limited_logging
from posttrain.serve.keys import KeyFile
from posttrain.serve.limits import Limits
from posttrain.serve.middleware import Middleware
from posttrain.serve.service import Service
from posttrain.serve.store import AdapterStore

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
# Keep-alive time of an idle connection; longer than that of common clients.
KEEP_ALIVE_SECONDS = 75
# Switch interval of Python threads.
SWITCH_SECONDS = 0.0005
# Time for clients to read the last events.
LAST_SECONDS = 5
# Connections that may wait to be accepted.
BACKLOG = 2048


def open_service(
    target: str, *, adapters: Sequence[tuple[str, Path]] = (), folder: Path | None = None, name: str | None = None,
    template: str = "auto", budget_bytes: int, limits: Limits,
) -> Service:  # fmt: skip
    """Load a model, or a run with all of its finished policies and their scores.

    Raises PosttrainError if something cannot be loaded.
    """
    opened = open_target(target, template=template)
    run = opened.policies.run if opened.recipe is not None else None
    if run is not None and opened.recipe is not None and opened.recipe.adapter.kind == "full":
        return _full_weights_service(opened, run, name, adapters, folder, limits)
    model = opened.base.source.model
    base_name = name or (Path(model).name if Path(model).exists() else model)
    store = AdapterStore(opened.base, base_name=base_name, folder=folder, budget_bytes=budget_bytes)
    if run is not None:
        scores = read_scores(run)
        for policy in opened.names[1:]:
            verify_files(run / policy, (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
            kind, parent = _origin(run / policy)
            store.offer(policy, run / policy, stage=kind, parent=parent, scores=scores.get(policy))
    for public, path in adapters:
        store.offer(public, path)
    return Service(opened.base, store, limits)


def _full_weights_service(
    opened: Target, run: Path, name: str | None, adapters: Sequence[tuple[str, Path]], folder: Path | None, limits: Limits
) -> Service:
    """Serve one policy of full fine-tuning in place of the base."""
    if adapters or folder is not None:
        raise RecipeError("--adapter", f"{run} has full weights instead of adapters", do="serve the base model to use adapters")
    opened.policies.activate(opened.policy)
    assert opened.policy == "base" or (run / opened.policy / FULL_WEIGHTS).exists()
    kind, parent, scores = None, None, None
    if opened.policy != "base":
        kind, parent = _origin(run / opened.policy)
        scores = read_scores(run).get(opened.policy)
    store = AdapterStore(
        opened.base, base_name=name or opened.policy, folder=None, budget_bytes=0, stage=kind, scores=scores,
        parent=opened.base.source.model if parent == "base" else parent,
    )  # fmt: skip
    return Service(opened.base, store, limits)


def _origin(folder: Path) -> tuple[str | None, str]:
    """The kind of a stage, and the policy that its training started from."""
    manifest = read_manifest(folder) or {}
    return manifest.get("stage"), manifest.get("settings", {}).get("stage", {}).get("init", "base")


def read_scores(run: Path) -> dict[str, dict[str, float]]:
    """The value of each measure by policy, if the run was evaluated."""
    path = run / "scorecard.json"
    if not path.is_file():
        return {}
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        stage["name"]: {measure: entry["value"] for measure, entry in stage["measures"].items()} for stage in card["stages"]
    }


def check_host(host: str, keys: KeyFile | None) -> None:
    """Raise RecipeError for an address that other machines can reach, if there are no keys."""
    if keys is None and not _is_loopback(host):
        raise RecipeError(
            f"--host {host}", "can be reached from other machines, and there are no keys", allowed="127.0.0.1 without keys",
            do="give --keys FILE",
        )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve(service: Service, *, host: str, port: int, keys: KeyFile | None, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. Calls `announce` with the address. Raises RecipeError for a bad address."""
    check_host(host, keys)
    # The loaded objects stay for the life of the process. Freezing them keeps the garbage collector from scanning them.
    gc.collect()
    gc.freeze()
    # A short switch interval: each answer waits several times for the engine's thread to yield to the event loop.
    sys.setswitchinterval(SWITCH_SECONDS)
    middleware = build_app(service, keys=keys, hosts=LOOPBACK | {host, f"[{host}]"})
    asyncio.run(_until_signals(middleware, service, bind(host, port), announce))


async def _until_signals(
    middleware: Middleware, service: Service, listener: socket.socket, announce: Callable[[str], None]
) -> None:
    stop_signals, loop = asyncio.Semaphore(0), asyncio.get_running_loop()

    def started(address: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn's own handlers would end the process with the signal
            loop.add_signal_handler(number, stop_signals.release)
        announce(address)

    await listen(middleware, service, listener, stop_signals, started)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 picks a free one. Raises RecipeError if the address cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise RecipeError(
            f"--host {host} --port {port}", str(error.strerror or error), do="choose another address or port"
        ) from None
    return listener


async def listen(
    middleware: Middleware,
    service: Service,
    listener: socket.socket,
    stop_signals: asyncio.Semaphore,
    started: Callable[[str], None],
) -> None:
    """Serve on a bound socket until `stop_signals` is released. A second release ends the wait for running requests."""
    connections = Connections(most=connection_limit(), header_seconds=service.limits.header_seconds)
    config = uvicorn.Config(
        middleware, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none",
        http=connections.protocol, lifespan="on", timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS + 1, backlog=ACCEPTED_AT_ONCE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        listener.listen(BACKLOG)  # asyncio accepts as many connections per turn of its loop as its own backlog
        address, port = listener.getsockname()[:2]
        started(f"http://{f'[{address}]' if ':' in address else address}:{port}")
    ending = _drain(server, connections, middleware, service, stop_signals)
    background = asyncio.create_task(ending), asyncio.create_task(connections.watch())
    with limited_logging():
        await serving
    for task in background:
        task.cancel()


async def _drain(
    server: uvicorn.Server, connections: Connections, middleware: Middleware, service: Service, stop_signals: asyncio.Semaphore
) -> None:  # fmt: skip
    await stop_signals.acquire()
    middleware.draining = True
    second_signal = asyncio.create_task(stop_signals.acquire())
    finished = asyncio.create_task(middleware.empty())
    await asyncio.wait((second_signal, finished), timeout=service.limits.shutdown_seconds, return_when=asyncio.FIRST_COMPLETED)
    second_signal.cancel()
    finished.cancel()
    middleware.stop_reading()
    await service.stop()
    server.should_exit = True
    await asyncio.sleep(LAST_SECONDS)
    connections.end()

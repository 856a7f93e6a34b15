"""From a target on disk to a listening server and, on SIGTERM, back.

On the first SIGTERM or Ctrl-C /ready and new requests get 503, requests in flight have `shutdown_seconds` to finish, and
what is left then ends with an error of its own. A second signal does not wait. The exit code is 0.
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
from posttrain.serve.connections import ACCEPTED_AT_ONCE, Connections, connection_limit, quiet
from posttrain.serve.keys import KeyFile
from posttrain.serve.limits import Limits
from posttrain.serve.middleware import Gate
from posttrain.serve.service import Service
from posttrain.serve.store import AdapterStore

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
# A connection that is not used is kept this long, which is longer than common clients keep theirs.
KEEP_ALIVE_SECONDS = 75
# How long a thread may keep others of Python waiting.
SWITCH_SECONDS = 0.0005
# What clients have to read the last events.
LAST_SECONDS = 5
# Connections that may wait to be taken.
BACKLOG = 2048


def open_service(
    target: str, *, adapters: Sequence[tuple[str, Path]] = (), folder: Path | None = None, name: str | None = None,
    template: str = "auto", budget_bytes: int, limits: Limits,
) -> Service:  # fmt: skip
    """Load what is to be served: a model, or a run with all of its finished policies and their scores.

    Raises PosttrainError for what cannot be loaded.
    """
    found = open_target(target, template=template)
    run = found.policies.run if found.recipe is not None else None
    if run is not None and found.recipe is not None and found.recipe.adapter.kind == "full":
        return _whole(found, run, name, adapters, folder, limits)
    model = found.base.source.model
    base_name = name or (Path(model).name if Path(model).exists() else model)
    store = AdapterStore(found.base, base_name=base_name, folder=folder, budget_bytes=budget_bytes)
    if run is not None:
        scores = read_scores(run)
        for policy in found.names[1:]:
            verify_files(run / policy, (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
            kind, parent = _origin(run / policy)
            store.offer(policy, run / policy, stage=kind, parent=parent, scores=scores.get(policy))
    for public, path in adapters:
        store.offer(public, path)
    return Service(found.base, store, limits)


def _whole(
    found: Target, run: Path, name: str | None, adapters: Sequence[tuple[str, Path]], folder: Path | None, limits: Limits
) -> Service:
    """One policy of full fine-tuning in place of the base."""
    if adapters or folder is not None:
        raise RecipeError("--adapter", f"{run} has whole weights", do="serve the base model to put adapters on it")
    found.policies.activate(found.policy)
    assert found.policy == "base" or (run / found.policy / FULL_WEIGHTS).exists()
    kind, parent, scores = None, None, None
    if found.policy != "base":
        kind, parent = _origin(run / found.policy)
        scores = read_scores(run).get(found.policy)
    store = AdapterStore(
        found.base, base_name=name or found.policy, folder=None, budget_bytes=0, stage=kind, scores=scores,
        parent=found.base.source.model if parent == "base" else parent,
    )  # fmt: skip
    return Service(found.base, store, limits)


def _origin(folder: Path) -> tuple[str | None, str]:
    """The kind of a stage, and the policy that its training started from."""
    manifest = read_manifest(folder) or {}
    return manifest.get("stage"), manifest.get("settings", {}).get("stage", {}).get("init", "base")


def read_scores(run: Path) -> dict[str, dict[str, float]]:
    """Of each policy the value of each measure, where the run was evaluated."""
    path = run / "scorecard.json"
    if not path.is_file():
        return {}
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        stage["name"]: {measure: entry["value"] for measure, entry in stage["measures"].items()} for stage in card["stages"]
    }


def check_host(host: str, keys: KeyFile | None) -> None:
    """Raise RecipeError for an address that others can reach, where there are no keys."""
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


def serve(service: Service, *, host: str, port: int, keys: KeyFile | None, told: Callable[[str], None]) -> None:
    """Listen until a signal comes. `told` gets the address once requests are taken. Raises RecipeError for a bad address."""
    check_host(host, keys)
    # What was loaded stays: without this every large request would have the collector look through all of it.
    gc.collect()
    gc.freeze()
    # The engine's thread gives way to the loop this soon; each answer that is written waits for it several times.
    sys.setswitchinterval(SWITCH_SECONDS)
    gate = build_app(service, keys=keys, hosts=LOOPBACK | {host, f"[{host}]"})
    asyncio.run(_until_signals(gate, service, bind(host, port), told))


async def _until_signals(gate: Gate, service: Service, listener: socket.socket, told: Callable[[str], None]) -> None:
    asked, loop = asyncio.Semaphore(0), asyncio.get_running_loop()

    def started(address: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn's own handlers would end the process with the signal
            loop.add_signal_handler(number, asked.release)
        told(address)

    await listen(gate, service, listener, asked, started)


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address; port 0 takes a free one. Raises RecipeError where it cannot be had."""
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
        raise RecipeError(f"--host {host} --port {port}", str(error.strerror or error), do="choose another") from None
    return listener


async def listen(
    gate: Gate, service: Service, listener: socket.socket, asked: asyncio.Semaphore, started: Callable[[str], None]
) -> None:
    """Take requests from a bound socket until `asked` is released; a second time, and nothing is waited for."""
    connections = Connections(most=connection_limit(), header_seconds=service.limits.header_seconds)
    config = uvicorn.Config(
        gate, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none",
        http=connections.protocol, lifespan="on", timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS + 1, backlog=ACCEPTED_AT_ONCE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    work = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not work.done():
        await asyncio.sleep(0.01)
    if server.started:
        listener.listen(BACKLOG)  # asyncio takes as many in one turn of its loop as it lets wait
        address, port = listener.getsockname()[:2]
        started(f"http://{f'[{address}]' if ':' in address else address}:{port}")
    ending = _drain(server, connections, gate, service, asked)
    beside = asyncio.create_task(ending), asyncio.create_task(connections.watch())
    with quiet():
        await work
    for task in beside:
        task.cancel()


async def _drain(
    server: uvicorn.Server, connections: Connections, gate: Gate, service: Service, asked: asyncio.Semaphore
) -> None:  # fmt: skip
    await asked.acquire()
    gate.draining = True
    hurry = asyncio.create_task(asked.acquire())
    finished = asyncio.create_task(gate.empty())
    await asyncio.wait((hurry, finished), timeout=service.limits.shutdown_seconds, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    finished.cancel()
    gate.stop_reading()
    await service.stop()
    server.should_exit = True
    await asyncio.sleep(LAST_SECONDS)
    connections.end()

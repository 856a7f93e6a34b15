"""Reward functions of the user: found, started in a process of their own, called with a time limit, and told of by name.

    def reward(prompts: list[str], completions: list[str]) -> list[float]:     one finite number a completion

Where it stands: `plan.py` hashes a function's source file, `pipeline.py` checks that it can be imported before a weight is
read, `rewards.py` calls it. A process of its own, because a function that hangs can then be ended, and one that crashes takes
nothing with it. It is no sandbox: the function may do whatever the user may. A function is called with keyword arguments, the
names that users of TRL know; further columns of the data are not passed.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

from posttrain.artifacts import hash_file
from posttrain.errors import Interrupted, RecipeError, TrainingError

WORKER = "posttrain.train.reward_worker"
# Seconds between looks at whether the run was asked to stop.
LOOK = 0.2


class Stop(Protocol):
    """Whoever may ask a long call to end."""

    asked: bool


class _NeverAsked:
    asked = False


class FunctionWorker:
    """A reward function in its process. Usable until `close`."""

    def __init__(self, reference: str, *, timeout: float, where: str, stop: Stop | None = None) -> None:
        """Start it and import the function. Raises RecipeError where that fails or takes longer than `timeout` seconds."""
        self.reference, self.timeout, self.stop = reference, timeout, stop or _NeverAsked()
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, reference], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._pending = b""
        found = self._receive()
        if "ready" not in found:
            self.close()
            do = "modules are looked for in the current folder, in PYTHONPATH and among the installed packages"
            raise RecipeError(where, f'the reward function "{reference}": {found["error"]}', do=do)

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, where: str) -> list[float]:
        """One score a completion. Raises TrainingError naming `where` and the first completion that went wrong."""
        request = json.dumps({"prompts": list(prompts), "completions": list(completions)}).encode() + b"\n"
        threading.Thread(target=self._send, args=(request,), daemon=True).start()
        found = self._receive()
        if "scores" in found:
            return [float(score) for score in found["scores"]]
        self.close()
        index = found.get("index")
        which = f", first at completion {index + 1} of {len(completions)}" if index is not None else ""
        raise TrainingError(
            where, f'the reward function "{self.reference}" {found["error"]}{which}',
            allowed="one finite number a completion, in time", do="mend it and run the same command to go on",
        )  # fmt: skip

    def _send(self, request: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the process has ended: `_receive` tells
            self._process.stdin.write(request)
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """The next message, or what stands for it when none comes in time."""
        assert self._process.stdout is not None
        descriptor, until = self._process.stdout.fileno(), time.monotonic() + self.timeout
        while b"\n" not in self._pending:
            if self.stop.asked:
                self.close()
                raise Interrupted("stopped while a reward function worked; run the same command to go on")
            left = until - time.monotonic()
            if left <= 0:
                return {"error": f"took longer than timeout = {self.timeout:g} seconds"}
            if select.select([descriptor], [], [], min(left, LOOK))[0]:
                read = os.read(descriptor, 1 << 16)
                if not read:
                    return {"error": f"ended its process (exit code {self._process.wait()})"}
                self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def check_function(reference: str, *, timeout: float, where: str) -> None:
    """Import a function in a process of its own, and no more. Raises RecipeError."""
    FunctionWorker(reference, timeout=timeout, where=where).close()


def source_hash(reference: str) -> str:
    """sha256 of the file that a function's module lies in, or "" where it is not found. Nothing of it is run."""
    places: Sequence[str] = [os.getcwd(), *sys.path]
    origin = None
    for step in reference.partition(":")[0].split("."):
        spec = PathFinder.find_spec(step, places)
        if spec is None:
            return ""
        places, origin = spec.submodule_search_locations or (), spec.origin
    return hash_file(Path(origin)) if origin and Path(origin).is_file() else ""

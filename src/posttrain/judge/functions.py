"""Reward functions of the user, each in a process of its own and called with a time limit.

    def reward(prompts: list[str], completions: list[str]) -> list[float]:     one finite number a completion

`plan.py` hashes a function's source, `pipeline.py` checks that it can be imported before a weight is read, `rewards.py` calls
it. In a process of its own a function that hangs can be ended, and one that crashes does not end the run. Calls are numbered,
and the answer to another call is refused. The process is no sandbox: the function may do whatever the user may. A function is
called with the keyword arguments that TRL uses; further columns of the data are not passed.
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
from typing import Any

from posttrain.errors import Interrupted, RecipeError, TrainingError
from posttrain.stop import StopSignal

WORKER = "posttrain.judge.function_worker"
# Seconds between checks whether the run was asked to stop.
POLL_INTERVAL = 0.2
# Seconds that the processes of a function have to end; its guard kills them.
CLOSE_TIMEOUT = 10.0
# Exit code of a worker whose pipes were closed or replaced by the function.
PIPES_GONE = 117
# The longest message: so many bytes, and so many a score.
MESSAGE_BYTES, NUMBER_BYTES = 1 << 14, 40
FOREIGN = "wrote something else into the pipe that its answers go through"


class FunctionWorker:
    """A reward function in its process. Usable until `close`."""

    def __init__(
        self, reference: str, *, timeout: float, where: str, stop: StopSignal | None = None, planned: str | None = None
    ) -> None:
        """Start it and import the function. Raises RecipeError where that fails, takes longer than `timeout` seconds, or where
        the source that was imported has another hash than the one that was `planned`.
        """
        self.reference, self.timeout, self.stop = reference, timeout, stop or StopSignal()
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, reference], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self._pending, self._calls = b"", 0
        message = self._receive()
        do = "modules are looked for in the current folder, in PYTHONPATH and among the installed packages"
        if "ready" in message and planned is not None and message.get("source") != planned:
            message, do = {"error": "its source was edited after this run was planned"}, "run the same command again"
        if "ready" not in message:
            self.close()
            raise RecipeError(where, f'the reward function "{reference}": {message["error"]}', do=do)

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, where: str) -> list[float]:
        """One score a completion. Raises TrainingError naming `where` and the first completion that failed."""
        self._calls += 1
        request = json.dumps({"call": self._calls, "prompts": list(prompts), "completions": list(completions)})
        threading.Thread(target=self._send, args=(request.encode() + b"\n",), daemon=True).start()
        message = self._receive(len(completions))
        if "scores" in message:
            return [float(score) for score in message["scores"]]
        self.close()
        index = message.get("index")
        which = f", first at completion {index + 1} of {len(completions)}" if index is not None else ""
        raise TrainingError(
            where, f'the reward function "{self.reference}" {message["error"]}{which}',
            allowed="one finite number a completion, in time", do="mend it and run the same command to go on",
        )  # fmt: skip

    def _send(self, request: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the process has ended: `_receive` reports it
            while request:
                request = request[self._process.stdin.write(request) :]

    def _receive(self, count: int = 0) -> dict[str, Any]:
        """The next message, checked, or an error message where none comes in time. `count`: completions of the call."""
        assert self._process.stdout is not None
        descriptor, until = self._process.stdout.fileno(), time.monotonic() + self.timeout
        while b"\n" not in self._pending:
            if self.stop.asked:
                self.close()
                raise Interrupted("stopped while a reward function worked; run the same command to go on")
            left = until - time.monotonic()
            if left <= 0:
                return {"error": f"took longer than timeout = {self.timeout:g} seconds"}
            if select.select([descriptor], [], [], min(left, POLL_INTERVAL))[0]:
                read = os.read(descriptor, 1 << 16)
                if not read:
                    return {"error": self._ended()}
                self._pending += read
            if len(self._pending) > MESSAGE_BYTES + NUMBER_BYTES * count:
                return {"error": FOREIGN}
        line, _, self._pending = self._pending.partition(b"\n")
        return {"error": FOREIGN} if self._pending else self._checked(line, count)

    def _checked(self, line: bytes, count: int) -> dict[str, Any]:
        """The message of a line, or an error message where it is none, or not the answer to this call."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": FOREIGN}
        if not isinstance(message, dict) or not message.keys() & {"ready", "scores", "error"}:
            return {"error": FOREIGN}
        called = (message.get("call", 0), message.get("count", 0))
        if called != (self._calls, count) or ("scores" in message and len(message["scores"]) != count):
            return {"error": f"answered call {called[0]!s:.20} of {called[1]!s:.20} completions instead of this one"}
        return message

    def _ended(self) -> str:
        """How the process ended, for the error."""
        try:
            code = self._process.wait(timeout=POLL_INTERVAL)
        except subprocess.TimeoutExpired:
            code = PIPES_GONE
        if code == PIPES_GONE:
            return "closed the pipe that its answers go through"
        how = f"by signal {-code}" if code < 0 else f"exit code {code}"
        return f"ended its process ({how})"

    def close(self) -> None:
        """End the process and all processes that it started."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(timeout=CLOSE_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def check_function(reference: str, *, timeout: float, where: str, planned: str | None = None) -> None:
    """Import a function in a process of its own without calling it. Raises RecipeError as `FunctionWorker` does."""
    FunctionWorker(reference, timeout=timeout, where=where, planned=planned).close()

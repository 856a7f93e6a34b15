"""Ends the processes of a reward function: a small process between the run and the worker.

    run ── guard ── worker (a session of its own) ── processes that the function starts

The guard waits. When the run has ended (its end of the pipe closes, also after a kill -9), when the run sends SIGTERM, or when
the worker has ended, it kills the worker's process group and every process that the function left, and ends with the worker's
exit status. On Linux it adopts orphans of the function, so that a daemon that left the group is ended too; a stopped guard is
woken when the run dies, and the worker dies with the guard. On other systems only the process group is killed.
"""

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# From <linux/prctl.h>.
PARENT_DEATH_SIGNAL, ADOPT_ORPHANS = 1, 36
# Seconds that killed processes have to end.
KILL_TIMEOUT = 5.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def start_guarded(calls: int) -> None:
    """Fork: the child returns, as the worker in a session of its own; the parent guards it and never returns.

    `calls` is the descriptor of the pipe that the run writes into. The guard polls it for its end and does not read it.
    """
    _prctl(PARENT_DEATH_SIGNAL, signal.SIGCONT)
    _prctl(ADOPT_ORPHANS, 1)
    guard = os.getpid()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    asked: list[int] = []
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda n, _: asked.append(n))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for number in (*_STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(woken)
        os.close(wake)
        os.setsid()
        _prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(0)
        return
    os.closerange(1, 3)  # the pipe of answers must end with the worker
    status = _wait(worker, calls, woken, asked)
    _end_all(worker)
    _end_as(status)


def _wait(worker: int, calls: int, woken: int, asked: list[int]) -> int:
    """Wait until the worker has ended, and return its wait status; 0 where it is to be ended."""
    events = select.poll()
    events.register(calls, 0)  # poll always reports its end
    events.register(woken, select.POLLIN)
    while not asked:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    return ended[1]
        for descriptor, _ in events.poll():
            if descriptor == calls:
                return 0
            os.read(woken, 1 << 12)
    return 0


def _end_all(worker: int) -> None:
    """Kill the worker's group and all children of this process, repeatedly until none is left."""
    until = time.monotonic() + KILL_TIMEOUT
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while time.monotonic() < until:
        with suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _end_as(status: int) -> None:
    """End with the worker's exit code, or by the signal that ended it."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # some signals have a handler that cannot be changed
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)

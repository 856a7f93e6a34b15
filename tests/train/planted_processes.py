"""Reward functions of tests that fork, write where they should not, close what is not theirs, or stay when the run is gone."""

import ctypes
import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path


def lengths(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def pipes() -> list[int]:
    """Descriptors of pipes beyond the standard streams: those that calls and answers go through."""
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}")
            and stat.S_ISFIFO(os.fstat(fd).st_mode)]  # fmt: skip


def forks_and_returns(prompts: list[str], completions: list[str]) -> list[float]:
    """The child comes back as well, with scores of its own."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return lengths(completions) if child else [-1.0] * len(completions)


def forks_and_raises(prompts: list[str], completions: list[str]) -> list[float]:
    if os.fork() == 0:
        raise ValueError
    os.wait()
    return lengths(completions)


def forks_and_exits(prompts: list[str], completions: list[str]) -> list[float]:
    if os.fork() == 0:
        sys.exit(3)
    os.wait()
    return lengths(completions)


def threads(prompts: list[str], completions: list[str]) -> list[float]:
    """Prints from a thread and from C while it scores."""
    worker = threading.Thread(target=lambda: [print("noise") for _ in range(50)])
    worker.start()
    ctypes.CDLL(None).puts(b"noise of C")
    worker.join()
    return lengths(completions)


def noise(prompts: list[str], completions: list[str]) -> list[float]:
    for descriptor in pipes():
        try:
            os.write(descriptor, b"noise\n")
        except OSError:
            continue
    return lengths(completions)


def noise_without_end(prompts: list[str], completions: list[str]) -> list[float]:
    while True:
        for descriptor in pipes():
            try:
                os.write(descriptor, b"noise" * 1000)
            except OSError:
                continue


def earlier(prompts: list[str], completions: list[str]) -> list[float]:
    """Writes what looks like the answer to a call before this one."""
    message = {"call": 0, "count": len(completions), "scores": lengths(completions)}
    for descriptor in pipes():
        try:
            os.write(descriptor, json.dumps(message).encode() + b"\n")
        except OSError:
            continue
    time.sleep(600)
    return []


def closes(prompts: list[str], completions: list[str]) -> list[float]:
    os.closerange(3, 256)
    return lengths(completions)


def closes_and_hangs(prompts: list[str], completions: list[str]) -> list[float]:
    os.closerange(3, 256)
    time.sleep(600)
    return []


def replaces(prompts: list[str], completions: list[str]) -> list[float]:
    """Closes everything and opens a file that gets the number of a pipe."""
    os.closerange(3, 256)
    own = [os.open("own.txt", os.O_WRONLY | os.O_APPEND) for _ in range(20)]
    return lengths(completions)[: len(own)]


def segfaults(prompts: list[str], completions: list[str]) -> list[float]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def leaves_a_child(prompts: list[str], completions: list[str]) -> list[float]:
    """Ends, but a process that it started does not and holds every pipe."""
    if os.fork() == 0:
        _wait_here("child")
    os._exit(7)


# --- functions that are still at work when the run is killed -----------------------------------------------------------


def _wait_here(name: str) -> None:
    Path(name).write_text(str(os.getpid()))
    ctypes.CDLL(None).sleep(600)


def sleeps_in_c(prompts: list[str], completions: list[str]) -> list[float]:
    _wait_here("worker")
    return []


def deaf(prompts: list[str], completions: list[str]) -> list[float]:
    """Ignores every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)
    _wait_here("worker")
    return []


def forks_twice(prompts: list[str], completions: list[str]) -> list[float]:
    """A child, and a daemon in a session of its own, whose parent has ended."""
    if os.fork() == 0:
        _wait_here("child")
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            _wait_here("daemon")
        os._exit(0)
    _wait_here("worker")
    return []


def is_stopped(prompts: list[str], completions: list[str]) -> list[float]:
    Path("worker").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    return []

"""The functions in C of `c/`, compiled at their first use by the C compiler of the machine.

The result is kept in the cache folder, where only its owner writes, under a hash of the sources, the compiler and the
processor, with its own hash beside it: a damaged one is compiled again.
Without a compiler, on another system, or with POSTTRAIN_COMPILE=0, there is none, and plain operations do all of it, slower.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain.artifacts import hash_file, write_bytes
from posttrain.cache_folder import cache_folder
from posttrain.errors import ArtifactError, ModelError
from posttrain.kernels.cpu.selftest import works

NATIVE = Path(__file__).with_name("c")
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fno-strict-aliasing",
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)  # fmt: skip
# Sums may be taken in any order, or no loop would be turned into vector instructions. What is not finite keeps its meaning.
ANY_ORDER = "-fassociative-math"
# Those of attention are written as vectors, and their order is promised.
SOURCES = {
    "segments": (), "cache": (), "head": (), "tiles": (), "program": (), "sample": (), "chains": (ANY_ORDER,),
    "lowrank": (ANY_ORDER,), "slots": (ANY_ORDER,),
}  # fmt: skip
# Until a compiler counts as hanging; a loaded machine needs a minute with sanitisers.
SECONDS = 240


def advice(dtype: torch.dtype, device: torch.device) -> str | None:
    """What would make everything faster here; None where nothing is missing."""
    off = os.environ.get("POSTTRAIN_COMPILE") == "0"
    if off or device.type != "cpu" or dtype != torch.bfloat16 or platform.system() != "Linux" or library() is not None:
        return None
    found = "training takes a third longer, one answer two to seven times as long"
    return f"no working C compiler: {found} (install gcc, or set CC)"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be made. The first call on a machine takes about a second."""
    compiler = _compiler()
    if compiler is None or os.environ.get("POSTTRAIN_COMPILE") == "0" or platform.system() != "Linux":
        return None
    try:
        found = _made(compiler, f"native-{_key(compiler)}.so")
        return found if works(found) else None
    except (OSError, ArtifactError, subprocess.SubprocessError):
        return None


def _compiler() -> list[str] | None:
    """The command in CC with its arguments, else cc; None where there is no such program."""
    try:
        program, *arguments = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:  # a quotation mark that is not closed, or nothing but blanks
        return None
    path = shutil.which(program)
    return None if path is None else [path, *arguments]


def _made(compiler: Sequence[str], name: str) -> ctypes.CDLL:
    """What was compiled before, or is now: kept where there is a folder for it, else for this process only."""
    folder = _own_folder()
    if folder is not None and _whole(folder / name):
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / name
        objects = [str(Path(work) / f"{source}.o") for source in SOURCES]
        for (source, flags), into in zip(SOURCES.items(), objects, strict=True):
            _run([*compiler, *FLAGS, *flags, "-c", str(NATIVE / f"{source}.c"), "-o", into])
        _run([*compiler, *FLAGS, "-shared", *objects, "-o", str(made), "-lm"])
        found = ctypes.CDLL(str(made))
        if folder is not None:
            digest = hash_file(made)
            os.replace(made, folder / name)
            write_bytes(_digest_of(folder / name), digest.encode())
    return found


def _whole(made: Path) -> bool:
    """Whether a library is there as it was compiled: one that is cut off or has another bit may end the process."""
    try:
        return _digest_of(made).read_text(encoding="ascii") == hash_file(made)
    except (OSError, ValueError):
        return False


def _digest_of(made: Path) -> Path:
    return made.with_suffix(".sha256")


def _own_folder() -> Path | None:
    """Where only this user writes: what lies there is run. None where there is no such place, in a cache of several for one."""
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except (OSError, ModelError):  # without a home there is no such place
        return None
    mine = about.st_uid == os.geteuid() and stat.S_ISDIR(about.st_mode) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if mine and os.access(folder, os.W_OK) else None


def _key(compiler: Sequence[str]) -> str:
    """What the machine code depends on."""
    # `native` is what the compiler makes of this processor.
    target = _run([*compiler, *FLAGS, "-###", "-E", "-x", "c", os.devnull])
    sources = b"".join(path.read_bytes() for path in sorted(NATIVE.glob("*.[ch]")))
    return hashlib.sha256(sources + repr((compiler, SOURCES)).encode() + target).hexdigest()[:24]


def _run(command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr

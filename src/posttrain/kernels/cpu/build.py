"""Compiles the C functions of `c/` at their first use, with the machine's C compiler.

The library is cached in a folder that only its owner can write. Its name contains a hash of the sources, the compiler and the
processor, and a file beside it contains the hash of the library: a damaged library is compiled again.
Without a compiler, on systems other than Linux, or with POSTTRAIN_COMPILE=0, PyTorch operations compute everything, slower.
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
# Allows any summation order, without which sums are not vectorised. Infinities and NaN keep their meaning.
ANY_ORDER = "-fassociative-math"
# The sources without this flag use explicit vectors, and their summation order is fixed.
SOURCES = {
    "segments": (), "cache": (), "head": (), "tiles": (), "program": (), "sample": (), "chains": (ANY_ORDER,),
    "lowrank": (ANY_ORDER,), "slots": (ANY_ORDER,),
}  # fmt: skip
# Timeout of one compiler call; with sanitisers a loaded machine needs a minute.
SECONDS = 240


def advice(dtype: torch.dtype, device: torch.device) -> str | None:
    """How to make this machine faster; None if nothing is missing."""
    off = os.environ.get("POSTTRAIN_COMPILE") == "0"
    if off or device.type != "cpu" or dtype != torch.bfloat16 or platform.system() != "Linux" or library() is not None:
        return None
    cost = "training takes a third longer, one answer two to seven times as long"
    return f"no working C compiler: {cost} (install gcc, or set CC)"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None if they cannot be compiled. The first call on a machine takes about a second."""
    compiler = _compiler()
    if compiler is None or os.environ.get("POSTTRAIN_COMPILE") == "0" or platform.system() != "Linux":
        return None
    try:
        functions = _load_or_compile(compiler, f"native-{_key(compiler)}.so")
        return functions if works(functions) else None
    except (OSError, ArtifactError, subprocess.SubprocessError):
        return None


def _compiler() -> list[str] | None:
    """The command in CC with its arguments, or cc; None if there is no such program."""
    try:
        program, *arguments = shlex.split(os.environ.get("CC") or "cc")
    except ValueError:  # an unclosed quotation mark, or only blanks
        return None
    path = shutil.which(program)
    return None if path is None else [path, *arguments]


def _load_or_compile(compiler: Sequence[str], name: str) -> ctypes.CDLL:
    """Load the cached library, or compile it and cache it if there is a private folder."""
    folder = _private_folder()
    if folder is not None and _undamaged(folder / name):
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / name
        objects = [str(Path(work) / f"{source}.o") for source in SOURCES]
        for (source, flags), into in zip(SOURCES.items(), objects, strict=True):
            _run([*compiler, *FLAGS, *flags, "-c", str(NATIVE / f"{source}.c"), "-o", into])
        _run([*compiler, *FLAGS, "-shared", *objects, "-o", str(made), "-lm"])
        functions = ctypes.CDLL(str(made))
        if folder is not None:
            digest = hash_file(made)
            os.replace(made, folder / name)
            write_bytes(_digest_of(folder / name), digest.encode())
    return functions


def _undamaged(made: Path) -> bool:
    """Whether the library equals the one that was compiled: loading a damaged library can crash the process."""
    try:
        return _digest_of(made).read_text(encoding="ascii") == hash_file(made)
    except (OSError, ValueError):
        return False


def _digest_of(made: Path) -> Path:
    return made.with_suffix(".sha256")


def _private_folder() -> Path | None:
    """A cache folder that only this user can write, because its files are executed. None if there is none, for instance in a
    shared cache."""
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except (OSError, ModelError):  # no home folder
        return None
    mine = about.st_uid == os.geteuid() and stat.S_ISDIR(about.st_mode) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if mine and os.access(folder, os.W_OK) else None


def _key(compiler: Sequence[str]) -> str:
    """A hash of everything that the machine code depends on."""
    # This output shows the flags that `-march=native` means on this processor.
    target = _run([*compiler, *FLAGS, "-###", "-E", "-x", "c", os.devnull])
    sources = b"".join(path.read_bytes() for path in sorted(NATIVE.glob("*.[ch]")))
    return hashlib.sha256(sources + repr((compiler, SOURCES)).encode() + target).hexdigest()[:24]


def _run(command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr

"""The small work of a decoding step in C (`decoding.c`), compiled at its first use by the C compiler of the machine.

A decoding step has some thirty small operations a layer beside its large products. By the library's functions each costs
microseconds before it begins; compiled, attention over the cache is one call, low-rank products of many adapters are two, a
norm is one. The result lies in the cache folder, where only its owner writes, under a hash of the source, the compiler and the
processor. Without a compiler, on another system, in another dtype, or with POSTTRAIN_COMPILE=0, the plain operations do all of
it, slower.

A policy that is trained on its samples should sample from what is trained, to the last bit where that can be had: attention and
rotations round where the library's operations do. Norms, gates and the products of few rows add up in another order, and
one last bit changes all that comes after it by as much as bfloat16 does; only engines that serve use them.

T: tokens, H: query heads, K: key/value heads, D: width, R: rank, n: slots, C: columns of several layers' A.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.models.source import cache_folder

SOURCE = Path(__file__).with_name("decoding.c")
# Sums may be taken in any order, or no loop would be turned into vector instructions. What is not finite keeps its meaning.
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
    "-fno-signed-zeros", *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)  # fmt: skip
SECONDS = 60
# Rows whose products read each weight once.
FEW_ROWS = 2
_state = threading.local()


@contextmanager
def quick() -> Iterator[None]:
    """Within it this thread's forward may be rounded in other places than the trainer's: norms and gates are compiled ones."""
    before, _state.on = getattr(_state, "on", False), True
    try:
        yield
    finally:
        _state.on = before


def takes(x: Tensor) -> bool:
    """Whether a norm or gate of this is compiled: while `quick`, where it can be."""
    return getattr(_state, "on", False) and able(x)


def able(x: Tensor) -> bool:
    """Whether the compiled functions compute this: bfloat16 on a CPU, where they could be made."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and library() is not None


def advice(dtype: torch.dtype, device: torch.device) -> str | None:
    """What would make decoding faster here; None where nothing is missing."""
    off = os.environ.get("POSTTRAIN_COMPILE") == "0"
    if off or device.type != "cpu" or dtype != torch.bfloat16 or platform.system() != "Linux" or library() is not None:
        return None
    return "no working C compiler: one answer takes two to three times as long (install gcc, or set CC)"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be made. The first call on a machine takes about a second."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("POSTTRAIN_COMPILE") == "0" or platform.system() != "Linux":
        return None
    try:
        found = _made(compiler, f"decoding-{_key(compiler)}.so")
        return found if _works(found) else None
    except (OSError, subprocess.SubprocessError):
        return None


def _made(compiler: str, name: str) -> ctypes.CDLL:
    """What was compiled before, or is now: kept where there is a folder for it, else for this process only."""
    folder = _own_folder()
    if folder is not None and (folder / name).exists():
        return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / name
        _run([compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"])
        found = ctypes.CDLL(str(made))
        if folder is not None:
            os.replace(made, folder / name)
    return found


def _own_folder() -> Path | None:
    """Where only this user writes: what lies there is run. None where there is no such place, in a cache of several for one."""
    folder = cache_folder() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except OSError:
        return None
    mine = about.st_uid == os.geteuid() and stat.S_ISDIR(about.st_mode) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if mine and os.access(folder, os.W_OK) else None


def _key(compiler: str) -> str:
    """What the machine code depends on."""
    # `native` is what the compiler makes of this processor.
    target = _run([compiler, *FLAGS, "-###", "-E", "-x", "c", os.devnull])
    return hashlib.sha256(SOURCE.read_bytes() + target).hexdigest()[:24]


def _run(command: Sequence[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=True, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def _works(found: ctypes.CDLL) -> bool:
    """Whether a small product comes out right."""
    x, weight = torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.bfloat16)
    y = torch.empty(2, 2, dtype=torch.bfloat16)
    found.multiply(_at(x), _at(weight), None, _n(2), _n(3), _n(2), _at(y))
    return torch.equal(y, x @ weight.T)


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


_n = ctypes.c_int64


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., T, inputs], weight [outputs, inputs] -> [..., T, outputs], for at most FEW_ROWS tokens."""
    x = x.contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    rows = x.numel() // inputs
    assert rows <= FEW_ROWS, f"{rows} rows"
    failed = _call().multiply(
        _at(x), _at(weight), None if bias is None else _at(bias), _n(rows), _n(inputs), _n(outputs), _at(y)
    )
    _look(failed)
    return y


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x w / sqrt(mean x^2 + eps) of the last dimension; the weight is float32."""
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    _call().rms_norm(_at(x), _at(weight_D), _n(x.numel() // width), _n(width), ctypes.c_float(eps), _at(y))
    return y


def rotate(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding by halves, x cos + (-x_2, x_1) sin; the last dimension of all is dense."""
    heads, tokens, width = x_HTD.shape
    out = torch.empty((heads, tokens, width), dtype=x_HTD.dtype)
    _call().rotate(
        _at(x_HTD),
        _n(x_HTD.stride(0)),
        _n(x_HTD.stride(1)),
        _at(cos_TD),
        _at(sin_TD),
        _n(heads),
        _n(tokens),
        _n(width),
        _at(out),
    )
    return out


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) up, or gelu(gate) up by its tanh form."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _call().gated(_at(gate), _at(up), _n(gate.numel()), _n(gelu), _at(y))
    return y


def attend(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, keys: Tensor, values: Tensor, where: tuple[Tensor, Tensor, Tensor],
    scale: float, window: int, out_THD: Tensor,
) -> None:  # fmt: skip
    """Append the key and value of each row's token to its cache [blocks, places, K, block, D], and write into out what its
    queries find there: softmax(scale K q) V over the last `window` tokens (0: all).

    `where`: for each row its place, its length before this token, and the token, int64.
    """
    (heads, _, width), kv_heads = q_HTD.shape, len(k_KTD)
    sizes = (
        len(where[0]), kv_heads, heads // kv_heads, width, keys.shape[3], keys.shape[1], window, *q_HTD.stride()[:2],
        *k_KTD.stride()[:2], *v_KTD.stride()[:2],
    )  # fmt: skip
    failed = _call().attend(
        (_n * len(sizes))(*sizes), _at(q_HTD), _at(k_KTD), _at(v_KTD), _at(keys), _at(values), *map(_at, where),
        ctypes.c_float(scale), _at(out_THD),
    )  # fmt: skip
    _look(failed)


class Groups:
    """Tokens of each slot: slot s has order[start[s] : start[s + 1]]."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self.order = torch.tensor([token for own in tokens for token in own])
        self.start = torch.tensor([0, *(len(own) for own in tokens)]).cumsum(0)
        self.slots = len(tokens)


def project(x_TI: Tensor, a: Tensor, groups: Groups) -> Tensor:
    """A x of every grouped token by its slot's A [n, C, inputs]: [T, C], float32. Other tokens' rows mean nothing."""
    p_TC = torch.empty(len(x_TI), a.shape[1])
    failed = _call().project(
        _at(x_TI), _at(a), _at(groups.order), _at(groups.start), _n(groups.slots), _n(a.shape[1]), _n(a.shape[2]), _at(p_TC)
    )
    _look(failed)
    return p_TC


def expand(p_TC: Tensor, b: Tensor, groups: Groups, first: int, y_TO: Tensor) -> None:
    """Add B p to y [T, outputs] for every grouped token, by its slot's B [n, R, outputs] and the columns of p from `first`."""
    at = ctypes.c_void_p(p_TC.data_ptr() + first * p_TC.itemsize)
    _call().expand(
        at, _at(b), _at(groups.order), _at(groups.start), _n(groups.slots), _n(p_TC.shape[1]), _n(b.shape[1]), _n(b.shape[2]),
        _at(y_TO),
    )  # fmt: skip


def _look(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for a decoding step")


def _call() -> Any:
    found = library()
    assert found is not None
    return found

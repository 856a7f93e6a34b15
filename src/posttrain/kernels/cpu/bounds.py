"""Checks of the arguments of compiled functions: dtypes, shapes, strides, and ranges of indices.

They turn a bug in our code into a Python error that names the argument, instead of a write to foreign memory. The checks read
only sizes and small index tensors. SIGNATURES lists the arguments of each function: p an address, n an int64, f a float32.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

# Numbers of one vector (c/vectors.h), and tokens of one tile (c/tiles.c).
LANES = 16
# Numbers of a row of a tile. Inputs and columns of adapters are multiples of it.
DEEP = 32
# Numbers of a call in a program: its kind, whether it waits, and its arguments (c/program.c).
CALL = 16

SIGNATURES = {
    "multiply": "pppnnnp", "rms_norm": "ppnnfp", "rms_norm_backward": "pppnnfp", "rotate": "pnnppnnnnp", "gated": "ppnnp",
    "gated_backward": "pppnnpp", "segments": "ppppppfp", "segments_backward": "pppppppfppp", "attend": "pppppppppfp",
    "head": "ppnnnfpp", "choose_tokens": "pnnnpppnp", "fill_slot": "nppf", "products": "pppppppppp", "project": "ppppnnnp",
    "expand": "ppppnnnnp", "run": "pnn",
}  # fmt: skip
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float}
# Functions without a return value.
_VOID = ("rms_norm", "rms_norm_backward", "rotate", "gated", "gated_backward", "expand")


@functools.cache
def typed(functions: Any) -> Any:
    """The library with argument and result types set, so that ctypes rejects arguments of other types."""
    for name, kinds in SIGNATURES.items():
        if name != "products" or functions.tiles():
            function = getattr(functions, name)
            function.argtypes = [_TYPES[kind] for kind in kinds]
            function.restype = None if name in _VOID else ctypes.c_int
    return functions


def require(valid: bool, what: str) -> None:
    """Raise ValueError unless `valid`. Unlike an assertion this also works under `python -O`."""
    if not valid:
        raise ValueError(f"a compiled function was given {what}")


def shaped(name: str, x: Tensor, *shape: int, dtype: torch.dtype = torch.bfloat16, gaps: bool = False) -> None:
    """Require a contiguous CPU tensor of this dtype and shape (-1: any). With `gaps` only the last dimension must be dense."""
    fits = len(shape) == x.dim() and all(wanted in (-1, size) for wanted, size in zip(shape, x.shape, strict=True))
    if not fits or x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(f"a compiled function was given {name} {_about(x)} for {list(shape)} {dtype}")
    if not (x.is_contiguous() or (gaps and (x.dim() == 0 or x.stride(-1) == 1))):
        raise ValueError(f"a compiled function was given {name} {_about(x)} with gaps: strides {x.stride()}")


def within(name: str, x: Tensor, least: int, limit: int) -> None:
    """Require indices of at least `least` and below `limit`."""
    if x.numel():
        low, high = (int(value) for value in torch.aminmax(x))
        if low < least or high >= limit:
            raise ValueError(f"a compiled function was given {name} of {low} to {high} where {least} to {limit - 1} are")


def alike(*tensors: Tensor) -> None:
    """Require contiguous tensors of equal shape, which are read element by element."""
    for x in tensors:
        shaped("a factor", x, *tensors[0].shape)


def biased(bias: Tensor | None, outputs: int) -> None:
    """Require a bias of this number of outputs, or none."""
    if bias is not None:
        shaped("bias", bias, outputs)


def check_segments(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, spans: int, seen: int, window: int) -> None:
    """Check the heads of packed segments; `spans` and `seen` are upper limits of their indices of tokens and keys."""
    heads, width = len(q), q.shape[2]
    require(len(k) > 0 and heads % len(k) == 0 and window >= 0, f"{heads} heads over {len(k)}, a window of {window}")
    for name, x in (("q", q), ("grad", grad)):
        shaped(name, x, heads, q.shape[1], width, gaps=True)
    for name, x in (("k", k), ("v", v)):
        shaped(name, x, len(k), k.shape[1], width, gaps=True)
    require(
        spans <= q.shape[1] and seen <= k.shape[1],
        f"spans to {spans} and {seen} of {q.shape[1]} tokens and {k.shape[1]} keys",
    )


def check_cached(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, keys: Tensor, values: Tensor, window: int, out_THD: Tensor
) -> None:
    """Check the heads of decoding rows and their cache [blocks, places, K, block, D]."""
    (heads, tokens, width), kv_heads = q_HTD.shape, len(k_KTD)
    require(kv_heads > 0 and heads % kv_heads == 0 and window >= 0, f"{heads} heads over {kv_heads}, a window of {window}")
    shaped("q", q_HTD, heads, tokens, width, gaps=True)
    shaped("k", k_KTD, kv_heads, tokens, width, gaps=True)
    shaped("v", v_KTD, kv_heads, tokens, width, gaps=True)
    shaped("keys", keys, -1, -1, kv_heads, -1, width)
    shaped("values", values, *keys.shape)
    shaped("out", out_THD, -1, heads, width)


def check_places(where: tuple[Tensor, ...], keys: Tensor, tokens: int) -> None:
    """Check the rows of an attention over the cache: each place exists, has room for one more token, and each token exists."""
    names, limits = ("a place", "a length", "a token"), (keys.shape[1], keys.shape[0] * keys.shape[3], tokens)
    for name, x, limit in zip(names, where, limits, strict=True):
        shaped(name, x, len(where[0]), dtype=torch.int64)
        within(name, x, 0, limit)


def check_copy(a: Tensor, b: Tensor, slot_a: Tensor, slot_b: Tensor) -> None:
    """Check A [r, inputs] and B [outputs, r], float32, and their slots of R rows and columns."""
    rank, inputs = a.shape
    shaped("A", a, rank, inputs, dtype=torch.float32)
    shaped("B", b, -1, rank, dtype=torch.float32)
    shaped("the place of A", slot_a, -1, inputs)
    shaped("the place of B", slot_b, len(b), len(slot_a), gaps=True)
    require(rank <= len(slot_a) <= slot_b.stride(0), f"rank {rank} for {len(slot_a)} columns, {slot_b.stride(0)} apart")


def check_slots(
    a: Tensor, b: Tensor, rank: int, slot_T: Tensor | None, order: Tensor | None, *, shape: tuple[int, int, int]
) -> None:
    """Check concatenated adapters (`bindings.Slots`) for `shape`: (tokens, inputs, outputs)."""
    tokens, inputs, outputs = shape
    require(len(a) % DEEP == 0, f"{len(a)} columns, no multiple of {DEEP}")
    require(rank > 0 and (DEEP % rank == 0 or rank % DEEP == 0) and rank <= len(a), f"rank {rank} in {len(a)} columns")
    shaped("A", a, -1, inputs)
    shaped("B", b, outputs, len(a))
    if slot_T is not None:
        shaped("slots", slot_T, tokens, dtype=torch.int32)
        within("a slot", slot_T, -1, len(a) // rank)
    if order is not None:
        require(len(order) % LANES == 0, f"an order of {len(order)}, no multiple of {LANES}")
        shaped("an order", order, -1, dtype=torch.int32)
        within("a token", order, -1, tokens)


def check_expand(p_TC: Tensor, b: Tensor, slots: int, limit: int, first: int, y_TO: Tensor) -> None:
    """Check projections whose columns of a slot begin at `first`, for tokens below `limit`."""
    shaped("p", p_TC, -1, -1, dtype=torch.float32)
    shaped("B", b, slots, -1, -1)
    shaped("y", y_TO, -1, b.shape[2])
    require(limit <= min(len(p_TC), len(y_TO)), f"tokens to {limit} of {len(p_TC)} and {len(y_TO)}")
    require(0 <= first <= p_TC.shape[1] - b.shape[1], f"columns {first} to {first + b.shape[1]} of {p_TC.shape[1]}")


def _about(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"

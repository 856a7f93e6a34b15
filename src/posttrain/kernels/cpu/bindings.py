"""Python bindings of the C functions in `c/`: attention, tiled products, the choice of tokens, and chains of small operations.
`kernels/cpu/build.py` compiles them.

In PyTorch each of a layer's thirty small operations costs microseconds per call, and reads and writes its whole tensor. In C,
attention, a norm or a gate is one call each way. For other dtypes than bfloat16, or without a compiler, PyTorch computes all.

A policy that is trained on its own samples should be sampled with the same numbers that training computes, bit for bit where
possible, because a difference in the last bit grows to the size of bfloat16 rounding. So training and decoding use the same
functions, and the result for a row does not depend on the other rows. The exception is the product of few rows (`multiply`),
which has another summation order. Serving engines use it on processors without matrix tiles.

T: tokens, H: query heads, K: key/value heads, D: width, R: rank, n: slots, C: columns of several layers' or slots' A.
"""

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.cpu import bounds
from posttrain.kernels.cpu.bounds import CALL as CALL
from posttrain.kernels.cpu.bounds import DEEP as DEEP
from posttrain.kernels.cpu.bounds import LANES as LANES
from posttrain.kernels.cpu.build import library

# Upper limit of rows for `multiply`, which reads each weight once.
FEW_ROWS = 2


def able(x: Tensor) -> bool:
    """Whether the compiled functions accept this tensor: bfloat16 on a CPU, and compilation succeeded."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and library() is not None


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


_n = ctypes.c_int64


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., T, inputs], weight [outputs, inputs] -> [..., T, outputs], for at most FEW_ROWS tokens."""
    x = x.contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    rows = x.numel() // inputs
    bounds.require(rows <= FEW_ROWS and x.numel() == rows * inputs, f"{tuple(x.shape)} for {inputs} inputs and {FEW_ROWS} rows")
    bounds.shaped("x", x.view(-1, inputs), rows, inputs)
    bounds.shaped("weight", weight, outputs, inputs)
    bounds.biased(bias, outputs)
    failed = _call().multiply(
        _at(x), _at(weight), None if bias is None else _at(bias), _n(rows), _n(inputs), _n(outputs), _at(y)
    )
    _raise_if_failed(failed)
    return y


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x w / sqrt(mean x^2 + eps) of the last dimension; the weight is float32."""
    if not (x.dim() == 4 and x.transpose(1, 2).is_contiguous()):  # heads token by token keep their layout in the output
        x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    bounds.require(x.dtype == torch.bfloat16 and x.device.type == "cpu" and width > 0, f"x {x.dtype} {tuple(x.shape)}")
    bounds.shaped("weight", weight_D, width, dtype=torch.float32)
    _call().rms_norm(_at(x), _at(weight_D), _n(x.numel() // width), _n(width), ctypes.c_float(eps), _at(y))
    return y


def rms_norm_backward(x: Tensor, weight_D: Tensor, eps: float, grad: Tensor) -> Tensor:
    """The gradient of `rms_norm` with respect to x."""
    x, grad, width = x.contiguous(), grad.contiguous(), x.shape[-1]
    dx, rows = torch.empty_like(x), x.numel() // width
    bounds.alike(x, grad)
    bounds.shaped("weight", weight_D, width, dtype=torch.float32)
    _call().rms_norm_backward(_at(x), _at(weight_D), _at(grad), _n(rows), _n(width), ctypes.c_float(eps), _at(dx))
    return dx


def rotate(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding by halves, x cos + (-x_2, x_1) sin [H, T, D], in memory token by token."""
    return _rotated(x_HTD, cos_TD, sin_TD, rounds=True)


def rotate_backward(grad_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The gradient of `rotate`: the inverse rotation, with the sines of the other half."""
    return _rotated(grad_HTD, cos_TD, -sin_TD.roll(sin_TD.shape[-1] // 2, -1), rounds=False)


def _rotated(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, rounds: bool) -> Tensor:
    x, (heads, tokens, width) = _dense(x_HTD), x_HTD.shape
    out_THD = x.new_empty((tokens, heads, width))
    bounds.require(width % 2 == 0, f"an odd width {width}")
    bounds.shaped("x", x, heads, tokens, width, gaps=True)
    bounds.shaped("cos", cos_TD, tokens, width)
    bounds.shaped("sin", sin_TD, tokens, width)
    strides, sizes = map(_n, x.stride()[:2]), map(_n, (heads, tokens, width, rounds))
    _call().rotate(_at(x), *strides, _at(cos_TD), _at(sin_TD), *sizes, _at(out_THD))
    return out_THD.transpose(0, 1)


def _dense(x: Tensor) -> Tensor:
    """A tensor whose last dimension is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) up, or gelu(gate) up with the tanh form of gelu."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    bounds.alike(gate, up)
    _call().gated(_at(gate), _at(up), _n(gate.numel()), _n(gelu), _at(y))
    return y


def gated_backward(gate: Tensor, up: Tensor, grad: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of `gated` with respect to gate and up."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    bounds.alike(gate, up, grad)
    _call().gated_backward(_at(gate), _at(up), _at(grad), _n(gate.numel()), _n(gelu), _at(d_gate), _at(d_up))
    return d_gate, d_up


class SpanTable:
    """Spans of a packed batch in the layout of the compiled attention: a row (start, length, first piece, end of pieces) per
    span. The pieces of a span are the (start, length) of every ancestor, then of the span itself."""

    def __init__(self, pieces: Sequence[Sequence[tuple[int, int]]]) -> None:
        ends = torch.tensor([len(span) for span in pieces]).cumsum(0).tolist()
        rows = [(*span[-1], end - len(span), end) for span, end in zip(pieces, ends, strict=True)]
        flat = [piece for span in pieces for piece in span]
        bounds.require(all(start >= 0 and length > 0 for start, length in flat), f"pieces {flat}")
        # The ends of the last span and of the last piece: upper limits of the indices of tokens and keys.
        self.tokens, self.keys = (max(map(sum, parts), default=0) for parts in ([span[-1] for span in pieces], flat))
        self.count, self.spans = len(rows), torch.tensor(rows, dtype=torch.int64)
        self.pieces = torch.tensor(flat, dtype=torch.int64)


def segments(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, table: SpanTable, scale: float, window: int) -> Tensor:
    """softmax(scale Q K) V of every span [H, T, D], in memory token by token; tokens of no span give zeros."""
    heads, tokens, width = q_HTD.shape
    out_THD = q_HTD.new_zeros((tokens, heads, width))
    q, k, v = map(_dense, (q_HTD, k_KTD, v_KTD))
    sizes, addresses = _sizes(q, k, v, q, table, window), map(_at, (table.spans, table.pieces, q, k, v))
    _raise_if_failed(_call().segments(sizes, *addresses, ctypes.c_float(scale), _at(out_THD)))
    return out_THD.transpose(0, 1)


def segments_backward(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, grad_HTD: Tensor, table: SpanTable, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `segments` with respect to q, k and v, in memory token by token."""
    dq, dk, dv = (x.new_zeros((x.shape[1], x.shape[0], x.shape[2])) for x in (q_HTD, k_KTD, v_KTD))
    q, k, v, grad = map(_dense, (q_HTD, k_KTD, v_KTD, grad_HTD))
    sizes, addresses = _sizes(q, k, v, grad, table, window), map(_at, (table.spans, table.pieces, q, k, v, grad))
    _raise_if_failed(_call().segments_backward(sizes, *addresses, ctypes.c_float(scale), *map(_at, (dq, dk, dv))))
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def _sizes(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, table: SpanTable, window: int) -> Any:
    bounds.check_segments(q, k, v, grad, table.tokens, table.keys, window)
    strides = [stride for x in (q, k, v, grad) for stride in x.stride()[:2]]
    sizes = (table.count, q.shape[1], k.shape[1], len(k), len(q) // len(k), q.shape[2], window, *strides)
    return (_n * len(sizes))(*sizes)


def attend(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, keys: Tensor, values: Tensor, where: tuple[Tensor, Tensor, Tensor],
    scale: float, window: int, out_THD: Tensor,
) -> None:  # fmt: skip
    """Append the key and value of each row's token to its cache [blocks, places, K, block, D], and write the attention of its
    queries over the cache to `out_THD`: softmax(scale K q) V over the last `window` tokens (0: all).

    `where`: for each row its place, its length before this token, and its token's index in the batch, int64.
    """
    (heads, _, width), kv_heads = q_HTD.shape, len(k_KTD)
    bounds.check_cached(q_HTD, k_KTD, v_KTD, keys, values, window, out_THD)
    bounds.check_places(where, keys, min(q_HTD.shape[1], len(out_THD)))
    sizes = (
        len(where[0]), kv_heads, heads // kv_heads, width, keys.shape[3], keys.shape[1], window, *q_HTD.stride()[:2],
        *k_KTD.stride()[:2], *v_KTD.stride()[:2],
    )  # fmt: skip
    failed = _call().attend(
        (_n * len(sizes))(*sizes), _at(q_HTD), _at(k_KTD), _at(v_KTD), _at(keys), _at(values), *map(_at, where),
        ctypes.c_float(scale), _at(out_THD),
    )  # fmt: skip
    _raise_if_failed(failed)


def log_sum_exp(logits_VN: Tensor) -> Tensor:
    """log sum_v exp z_v [N], float32, of transposed logits W h^T; N is a multiple of LANES."""
    return _head(logits_VN, None, 0.0, None)


def head_mean(logits_VN: Tensor, head_VD: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The same, and the mean [N, D] of the head's rows, weighted by p, over the tokens with log p above `least`."""
    mean_ND = head_VD.new_empty(logits_VN.shape[1], head_VD.shape[1])
    return _head(logits_VN, head_VD, least, mean_ND), mean_ND


def _head(logits_VN: Tensor, head_VD: Tensor | None, least: float, mean_ND: Tensor | None) -> Tensor:
    count, tokens = logits_VN.shape
    bounds.require(tokens % LANES == 0, f"{tokens} tokens, no multiple of {LANES}")
    bounds.shaped("logits", logits_VN, count, tokens)
    if head_VD is not None:
        bounds.shaped("a head", head_VD, count, -1)
    total_N = torch.empty(tokens)
    weight, width = (None, 0) if head_VD is None else (_at(head_VD), head_VD.shape[1])
    failed = _call().head(
        _at(logits_VN), weight, _n(tokens), _n(count), _n(width), ctypes.c_float(least), _at(total_N),
        None if mean_ND is None else _at(mean_ND),
    )  # fmt: skip
    _raise_if_failed(failed)
    return total_N


def choose_tokens(
    logits_RV: Tensor, rows: Sequence[tuple[float, float, bool]], without: Sequence[Sequence[int]]
) -> list[tuple[float, float, float, float]]:
    """Choose a token per row, for (uniform number in [0, 1), temperature or 0 for greedy, whether to compute log-probabilities)
    and excluded tokens (`without`). Returns for each row (token, its log-probability under softmax(z / temperature) over the
    other tokens, its log-probability under softmax(z), whether the logits are finite)."""
    logits_RV = _dense(logits_RV)
    draw_R3, choice_R4 = torch.tensor(rows, dtype=torch.float64), torch.empty(len(rows), 4, dtype=torch.float64)
    start = torch.tensor([0, *itertools.accumulate(map(len, without))])
    ids = torch.tensor([*itertools.chain.from_iterable(without), 0])
    count, vocabulary = logits_RV.shape
    bounds.require(
        len(rows) == len(without) == count, f"{count} rows of logits, {len(rows)} draws, {len(without)} lists of tokens"
    )
    bounds.shaped("logits", logits_RV, count, vocabulary, gaps=True)
    bounds.within("a token", ids, 0, vocabulary)
    sizes, most = map(_n, (count, vocabulary, logits_RV.stride(0))), _n(max(map(len, without), default=0))
    _raise_if_failed(_call().choose_tokens(_at(logits_RV), *sizes, *map(_at, (draw_R3, start, ids)), most, _at(choice_R4)))
    return [tuple(row) for row in choice_R4.tolist()]


@functools.cache
def tiles() -> bool:
    """Whether this processor has matrix tiles, and our own products use them."""
    return bool((functions := library()) and functions.tiles())


class Slots(NamedTuple):
    """The concatenated adapters of one layer: A [C, inputs] and s B [outputs, C], all finite, with `rank` columns per slot
    (`slot_rank`) and C a multiple of DEEP. `slot_T`: each token's slot, -1 for none; None: slot 0 for all tokens. `order`: the
    tokens in tiles of LANES, -1 as padding; None: tokens in their given order. Both int32."""

    a: Tensor
    b: Tensor
    rank: int
    slot_T: Tensor | None = None
    order: Tensor | None = None


def slot_rank(rank: int) -> int:
    """Columns of a slot for adapters of this rank: a divisor of DEEP, so that slots fill a block, or a multiple of it."""
    return -(-rank // DEEP) * DEEP if rank > DEEP else 1 << max(rank - 1, 1).bit_length()


def fill_slot(pairs: Sequence[tuple[Tensor, Tensor]], places: Sequence[tuple[Tensor, Tensor]], scale: float) -> bool:
    """Copy A [r, inputs] and scale B [outputs, r] of several layers, float32, to the first r rows and columns of `places`
    [R, inputs] and [outputs, R], and fill the rest with zeros. Returns whether the sum of all numbers is finite."""
    at, sizes = [], []
    for (a, b), (slot_a, slot_b) in zip(pairs, places, strict=True):
        bounds.check_copy(a, b, slot_a, slot_b)
        at += [a.data_ptr(), slot_a.data_ptr(), b.data_ptr(), slot_b.data_ptr()]
        sizes += [len(a), len(slot_a), a.shape[1], len(b), slot_b.stride(0)]
    return bool(_call().fill_slot(_n(len(pairs)), (_n * len(at))(*at), (_n * len(sizes))(*sizes), ctypes.c_float(scale)))


def products(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, slots: Slots | None = None, *, projected: bool = False,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """W x + bias + s B A x [T, outputs] by tiles, each token with the adapter of its slot; with `projected` also A x [T, C],
    zero in the columns of other slots. `weight` [outputs, inputs] is dense, inputs a multiple of DEEP."""
    y_TO = x_TI.new_empty(len(x_TI), len(weight)) if into is None else into
    p_TC = None if slots is None or not projected else x_TI.new_zeros(len(x_TI), len(slots.a))
    _products(x_TI, weight, bias, slots, p_TC, y_TO, 0)
    return y_TO, p_TC


def turned_products(x_TI: Tensor, weight: Tensor, y_ON: Tensor) -> None:
    """Write W x to y [outputs, N], with N the tokens padded to whole tiles; same summation order as `products`."""
    bounds.shaped("y", y_ON, len(weight), -(-len(x_TI) // LANES) * LANES)
    _products(x_TI, weight, None, None, None, y_ON, y_ON.shape[1])


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: Slots | None, p: Tensor | None, y: Tensor, across: int
) -> None:
    x, (outputs, inputs) = _dense(x), weight.shape
    bounds.require(inputs % DEEP == 0, f"{inputs} inputs, no multiple of {DEEP}")
    bounds.shaped("x", x, -1, inputs, gaps=True)
    bounds.shaped("weight", weight, outputs, inputs)
    bounds.biased(bias, outputs)
    if not across:
        bounds.shaped("y", y, len(x), outputs)
    a, b, columns, rank, slot, order = None, None, 0, 1, None, None
    if slots is not None:
        bounds.check_slots(*slots, shape=(len(x), inputs, outputs))
        a, b, rank, slot, order = slots
        columns = len(a)
    if p is not None:
        bounds.shaped("p", p, len(x), columns)
    assert tiles()
    count = -(-len(x) // LANES) if order is None else len(order) // LANES
    sizes = (_n * 8)(len(x), inputs, outputs, x.stride(0), columns, rank, across, count)
    arrays = (x, weight, bias, a, b, order, slot, p, y)
    _raise_if_failed(_call().products(sizes, *[None if array is None else array.data_ptr() for array in arrays]))


class Groups:
    """The tokens of each slot: slot s has order[start[s] : start[s + 1]]."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self.order = torch.tensor([token for group in tokens for token in group])
        self.start = torch.tensor([0, *(len(group) for group in tokens)]).cumsum(0)
        self.slots = len(tokens)
        self.limit = max((token + 1 for group in tokens for token in group), default=0)
        bounds.require(all(token >= 0 for group in tokens for token in group), f"tokens {tokens}")


def project(x_TI: Tensor, a: Tensor, groups: Groups) -> Tensor:
    """A x of every grouped token with its slot's A [n, C, inputs]: [T, C], float32. Rows of other tokens are undefined."""
    bounds.shaped("x", x_TI, -1, a.shape[2])
    bounds.shaped("A", a, groups.slots, -1, -1)
    bounds.require(groups.limit <= len(x_TI), f"tokens to {groups.limit} of {len(x_TI)}")
    p_TC = torch.empty(len(x_TI), a.shape[1])
    failed = _call().project(
        _at(x_TI), _at(a), _at(groups.order), _at(groups.start), _n(groups.slots), _n(a.shape[1]), _n(a.shape[2]), _at(p_TC)
    )
    _raise_if_failed(failed)
    return p_TC


def expand(p_TC: Tensor, b: Tensor, groups: Groups, first: int, y_TO: Tensor) -> None:
    """Add B p to y [T, outputs] for every grouped token: its slot's B [n, R, outputs], the columns of p from `first`."""
    bounds.check_expand(p_TC, b, groups.slots, groups.limit, first, y_TO)
    at = ctypes.c_void_p(p_TC.data_ptr() + first * p_TC.itemsize)
    _call().expand(
        at, _at(b), _at(groups.order), _at(groups.start), _n(groups.slots), _n(p_TC.shape[1]), _n(b.shape[1]), _n(b.shape[2]),
        _at(y_TO),
    )  # fmt: skip


def _raise_if_failed(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for attention or a decoding step")


def run(calls: Any, count: int, room: int) -> None:
    """Run the calls of a program (`record.py`). `room`: bytes of a thread's buffer for a tile's rows, 0 without tiles."""
    bounds.require(0 <= count * CALL <= len(calls) and room >= 0, f"{count} calls in {len(calls)} numbers, room {room}")
    failed = _call().run(calls, _n(count), _n(room))
    bounds.require(failed < 2, "a call of an unknown kind")
    _raise_if_failed(failed)


# The current listener of each thread (`noting`).
_listening = threading.local()


@contextmanager
def noting(note: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `note(name, arguments)` before each call of a compiled function in this thread."""
    _listening.note = note
    try:
        yield
    finally:
        _listening.note = None


class _RecordingLibrary:
    """The compiled functions, with a call of `note` before each."""

    def __init__(self, functions: Any, note: Callable[[str, tuple[Any, ...]], None]) -> None:
        self._functions, self._note = functions, note

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._note(name, args)
            return getattr(self._functions, name)(*args)

        return call


def _call() -> Any:
    functions, note = library(), getattr(_listening, "note", None)
    assert functions is not None
    return bounds.typed(functions) if note is None else _RecordingLibrary(bounds.typed(functions), note)

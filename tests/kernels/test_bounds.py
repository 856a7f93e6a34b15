"""Compiled functions given an index out of range, another shape, type or gap: an error names it, and nothing is written."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.build import library

if library() is None:
    pytest.skip("no C compiler here, or POSTTRAIN_COMPILE=0: plain operations decode", allow_module_level=True)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def attend(
    place: int = 1, length: int = 5, token: int = 1, *, kind: torch.dtype = torch.int64, rows: int = 2, width: int = 16,
    caches: int = 16, values: int = 2, gap: bool = False,
) -> None:  # fmt: skip
    q, k = numbers(4, 2, width), numbers(2, 2, width)
    keys, other = numbers(2, 3, 2, 64, caches), numbers(values, 3, 2, 64, caches)
    where = tuple(torch.tensor([0, x]).to(kind) for x in (place, length, token))
    out = numbers(rows, 4, width)
    bindings.attend(q, k, k, keys.transpose(0, 1) if gap else keys, other, where, 0.3, 0, out)


def spans(pieces: list[list[tuple[int, int]]], *, keys: int = 6, heads: int = 4, back: bool = False) -> None:
    q, k = numbers(heads, 6, 16), numbers(2, keys, 16)
    table = bindings.SpanTable(pieces)
    if back:
        bindings.segments_backward(q, k, k, q, table, 0.3, 0)
    else:
        bindings.segments(q, k, k, table, 0.3, 0)


def choose(token: int = 3, *, draws: int = 2, dtype: torch.dtype = torch.bfloat16) -> None:
    bindings.choose_tokens(numbers(2, 20, dtype=dtype), [(0.5, 1.0, True)] * draws, [[token], []])


def slots(slot: int = 1, token: int = 1, *, rank: int = 16, outputs: int = 8, columns: int = 32) -> None:
    order = torch.tensor([0, token, *[-1] * 14], dtype=torch.int32)
    found = bindings.Slots(numbers(columns, 32), numbers(8, columns), rank, torch.tensor([0, slot], dtype=torch.int32), order)
    bindings.products(numbers(2, 32), numbers(outputs, 32), None, found)


def by_slot(token: int = 1, *, slots: int = 2, first: int = 0, outputs: int = 8, inputs: int = 9) -> None:
    groups = bindings.Groups([[0], [token]])
    p = bindings.project(numbers(2, 9), numbers(slots, 4, inputs), groups)
    bindings.expand(p, numbers(2, 4, 8), groups, first, numbers(2, outputs))


def filled(rank: int = 2, *, inputs: int = 8, dtype: torch.dtype = torch.float32, room: int = 4) -> None:
    a, b = numbers(rank, 8, dtype=dtype), numbers(6, rank, dtype=dtype)
    bindings.fill_slot([(a, b)], [(numbers(room, inputs), numbers(6, room))], 1.0)


x, w, w32 = numbers(2, 8), numbers(4, 8), numbers(8, dtype=torch.float32)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "multiply, inputs": (lambda: bindings.multiply(numbers(1, 6), w, None), "for 8 inputs"),
    "multiply, rows": (lambda: bindings.multiply(numbers(3, 8), w, None), "2 rows"),
    "multiply, bias": (lambda: bindings.multiply(x, w, numbers(3)), "bias"),
    "multiply, gap": (lambda: bindings.multiply(x, numbers(8, 4).T, None), "weight .* with gaps"),
    "multiply, type": (lambda: bindings.multiply(x, w.float(), None), "weight .*float32"),
    "norm, weight": (lambda: bindings.rms_norm(x, numbers(7, dtype=torch.float32), 1e-5), "weight"),
    "norm, type": (lambda: bindings.rms_norm(x.float(), w32, 1e-5), "x torch.float32"),
    "norm backward": (lambda: bindings.rms_norm_backward(x, w32, 1e-5, numbers(1, 8)), "a factor"),
    "rotate": (lambda: bindings.rotate(numbers(2, 5, 8), numbers(4, 8), numbers(4, 8)), "cos"),
    "rotate, odd": (lambda: bindings.rotate(numbers(2, 5, 7), numbers(5, 7), numbers(5, 7)), "an odd width 7"),
    "gate": (lambda: bindings.gated(x, numbers(2, 7), gelu=False), "a factor"),
    "gate backward": (lambda: bindings.gated_backward(x, x, numbers(1, 8), gelu=False), "a factor"),
    "attend, place": (lambda: attend(place=3), "a place of 0 to 3 where 0 to 2 are"),
    "attend, before": (lambda: attend(place=-1), "a place of -1"),
    "attend, length": (lambda: attend(length=128), "a length of 0 to 128 where 0 to 127 are"),
    "attend, token": (lambda: attend(token=2), "a token of 0 to 2"),
    "attend, int32": (lambda: attend(kind=torch.int32), "a place .*int32"),
    "attend, out": (lambda: attend(rows=1), "a token of 0 to 1"),
    "attend, width": (lambda: attend(caches=8), "keys"),
    "attend, values": (lambda: attend(values=1), "values"),
    "attend, gap": (lambda: attend(gap=True), "keys .* with gaps"),
    "segments, tokens": (lambda: spans([[(0, 7)]], keys=9), "spans to 7 and 7 of 6 tokens"),
    "segments, ancestor": (lambda: spans([[(4, 3), (0, 2)]]), "spans to 2 and 7 of 6 tokens and 6 keys"),
    "segments, before": (lambda: spans([[(-1, 2)]]), "pieces"),
    "segments, heads": (lambda: spans([[(0, 2)]], heads=3), "3 heads over 2"),
    "segments backward": (lambda: spans([[(5, 2)]], back=True), "spans to 7"),
    "choose, token": (lambda: choose(20), "a token of 0 to 20 where 0 to 19 are"),
    "choose, draws": (lambda: choose(draws=1), "2 rows of logits, 1 draws"),
    "choose, type": (lambda: choose(dtype=torch.float32), "logits"),
    "logits": (lambda: bindings.log_sum_exp(numbers(20, 15)), "15 tokens"),
    "head": (lambda: bindings.head_mean(numbers(20, 16), numbers(19, 8), -9.0), "a head"),
    "products, slot": (lambda: slots(slot=2), "a slot of 0 to 2 where -1 to 1 are"),
    "products, token": (lambda: slots(token=2), "a token of -1 to 2"),
    "products, rank": (lambda: slots(rank=12), "rank 12"),
    "products, outputs": (lambda: slots(outputs=9), "B"),
    "products, columns": (lambda: slots(columns=24), "24 columns"),
    "products, inputs": (lambda: bindings.products(numbers(2, 24), numbers(8, 24), None), "24 inputs"),
    "turned products": (lambda: bindings.turned_products(numbers(2, 32), numbers(8, 32), numbers(8, 15)), "y"),
    "project, token": (lambda: by_slot(token=2), "tokens to 3 of 2"),
    "project, before": (lambda: by_slot(token=-1), "tokens"),
    "project, slots": (lambda: by_slot(slots=1), "A"),
    "project, inputs": (lambda: by_slot(inputs=8), "x"),
    "expand, columns": (lambda: by_slot(first=1), "columns 1 to 5 of 4"),
    "expand, outputs": (lambda: by_slot(outputs=7), "y"),
    "fill, rank": (lambda: filled(rank=5), "rank 5 for 4 columns"),
    "fill, inputs": (lambda: filled(inputs=9), "the place of A"),
    "fill, type": (lambda: filled(dtype=torch.bfloat16), "A .*bfloat16"),
    "run": (lambda: bindings.run(torch.zeros(16), 2, 0), "2 calls in 16 numbers"),
    "run, kind": (lambda: bindings.run((ctypes.c_int64 * 16)(13), 1, 0), "a call of an unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_out_of_bounds_is_an_error(what: str) -> None:
    call, found = WRONG[what]
    with pytest.raises(ValueError, match=f"a compiled function was given .*{found}"):
        call()


def test_what_is_within_bounds_is_computed() -> None:
    """The same calls with what they should be given."""
    attend()
    spans([[(0, 2)], [(0, 2), (2, 4)]])
    spans([[(0, 2)], [(0, 2), (2, 4)]], back=True)
    choose()
    by_slot()
    filled()
    if bindings.tiles():
        slots()

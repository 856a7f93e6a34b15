"""Runs every compiled function once at start-up on small inputs, and compares it with PyTorch in float64.

If the compiler miscompiled a function, the library counts as missing (`build.py`): computations are slower, but not wrong. The
sizes are small, so that one thread computes everything in milliseconds.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels.cpu.bounds import CALL, DEEP, LANES, typed

# A few roundings to bfloat16; a function that is wrong is off by about one.
RELATIVE, ABSOLUTE = 3 * 2**-8, 5e-2


def works(functions: ctypes.CDLL) -> bool:
    """Whether every function gives the expected numbers. Calls `tiles` first, which requests matrix tiles from the system."""
    tiles = bool(functions.tiles())
    library = typed(functions)
    checks = [_rows, _chains, _gradients_of_chains, _attention, _cached, _head, _choice, _slots, _program]
    if tiles:
        checks.append(_tiles)
    return all(
        torch.allclose(result.double(), expected.double(), RELATIVE, ABSOLUTE)
        for check in checks
        for result, expected in check(library)
    )


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _at(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _array(*numbers: int) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


Pairs = Iterator[tuple[Tensor, Tensor]]


def _rows(library: Any) -> Pairs:
    """`multiply`, `project` and `expand` of two tokens, of which the second has slot 1."""
    x, weight, y = _numbers(2, 40), _numbers(9, 40, seed=1), torch.empty(2, 9).bfloat16()
    library.multiply(*_at(x, weight), None, 2, 40, 9, y.data_ptr())
    yield y, x.double() @ weight.double().T
    a, b, p = _numbers(2, 3, 40, seed=2), _numbers(2, 3, 9, seed=3), torch.empty(2, 3)
    order, start = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    library.project(*_at(x, a, order, start), 2, 3, 40, p.data_ptr())
    yield p, torch.einsum("sci,si->sc", a.double(), x.double())
    added = y.double() + torch.einsum("sr,sro->so", p.double(), b.double())
    library.expand(*_at(p, b, order, start), 2, 3, 3, 9, y.data_ptr())
    yield y, added


def _chains(library: Any) -> Pairs:
    """`rms_norm`, `rotate` and `gated`, both gates."""
    x, weight, y = _numbers(3, 40), torch.linspace(0.5, 1.5, 40), torch.empty(3, 40).bfloat16()
    library.rms_norm(*_at(x, weight), 3, 40, 1e-5, y.data_ptr())
    yield y, x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * weight
    cos, sin, turned = (_numbers(3, 40, seed=s) for s in (1, 2, 3))
    library.rotate(x.data_ptr(), 120, 40, *_at(cos, sin), 1, 3, 40, 1, turned.data_ptr())
    yield turned, x.double() * cos + torch.cat([-x[:, 20:], x[:, :20]], -1).double() * sin
    for gelu in (False, True):
        library.gated(*_at(x, cos), 120, gelu, y.data_ptr())
        yield y, _gate(x.double(), cos.double(), gelu)


def _gate(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up


def _gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        wide = [x.clone().double().requires_grad_() for x in inputs]
        return list(torch.autograd.grad((function(*wide) * grad.clone().double()).sum(), wide))


def _gradients_of_chains(library: Any) -> Pairs:
    """`rms_norm_backward` and `gated_backward`."""
    x, up, grad, weight = _numbers(3, 40), _numbers(3, 40, seed=1), _numbers(3, 40, seed=2), torch.linspace(0.5, 1.5, 40)
    dx, d_up = torch.empty_like(x), torch.empty_like(x)
    library.rms_norm_backward(*_at(x, weight, grad), 3, 40, 1e-5, dx.data_ptr())
    yield dx, _gradients(lambda z: z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-5) * weight, grad, x)[0]
    for gelu in (False, True):
        library.gated_backward(*_at(x, up, grad), 120, gelu, *_at(dx, d_up))
        yield from zip((dx, d_up), _gradients(lambda a, b, g=gelu: _gate(a, b, g), grad, x, up), strict=True)


def _seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one span, [H, T, D]; two query heads share one of keys."""
    scores = 0.3 * q @ k.transpose(1, 2)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v


def _attention(library: Any) -> Pairs:
    """`segments` and `segments_backward` of five tokens."""
    q, k, v, grad = (_numbers(h, 5, 8, seed=s) for s, h in enumerate((2, 1, 1, 2)))
    spans, pieces = torch.tensor([[0, 5, 0, 1]]), torch.tensor([[0, 5]])
    sizes = _array(1, 5, 5, 1, 2, 8, 0, *[40, 8] * 4)
    out, dq, dk, dv = (torch.zeros(5, h, 8).bfloat16() for h in (2, 2, 1, 1))
    library.segments(sizes, *_at(spans, pieces, q, k, v), 0.3, out.data_ptr())
    yield out.transpose(0, 1), _seen(q.double(), k.double(), v.double())
    library.segments_backward(sizes, *_at(spans, pieces, q, k, v, grad), 0.3, *_at(dq, dk, dv))
    yield from zip((x.transpose(0, 1) for x in (dq, dk, dv)), _gradients(_seen, grad, q, k, v), strict=True)


def _cache() -> tuple[Any, list[Tensor], Tensor, Tensor]:
    """The sizes, tensors and output of an attention over three keys and a new one, and what that is."""
    q, k, v = (_numbers(h, 1, 8, seed=s) for s, h in enumerate((2, 1, 1)))
    keys, values = (_numbers(1, 1, 1, 32, 8, seed=s) for s in (3, 4))
    past_k, past_v = (torch.cat([x[0, 0, :, :3], new], 1).double() for x, new in ((keys, k), (values, v)))
    wanted = torch.softmax(0.3 * q.double() @ past_k.transpose(1, 2), -1) @ past_v
    where = [torch.tensor([x]) for x in (0, 3, 0)]
    sizes = _array(1, 1, 2, 8, 32, 1, 0, *[8, 8] * 3)
    return sizes, [q, k, v, keys, values, *where], torch.zeros(1, 2, 8).bfloat16(), wanted


def _cached(library: Any) -> Pairs:
    """`attend`."""
    sizes, tensors, out, wanted = _cache()
    library.attend(sizes, *_at(*tensors), 0.3, out.data_ptr())
    yield out.transpose(0, 1), wanted
    yield tensors[3][0, 0, :, 3], tensors[1][:, 0]


def _head(library: Any) -> Pairs:
    """`head`, for one vector of tokens."""
    logits, weight = _numbers(70, LANES), _numbers(70, 8, seed=1)
    total, mean = torch.empty(LANES), torch.empty(LANES, 8).bfloat16()
    library.head(*_at(logits, weight), LANES, 70, 8, -20.0, *_at(total, mean))
    yield total, torch.logsumexp(logits.double(), 0)
    yield mean, torch.softmax(logits.double(), 0).T @ weight.double()


def _choice(library: Any) -> Pairs:
    """`choose_tokens`: the likeliest, and where a half falls in the distribution."""
    logits, given = _numbers(2, 70), torch.tensor([[0.5, 0.0, 1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    start, ids, out = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 4).double()
    library.choose_tokens(logits.data_ptr(), 2, 70, 70, *_at(given, start, ids), 0, out.data_ptr())
    share = torch.softmax(logits[1].double(), 0).cumsum(0)
    tokens = torch.stack([logits[0].argmax(), (share > 0.5).int().argmax()])
    yield out[:, 0], tokens
    yield out[:, 1], torch.log_softmax(logits.double(), 1).gather(1, tokens[:, None])[:, 0]


def _slots(library: Any) -> Pairs:
    """`fill_slot` of rank 2 into a slot of four columns."""
    a, b = _numbers(2, 6).float(), _numbers(5, 2, seed=1).float()
    own_a, own_b = _numbers(4, 6), _numbers(5, 4)
    library.fill_slot(1, _array(*_at(a, own_a, b, own_b)), _array(2, 4, 6, 5, 4), 2.0)
    yield own_a, functional.pad(a, (0, 0, 0, 2))
    yield own_b, functional.pad(b * 2, (0, 2))


def _program(library: Any) -> Pairs:
    """`run`: zeros, and a sum and an attention that wait for them."""
    sizes, tensors, out, wanted = _cache()
    x, y = _numbers(16), torch.ones(16).bfloat16()
    scale = int.from_bytes(bytes(ctypes.c_float(0.3)), "little")
    calls = [
        [0, 0, y.data_ptr(), y.nbytes], [1, 1, *_at(y, x), 16, y.data_ptr()],
        [5, 0, ctypes.addressof(sizes), *_at(*tensors), scale, out.data_ptr()],
    ]  # fmt: skip
    library.run(_array(*(n for call in calls for n in call + [0] * (CALL - len(call)))), len(calls), 0)
    yield y, x
    yield out.transpose(0, 1), wanted


def _tiles(library: Any) -> Pairs:
    """`products` with an adapter of one slot."""
    x, weight, a, b = _numbers(3, DEEP), _numbers(5, DEEP, seed=1), _numbers(DEEP, DEEP, seed=2), _numbers(5, DEEP, seed=3)
    y = torch.empty(3, 5).bfloat16()
    sizes = _array(3, DEEP, 5, DEEP, DEEP, DEEP, 0, 1)
    library.products(sizes, *_at(x, weight), None, *_at(a, b), None, None, None, y.data_ptr())
    projected = (x.double() @ a.double().T).bfloat16().double()
    yield y / 8, (x.double() @ weight.double().T + projected @ b.double().T) / 8  # sums of 32 products are rounded

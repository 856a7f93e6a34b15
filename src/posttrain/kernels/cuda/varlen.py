"""Attention over packed segments on a GPU: torch's variable-length flash kernel, one sequence a segment.

The keys of a segment are its ancestors' and its own, laid end to end, and the kernel aligns the causal triangle with the last
key: the last query sees every key, the one before it all but one. That is what a segment sees. Segments without ancestors need
no copy; of a shared prompt the keys are gathered once a completion, and their gradients summed in float32.

T: packed tokens, H: query heads, K: key/value heads, D: head width, S: keys of all segments, N: segments.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.segments import SegmentTable, Span, pieces

# What the kernel takes: 16-bit numbers, heads of up to 256 in steps of 8.
WIDEST_HEAD = 256


class VarlenTable(NamedTuple):
    """Where each sequence's queries and keys begin [N + 1], the longest of them, and the packed token of each key [S].

    `key_S` is None where the keys are the packed tokens as they lie.
    """

    query_N: Tensor
    key_N: Tensor
    longest_query: int
    longest_key: int
    key_S: Tensor | None


def takes(q: Tensor) -> bool:
    """Whether the kernel takes these heads."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST_HEAD


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: SegmentTable, window: int) -> Tensor:
    """q [H, T, D], k and v [K, T, D] -> [H, T, D]; a window of 0 sees everything before."""
    table = segments.cached("varlen", lambda: varlen_table(segments.spans, q.shape[1], q.device))
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    if table.key_S is not None:
        keys, values = gather_keys(keys, table.key_S), gather_keys(values, table.key_S)
    out = _kernel()(
        q.transpose(0, 1), keys, values, table.query_N, table.key_N, table.longest_query, table.longest_key, scale=scale,
        window_size=(window - 1, 0) if window else (-1, 0),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)


@functools.cache
def _kernel() -> Callable[..., Any]:
    """The kernel, which has always taken fewer key heads than query heads; from torch 2.12 on it wants to be told."""
    from torch.nn.attention.varlen import varlen_attn

    told: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, **told)


def varlen_table(spans: tuple[Span, ...], total: int, device: torch.device) -> VarlenTable:
    """The kernel's table of a packed batch of `total` tokens; filler behind the last span is a sequence of its own."""
    used = spans[-1].start + spans[-1].length if spans else 0
    sequences = [*spans, Span(used, total - used)] if used < total else list(spans)
    queries, keys = [0], [0]
    order: list[Tensor] = []
    for span in sequences:
        assert span.start == queries[-1], "segments lie end to end"
        queries.append(queries[-1] + span.length)
        keys.append(keys[-1] + span.keys)
        order += [torch.arange(start, start + length) for start, length in pieces(span)]
    return VarlenTable(
        torch.tensor(queries, dtype=torch.int32, device=device),
        torch.tensor(keys, dtype=torch.int32, device=device),
        max(span.length for span in sequences),
        max(span.keys for span in sequences),
        torch.cat(order).to(device) if keys != queries else None,
    )


def gather_keys(x_TKD: Tensor, key_S: Tensor) -> Tensor:
    """Rows of x by index [S, K, D]; the gradient of a row that is taken several times is summed in float32."""
    found: Tensor = _GatherKeys.apply(x_TKD, key_S)  # type: ignore[no-untyped-call]
    return found


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TKD: Tensor, key_S: Tensor) -> Tensor:
        ctx.save_for_backward(key_S)
        ctx.tokens = len(x_TKD)
        return x_TKD[key_S]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (key_S,) = ctx.saved_tensors
        grad = grads[0]
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.tokens, *grad.shape[1:], dtype=wide, device=grad.device)
        return total.index_add_(0, key_S, grad.to(wide)).to(grad.dtype), None

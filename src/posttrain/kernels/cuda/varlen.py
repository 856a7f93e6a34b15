"""Attention over packed segments on a GPU with torch's variable-length flash kernel, one sequence per segment.

The keys of a sequence are the concatenated keys of the segment's ancestors and of the segment. The kernel aligns the causal
triangle with the last key: the last query sees every key, the query before it all but one, as a segment requires. Segments
without ancestors need no copy. The keys of a shared prompt are gathered once per completion, and their gradients are summed in
float32.

T: packed tokens, H: query heads, K: key/value heads, D: head width, S: keys of all segments, N: segments.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.segments import SegmentTable, Span, pieces

# The kernel supports 16-bit numbers and head widths up to this, in steps of 8.
WIDEST_HEAD = 256


class VarlenTable(NamedTuple):
    """The offsets of each sequence's queries and keys [N + 1], the longest lengths, and the packed token of each key [S].

    `key_S` is None if the keys are the packed tokens in their order.
    """

    query_N: Tensor
    key_N: Tensor
    longest_query: int
    longest_key: int
    key_S: Tensor | None


def takes(q: Tensor) -> bool:
    """Whether the kernel supports these heads."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST_HEAD


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: SegmentTable, window: int) -> Tensor:
    """q [H, T, D], k and v [K, T, D] -> [H, T, D]; a window of 0 is unlimited."""
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
    """The kernel with grouped-query attention, which torch 2.12 and later enable by an argument, and earlier ones always."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, **options)


def varlen_table(spans: tuple[Span, ...], total: int, device: torch.device) -> VarlenTable:
    """The kernel's table for a packed batch of `total` tokens. Padding after the last span forms a separate sequence."""
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
    """Rows of x by index [S, K, D]; the gradients of a row that is gathered several times are summed in float32."""
    rows: Tensor = _GatherKeys.apply(x_TKD, key_S)  # type: ignore[no-untyped-call]
    return rows


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

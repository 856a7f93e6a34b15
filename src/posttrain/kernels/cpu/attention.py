"""Attention over packed segments on a CPU with a custom backward: compiled in bfloat16 (`bindings.py`), otherwise as batched
products over blocks of queries.

    S = scale Q K^T,   P = softmax(S),   O = P V          dS = P (dP - rowsum(dP P)),   dP = dO V^T,   dV = P^T dO

A block of queries sees a range of keys that ends at the block's last token, so half of each square is never computed. A sliding
window also cuts the beginning of the range. The G query heads of a key/value head are interleaved along the query length, so
keys are not repeated and a block is contiguous. P of short spans is saved for backward, that of long spans is recomputed. This
takes 0.4 to 0.8 of the time of torch's fused kernel at 64 to 1024 tokens.

T: packed tokens, H: query heads, K: key/value heads, G = H / K, D: head width, L: segment length, S: keys seen.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.cpu import bindings
from posttrain.kernels.segments import SegmentTable, Span, gather, invisible, pieces

# Queries of one block: large enough for the products, small enough that little of the masked half is computed.
BLOCK = 128
# P is kept for spans that see at most so many keys: below 0.4 GiB for 2048 tokens of a model with 30 layers of 9 heads.
KEPT_KEYS = 512


class Block(NamedTuple):
    """Queries [start, stop) of the packed batch and the keys [first, last) of their span that they can see."""

    start: int
    stop: int
    first: int
    last: int


class CpuSegmentAttention(torch.autograd.Function):
    """q [H, T, D], k and v [K, T, D] -> [H, T, D]; tokens outside of all spans give zeros."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: SegmentTable, window: int) -> Tensor:
        """Block by block, or in bfloat16 with the compiled function if there is one."""
        ctx.scale, ctx.segments, ctx.window = scale, segments, window
        if bindings.able(q):
            ctx.save_for_backward(q, k, v)
            return bindings.segments(q, k, v, _table(segments), scale, window)
        folded, groups = _fold(q, k), len(q) // len(k)
        out = torch.zeros_like(folded)
        saved: list[Tensor] = []
        for span in segments.spans:
            keys, values = gather(k, span), gather(v, span)
            for block in _blocks(span, window):
                rows = slice(block.start * groups, block.stop * groups)
                weights = _weights(folded[:, rows], keys, block, scale, segments, window)
                out[:, rows] = torch.bmm(weights, values[:, block.first : block.last])
                if any(ctx.needs_input_grad) and span.keys <= KEPT_KEYS:
                    saved.append(weights)
        ctx.save_for_backward(folded, k, v, *saved)
        return _unfold(out, q)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of queries, keys and values; those of keys and values are summed in float32."""
        folded, k, v, *saved = ctx.saved_tensors
        if bindings.able(k):
            table = _table(ctx.segments)
            return *bindings.segments_backward(folded, k, v, grads[0], table, ctx.scale, ctx.window), None, None, None
        groups = folded.shape[1] // k.shape[1]
        folded_grad, grad_q = _fold(grads[0], k), torch.zeros_like(folded)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        wide = torch.promote_types(k.dtype, torch.float32)
        for span in ctx.segments.spans:
            keys, values = gather(k, span), gather(v, span)
            sum_k, sum_v = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
            for block in _blocks(span, ctx.window):
                rows, seen = slice(block.start * groups, block.stop * groups), slice(block.first, block.last)
                query, grad = folded[:, rows], folded_grad[:, rows]
                if span.keys <= KEPT_KEYS:
                    weights = saved.pop(0)
                else:
                    weights = _weights(query, keys, block, ctx.scale, ctx.segments, ctx.window)
                sum_v[:, seen] += torch.bmm(weights.transpose(1, 2), grad)
                slope = torch.bmm(grad, values[:, seen].transpose(1, 2))
                slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
                grad_q[:, rows] = _scaled_bmm(slope, keys[:, seen], ctx.scale)
                sum_k[:, seen].add_(torch.bmm(slope.transpose(1, 2), query), alpha=ctx.scale)
            _scatter(grad_k, sum_k, span)
            _scatter(grad_v, sum_v, span)
        return _unfold(grad_q, grads[0]), grad_k, grad_v, None, None, None


def _table(segments: SegmentTable) -> bindings.SpanTable:
    return segments.cached("compiled spans", lambda: bindings.SpanTable([pieces(span) for span in segments.spans]))


def _scatter(grad: Tensor, part: Tensor, span: Span) -> None:
    """Add gradients [K, S, D] where their keys came from."""
    offset = 0
    for start, length in pieces(span):
        grad[:, start : start + length] += part[:, offset : offset + length]
        offset += length


def _blocks(span: Span, window: int) -> Iterator[Block]:
    before = span.keys - span.length
    for start in range(0, span.length, BLOCK):
        stop = min(start + BLOCK, span.length)
        first = max(0, before + start - window + 1) if window else 0
        yield Block(span.start + start, span.start + stop, first, before + stop)


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """[H, T, D] as [K, T G, D]: the G heads of a token are adjacent."""
    return x.view(k.shape[0], -1, *x.shape[1:]).transpose(1, 2).reshape(k.shape[0], -1, x.shape[2])


def _unfold(folded: Tensor, like: Tensor) -> Tensor:
    """[K, T G, D] as [H, T, D], in memory token by token, as the layers around attention have it."""
    by_token = folded.view(folded.shape[0], like.shape[1], -1, like.shape[2])
    return by_token.transpose(0, 1).reshape(like.shape[1], like.shape[0], -1).transpose(0, 1)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _weights(query: Tensor, keys: Tensor, block: Block, scale: float, segments: SegmentTable, window: int) -> Tensor:
    """Attention weights [K, L G, S] of a block over the keys that it can see."""
    length, seen = block.stop - block.start, block.last - block.first
    scores = _scaled_bmm(query, keys[:, block.first : block.last].transpose(1, 2), scale)
    by_token = scores.view(scores.shape[0], length, -1, seen)
    # Only a window that cuts inside of the block needs the whole mask; else the last square alone is not plain.
    cut = bool(window) and block.last - window > block.first
    part = by_token if cut else by_token[..., seen - length :]
    hidden = invisible(segments, length, seen if cut else length, window if cut else 0, query.device)
    part.masked_fill_(hidden[:, None], float("-inf"))
    return torch.softmax(scores, -1)

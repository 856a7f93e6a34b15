"""Attention over packed segments on a CPU: plain batched products over blocks of queries, with its own backward.

    S = scale Q K^T,   P = softmax(S),   O = P V          dS = P (dP - rowsum(dP P)),   dP = dO V^T,   dV = P^T dO

A block of queries sees a range of keys that ends at its own last token, so half of each square is never computed; a
sliding window also cuts the range at its beginning. P is made again in backward instead of being kept. The G query heads
of a key/value head lie beside each other in the query length, so no key is repeated and each product is a large one.
Against the fused kernel of torch this takes 0.4 to 0.8 of the time at 64 to 1024 tokens (benchmarks in docs/log.md).

T: packed tokens, H: query heads, K: key/value heads, G = H / K, D: head width, L: segment length, S: keys seen.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.models.segments import Segments, Span

# Queries of one block: large enough for the products, small enough that little of the masked half is computed.
BLOCK = 128


class Block(NamedTuple):
    """Queries [start, stop) of the packed batch and the keys [first, last) of their span that they can see."""

    start: int
    stop: int
    first: int
    last: int


class CpuSegmentAttention(torch.autograd.Function):
    """q [H, T, D], k and v [K, T, D] -> [H, T, D]; tokens outside of all spans give zeros."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments, window: int) -> Tensor:
        """One block after the other."""
        out = torch.zeros_like(q)
        grouped_q, grouped_out = _grouped(q, k), _grouped(out, k)
        for span in segments.spans:
            keys, values = gather(k, span), gather(v, span)
            for block in _blocks(span, window):
                weights = _weights(_fold(grouped_q, block), keys, block, scale, segments, window)
                seen = values[:, block.first : block.last]
                _unfold(grouped_out, block).copy_(torch.bmm(weights, seen).view(_block_shape(q, k, block)))
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.segments, ctx.window = scale, segments, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Gradients of queries, keys and values; those of keys and values are summed in float32."""
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grouped_q, grouped_grad, grouped_grad_q = _grouped(q, k), _grouped(grads[0], k), _grouped(grad_q, k)
        wide = torch.promote_types(q.dtype, torch.float32)
        for span in ctx.segments.spans:
            keys, values = gather(k, span), gather(v, span)
            sum_k, sum_v = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
            for block in _blocks(span, ctx.window):
                seen = slice(block.first, block.last)
                query, grad = _fold(grouped_q, block), _fold(grouped_grad, block)
                weights = _weights(query, keys, block, ctx.scale, ctx.segments, ctx.window)
                sum_v[:, seen] += torch.bmm(weights.transpose(1, 2), grad)
                slope = torch.bmm(grad, values[:, seen].transpose(1, 2))
                slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
                part = _scaled_bmm(slope, keys[:, seen], ctx.scale)
                _unfold(grouped_grad_q, block).copy_(part.view(_block_shape(q, k, block)))
                sum_k[:, seen].add_(torch.bmm(slope.transpose(1, 2), query), alpha=ctx.scale)
            _scatter(grad_k, sum_k, span)
            _scatter(grad_v, sum_v, span)
        return grad_q, grad_k, grad_v, None, None, None


def pieces(span: Span) -> tuple[tuple[int, int], ...]:
    """(start, length) of a span's ancestors and of itself, in the order in which their tokens follow each other."""
    return (*span.ancestors, (span.start, span.length))


def gather(x: Tensor, span: Span) -> Tensor:
    """Rows of the span and its ancestors [K, S, D]."""
    if not span.ancestors:
        return x[:, span.start : span.start + span.length]
    return torch.cat([x[:, start : start + length] for start, length in pieces(span)], dim=1)


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


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[H, T, D] seen as [K, G, T, D]."""
    return x.view(k.shape[0], x.shape[0] // k.shape[0], *x.shape[1:])


def _unfold(grouped: Tensor, block: Block) -> Tensor:
    return grouped[:, :, block.start : block.stop]


def _fold(grouped: Tensor, block: Block) -> Tensor:
    """The block's rows of all G heads, one after the other [K, G L, D]."""
    return _unfold(grouped, block).flatten(1, 2)


def _block_shape(q: Tensor, k: Tensor, block: Block) -> tuple[int, int, int, int]:
    return k.shape[0], q.shape[0] // k.shape[0], block.stop - block.start, q.shape[2]


def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def _weights(query: Tensor, keys: Tensor, block: Block, scale: float, segments: Segments, window: int) -> Tensor:
    """Attention weights [K, G L, S] of a block over the keys that it can see."""
    length, seen = block.stop - block.start, block.last - block.first
    scores = _scaled_bmm(query, keys[:, block.first : block.last].transpose(1, 2), scale)
    by_head = scores.view(scores.shape[0], -1, length, seen)
    # Only a window that cuts inside of the block needs the whole mask; else the last square alone is not plain.
    cut = bool(window) and block.last - window > block.first
    part = by_head if cut else by_head[..., seen - length :]
    invisible = segments.invisible(length, seen if cut else length, window if cut else 0, query.device)
    part.masked_fill_(invisible, float("-inf"))
    return torch.softmax(scores, -1)

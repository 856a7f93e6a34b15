"""Attention over packed segments: each token sees its own segment up to itself and the whole of its segment's ancestors.

One function is registered with transformers' attention interface, so every causal model that the interface serves works,
sliding windows included. On a CPU it runs once a segment: no work between segments, no padding, cost the sum of squares.
On a GPU the same table becomes the sequences of the variable-length flash kernel. With a cache, each packed token is one row
of a decoding batch and sees that row's cached keys.

T: packed tokens, H: query heads, K: key/value heads, G = H / K, D: head width, L: segment length, S: keys seen, R: rows.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface

from posttrain.models.attention_cpu import CpuSegmentAttention, gather
from posttrain.models.attention_cuda import takes, varlen_attention
from posttrain.models.segments import KeyValueCache, Segments, Span

ATTENTION_NAME = "posttrain_segments"


def register_attention() -> None:
    """Make the packed-segment attention known to transformers under ATTENTION_NAME."""
    transformers.AttentionInterface.register(ATTENTION_NAME, segment_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The segment table is the mask."""
    return None


def segment_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
    segments: Segments, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature: query [1, H, T, D], key and value [1, K, T, D] -> ([1, T, H, D], None)."""
    assert dropout == 0.0, "attention dropout would make a policy differ from its own samples"
    window = sliding_window or 0
    q, k, v = query[0], key[0], value[0]
    if segments.decoding:
        out = _decode(module, q, k, v, scaling, segments, window, softcap)
    else:
        if segments.cache is not None:
            _fill(segments.cache, int(module.layer_idx), k, v, segments.spans)  # type: ignore[arg-type]
        if softcap is not None:
            out = _reference(q, k, v, scaling, segments, window, softcap)
        elif q.is_cuda:
            attention = varlen_attention if takes(q) else _reference
            out = attention(q, k, v, scaling, segments, window)
        else:
            out = CpuSegmentAttention.apply(q, k, v, scaling, segments, window)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None], None


def _reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments, window: int, softcap: float | None = None
) -> Tensor:
    """The same attention by plain operations: for soft-capped models, for float32 on a GPU, and to compare against."""
    groups = q.shape[0] // k.shape[0]
    out = torch.zeros_like(q)
    for span in segments.spans:
        rows = slice(span.start, span.start + span.length)
        keys = gather(k, span).repeat_interleave(groups, 0)
        values = gather(v, span).repeat_interleave(groups, 0)
        scores = q[:, rows] @ keys.transpose(1, 2) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(segments.invisible(span.length, span.keys, window, q.device), float("-inf"))
        weights = torch.softmax(scores.float(), -1).to(q.dtype)
        out = torch.index_copy(out, 1, torch.arange(rows.start, rows.stop, device=q.device), weights @ values)
    return out


def _fill(cache: KeyValueCache, layer: int, k: Tensor, v: Tensor, spans: tuple[Span, ...]) -> None:
    """Prefill: the keys and values of span i become the first entries of row `cache.filling[i]`."""
    keys, values = cache.layer(layer, k)
    for row, span in zip(cache.filling, spans, strict=False):
        rows = slice(span.start, span.start + span.length)
        keys[row, :, : span.length] = k[:, rows]
        values[row, :, : span.length] = v[:, rows]


def _decode(
    module: torch.nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    segments: Segments,
    window: int,
    softcap: float | None,
) -> Tensor:
    """One new token a row: append its key and value, attend to the row's cache. q [H, R, D] -> [H, R, D]."""
    cache = segments.cache
    assert cache is not None
    keys, values = cache.layer(int(module.layer_idx), k)  # type: ignore[arg-type]
    rows_R = torch.arange(cache.rows, device=q.device)
    lengths_R = cache.lengths_R.to(q.device)
    keys[rows_R, :, lengths_R] = k.transpose(0, 1)
    values[rows_R, :, lengths_R] = v.transpose(0, 1)
    longest = int(cache.lengths_R.max()) + 1
    if window not in segments.masks:
        place_S = torch.arange(longest, device=q.device)
        seen = place_S[None] <= lengths_R[:, None]
        if window:
            seen &= place_S[None] > lengths_R[:, None] - window
        segments.masks[window] = seen[:, None, None]
    mask = segments.masks[window]
    heads, width = q.shape[0], q.shape[2]
    # The G query heads of a key/value head stand where a query sequence would: no key is repeated.
    grouped = q.transpose(0, 1).reshape(cache.rows, k.shape[0], heads // k.shape[0], width)
    if softcap is None:
        out = functional.scaled_dot_product_attention(
            grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask, scale=scale
        )
    else:
        scores = torch.tanh(grouped @ keys[:, :, :longest].transpose(2, 3) * scale / softcap) * softcap
        out = torch.softmax(scores.masked_fill(~mask, float("-inf")).float(), -1).to(q.dtype) @ values[:, :, :longest]
    return out.reshape(cache.rows, heads, width).transpose(0, 1)

"""Attention over packed segments: each token sees its own segment up to itself and the whole of its segment's ancestors.

One function is registered with transformers' attention interface, so every causal model that the interface serves works,
sliding windows included. On a CPU it runs once a segment: no work between segments, no padding, cost the sum of squares.
On a GPU the same table becomes the sequences of the variable-length flash kernel. With a cache (`models/decoding.py`),
the first tokens of the batch are those of decoding rows and see their rows' cached keys.

T: packed tokens, H: query heads, K: key/value heads, D: head width.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface

from posttrain.models.attention_cpu import CpuSegmentAttention, gather
from posttrain.models.attention_cuda import takes, varlen_attention
from posttrain.models.decoding import decode, fill, with_pasts
from posttrain.models.segments import Segments

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
    if segments.step is None:
        out = _packed(q, k, v, scaling, segments, window, softcap)
    else:
        out = _cached(q, k, v, int(module.layer_idx), scaling, segments, window, softcap)  # type: ignore[arg-type]
    return out.transpose(0, 1)[None], None


def _packed(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments, window: int, softcap: float | None) -> Tensor:
    if softcap is not None:
        return _reference(q, k, v, scale, segments, window, softcap)
    if q.is_cuda:
        attention = varlen_attention if takes(q) else _reference
        return attention(q, k, v, scale, segments, window)
    return CpuSegmentAttention.apply(q, k, v, scale, segments, window)  # type: ignore[no-any-return, no-untyped-call]


def _cached(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, segments: Segments, window: int, softcap: float | None
) -> Tensor:
    """Decoding rows first, then the packed prompts of rows that join. Their places are filled after the rows are read:
    until then a place without a row is filler."""
    step = segments.step
    assert step is not None
    parts = []
    if step.rows:
        parts.append(decode(q, k, v, layer, step, scale=scale, window=window, softcap=softcap))
    if segments.spans:
        keys, values = with_pasts(step, layer, k[:, step.rows :], v[:, step.rows :])
        parts.append(_packed(q[:, step.rows :], keys, values, scale, segments, window, softcap))
        fill(step, layer, k, v)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


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

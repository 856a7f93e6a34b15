"""Attention over packed segments: each token sees its own segment up to itself, and all tokens of the segment's ancestors.

One function is registered with transformers' attention interface, so it serves every causal model that uses the interface,
sliding windows included. On a CPU it runs once per segment: without padding, at the cost of the sum of squared lengths.
On a GPU the same table becomes the sequences of the variable-length flash kernel. With a cache (`models/cache.py`), the
first tokens of the batch belong to decoding rows and attend to the cached keys of their rows. Unknown arguments are refused,
because ignoring one could change the result silently.

T: packed tokens, H: query heads, K: key/value heads, D: head width, E: width of the values, at most D.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface

from posttrain import kernels
from posttrain.models.cache import Extras, fill, with_pasts
from posttrain.models.segments import Segments

ATTENTION_NAME = "posttrain_segments"
# Arguments that repeat what the segments contain, or that request further outputs.
HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings", "use_cache", "output_attentions"})


def register_attention() -> None:
    """Register the packed-segment attention with transformers under ATTENTION_NAME."""
    transformers.AttentionInterface.register(ATTENTION_NAME, segment_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Build no mask: the segment table replaces it."""
    return None


def segment_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
    segments: Segments | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature: query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> ([1, T, H, E], None).

    `s_aux` [H]: attention sinks, one logit per head for a key without a value. Raises NotImplementedError for any other
    argument that could change the result.
    """
    assert dropout == 0.0, "attention dropout would make a policy differ from its own samples"
    segments = _require_segments(segments, attention_mask, is_causal, others)
    extra = Extras(sliding_window or 0, softcap, s_aux)
    q, k, v = query[0], key[0], value[0]
    width = v.shape[-1]
    if width != q.shape[-1]:  # latent attention; padding with zeros does not change the weighted sum of the values
        if width > q.shape[-1]:
            raise NotImplementedError("its values are wider than its keys")
        v = functional.pad(v, (0, q.shape[-1] - width))
    if segments.step is None:
        out = kernels.segment_attention(q, k, v, segments, scale=scaling, extra=extra)
    else:
        out = _attend_with_cache(q, k, v, int(module.layer_idx), scaling, segments, extra)  # type: ignore[arg-type]
    if width != q.shape[-1]:
        out = out[..., :width]
    return out.transpose(0, 1)[None], None


def _require_segments(
    segments: Segments | None, mask: Tensor | None, is_causal: bool | None, others: dict[str, Any]
) -> Segments:
    """Return the segments. Raises NotImplementedError if they are missing or another argument could change the result."""
    unknown = [name for name, argument in others.items() if argument is not None and name not in HARMLESS]
    if mask is not None:
        unknown.append("attention_mask")
    if is_causal is False:
        unknown.append("is_causal = False")
    if unknown:
        raise NotImplementedError(f"its attention has arguments that are not supported: {', '.join(sorted(unknown))}")
    if segments is None:
        raise NotImplementedError("its layers do not pass keyword arguments on to the attention function")
    return segments


def _attend_with_cache(q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, segments: Segments, extra: Extras) -> Tensor:
    """Attend first for the decoding rows, then for the packed prompts of rows that join the batch.

    The prompts are written to the cache last: until then their places hold filler."""
    step = segments.step
    assert step is not None
    segments.calls += 1
    parts = []
    if step.rows:
        parts.append(kernels.cache_attention(q, k, v, layer, step.readings, step.rows, scale=scale, extra=extra))
    if segments.spans:
        keys, values = with_pasts(step, layer, k[:, step.rows :], v[:, step.rows :])
        parts.append(kernels.segment_attention(q[:, step.rows :], keys, values, segments, scale=scale, extra=extra))
        fill(step, layer, k, v)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

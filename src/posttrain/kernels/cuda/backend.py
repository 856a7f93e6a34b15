"""Every operation on a CUDA device, as `kernels/__init__.py` calls it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels import reference
from posttrain.kernels.cuda import compiled, varlen
from posttrain.kernels.cuda.compiled import logit_gradient as logit_gradient
from posttrain.kernels.cuda.head import head_slopes as head_slopes
from posttrain.kernels.cuda.head import head_values as head_values
from posttrain.kernels.interfaces import SlotLayout
from posttrain.kernels.reference import advice as advice
from posttrain.kernels.reference import attends_by_row as attends_by_row
from posttrain.kernels.reference import engine_linear as engine_linear
from posttrain.kernels.reference import linear as linear
from posttrain.kernels.reference import lora_linear as lora_linear
from posttrain.kernels.reference import packed_bytes as packed_bytes
from posttrain.kernels.reference import replay as replay
from posttrain.kernels.reference import token_chooser as token_chooser
from posttrain.kernels.reference_slots import PlainLayout
from posttrain.kernels.segments import Extras, Reading, SegmentTable


def rms_norm(x: Tensor, weight_D: Tensor, offset: float, scale_D: Tensor, eps: float) -> Tensor:
    """One kernel each way; the weight may be trained."""
    return compiled.rms_norm(x.reshape(-1, x.shape[-1]), weight_D, offset, eps).view_as(x)


def rotate(x_HTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """One kernel each way."""
    return compiled.rotate(x_HTE.transpose(0, 1), cos_TE, sin_TE).transpose(0, 1)


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """One kernel each way."""
    fused = compiled.gated_gelu if gelu else compiled.gated_silu
    return fused(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])).view_as(gate)


def segment_attention(
    q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segments: SegmentTable, *, scale: float, extra: Extras
) -> Tensor:
    """By the variable-length flash kernel, for the heads that it takes."""
    if extra.plain and varlen.takes(q_HTE):
        return varlen.varlen_attention(q_HTE, k_KTE, v_KTE, scale, segments, extra.window)
    return reference.segment_attention(q_HTE, k_KTE, v_KTE, segments, scale=scale, extra=extra)


def cache_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, readings: Sequence[Reading], rows: int, *, scale: float, extra: Extras
) -> Tensor:
    """By torch's fused attention over all places of a shelf, whose keys are one block."""
    if not extra.plain:
        return reference.cache_attention(q, k, v, layer, readings, rows, scale=scale, extra=extra)
    parts = []
    for reading in readings:
        shelf, count = reading.shelf, reading.rows
        shelf.write(layer, k, v, reading.place_N, reading.length_N, reading.token_N)
        keys, values = shelf.layer(layer, k)
        out = functional.scaled_dot_product_attention(
            q[:, reading.start : reading.start + count].transpose(0, 1).reshape(count, len(k), len(q) // len(k), -1),
            keys[0, :count, :, : reading.seen], values[0, :count, :, : reading.seen],
            attn_mask=reading.bias(extra.window, q.dtype)[:, None, None], scale=scale,
        )  # fmt: skip
        parts.append(out.reshape(count, len(q), -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def slot_layout(dtype: torch.dtype, device: torch.device, *, serving: bool) -> SlotLayout:
    """A slot after the other in each layer; all slots side by side are one matrix, as steps of fixed form read them."""
    return PlainLayout(dtype, device, one_matrix=True)

"""Every operation on a CPU, as `kernels/__init__.py` calls it. Where nothing is compiled, PyTorch computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.adapters import slot_layout as slot_layout
from posttrain.kernels.cpu.attention import CpuSegmentAttention
from posttrain.kernels.cpu.autograd import gated as gated
from posttrain.kernels.cpu.autograd import rms_norm as rms_norm
from posttrain.kernels.cpu.autograd import rotate as rotate
from posttrain.kernels.cpu.build import advice as advice
from posttrain.kernels.cpu.head import head_slopes as head_slopes
from posttrain.kernels.cpu.head import head_values as head_values
from posttrain.kernels.cpu.linear import engine_linear as engine_linear
from posttrain.kernels.cpu.linear import linear as linear
from posttrain.kernels.cpu.linear import lora_linear as lora_linear
from posttrain.kernels.cpu.linear import packed_bytes as packed_bytes
from posttrain.kernels.cpu.replay import replay as replay
from posttrain.kernels.interfaces import Choose
from posttrain.kernels.reference import logit_gradient as logit_gradient
from posttrain.kernels.segments import Extras, Reading, SegmentTable


def segment_attention(
    q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segments: SegmentTable, *, scale: float, extra: Extras
) -> Tensor:
    """One span after the other, with a backward of its own (`attention.py`)."""
    if not extra.plain:
        return reference.segment_attention(q_HTE, k_KTE, v_KTE, segments, scale=scale, extra=extra)
    out: Tensor = CpuSegmentAttention.apply(q_HTE, k_KTE, v_KTE, scale, segments, extra.window)  # type: ignore[no-untyped-call]
    return out


def cache_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, readings: Sequence[Reading], rows: int, *, scale: float, extra: Extras
) -> Tensor:
    """In one pass over the keys and values of each row, and no further than its length."""
    if not (extra.plain and bindings.able(q) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        return reference.cache_attention(q, k, v, layer, readings, rows, scale=scale, extra=extra)
    # Places without a row find zeros.
    out_NHE = q.new_zeros((rows, len(q), q.shape[-1]))
    for reading in readings:
        assert isinstance(reading.token_N, Tensor)
        where = reading.place_N, reading.length_N, reading.token_N
        bindings.attend(q, k, v, *reading.shelf.layer(layer, k), where, scale, extra.window, out_NHE)
    return out_NHE.transpose(0, 1)


def token_chooser(logits_RV: Tensor) -> Choose | None:
    """The compiled choice (`c/sample.c`)."""
    return bindings.choose_tokens if bindings.able(logits_RV) else None


def attends_by_row(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled attention reads the cache."""
    return bindings.able(torch.empty(0, dtype=dtype, device=device))

"""The operations of a model. Each has a reference implementation (`reference.py`) and faster ones (`cpu`, `cuda`).

`models/`, `generate/`, `train/`, `serve/` and `pipeline.py` import from this file only and never select an implementation.
Without the folder `kernels/cpu` the reference runs on a CPU: equal up to rounding, and slower. The fast implementations fall
back to the reference for dtypes and shapes that they do not support.

T: tokens, H: query heads, K: key/value heads, D: width, E: head width, I: inputs, O: outputs, R: rank (of logits: rows),
N: targets, V: vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.kernels import reference
from posttrain.kernels.cuda import backend as cuda
from posttrain.kernels.cuda.graphs import Graphs, replayable
from posttrain.kernels.cuda.graphs import Step as Step
from posttrain.kernels.head_rows import HeadRows as HeadRows
from posttrain.kernels.head_rows import head_logits as head_logits
from posttrain.kernels.interfaces import Backend, Choose, Forward
from posttrain.kernels.interfaces import EngineLinear as EngineLinear
from posttrain.kernels.interfaces import Replay as Replay
from posttrain.kernels.interfaces import SlotLayout as SlotLayout
from posttrain.kernels.interfaces import Stack as Stack
from posttrain.kernels.interfaces import TokenProducts as TokenProducts
from posttrain.kernels.interfaces import TokenRuns as TokenRuns
from posttrain.kernels.reference_head import HeadSlopes, HeadValues
from posttrain.kernels.reference_head import head_chunks as head_chunks
from posttrain.kernels.reference_slots import all_finite as all_finite
from posttrain.kernels.segments import Extras as Extras
from posttrain.kernels.segments import Reading as Reading
from posttrain.kernels.segments import SegmentTable
from posttrain.kernels.segments import Span as Span

_cuda: Backend = cuda
_cpu: Backend = reference
try:
    import posttrain.kernels.cpu.backend as _native

    _cpu = _native
except ModuleNotFoundError as error:
    if error.name != "posttrain.kernels.cpu":
        raise


def _backend(x: Tensor) -> Backend:
    return _cuda if x.is_cuda else _cpu


def _backend_of(device: torch.device) -> Backend:
    return _cuda if device.type == "cuda" else _cpu


def rms_norm(x: Tensor, weight_D: Tensor, offset: float, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) (weight + offset) over the last dimension. On a GPU the weight may be trained. On a CPU it must
    be frozen; `scale_D` is weight + offset in float32."""
    return _backend(x).rms_norm(x, weight_D, offset, scale_D, eps)


def rotate(x_HTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding by halves, x cos + (-x_2, x_1) sin [H, T, E], without gradients for cos and sin."""
    return _backend(x_HTE).rotate(x_HTE, cos_TE, sin_TE)


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) up, or gelu(gate) up with the tanh form of gelu."""
    return _backend(gate).gated(gate, up, gelu=gelu)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """W x + b [..., O]."""
    return _backend(x).linear(x, weight_OI, bias_O)


def lora_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """W x + b + scale B A x [..., O] with a frozen weight; A and B are float32 and trainable."""
    return _backend(x).lora_linear(x, weight_OI, bias_O, a_RI, b_OR, scale)


def segment_attention(
    q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segments: SegmentTable, *, scale: float, extra: Extras
) -> Tensor:
    """softmax(scale Q K) V [H, T, E]: causal attention of each span over its ancestors and itself."""
    return _backend(q_HTE).segment_attention(q_HTE, k_KTE, v_KTE, segments, scale=scale, extra=extra)


def cache_attention(
    q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, layer: int, readings: Sequence[Reading], rows: int, *, scale: float,
    extra: Extras,
) -> Tensor:  # fmt: skip
    """Append the key and value of one new token per row to the row's cache, then attend to the cache. [H, rows, E], without
    gradient."""
    return _backend(q_HTE).cache_attention(q_HTE, k_KTE, v_KTE, layer, readings, rows, scale=scale, extra=extra)


def head_values(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadValues:
    """log p of each target and log sum exp of the logits [N], float32, without gradient."""
    return _backend(head_VD).head_values(hidden_ND, head_VD, target_N, rows, bias_V)


def head_slopes(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadSlopes:
    """log p of each target [N] and d log p / d h [N, D] under a frozen head."""
    return _backend(head_VD).head_slopes(hidden_ND, head_VD, target_N, rows, bias_V)


def logit_gradient(logits_NV: Tensor, total_N: Tensor, target_N: Tensor, grad_N: Tensor) -> Tensor:
    """d sum_n g_n log p_n / d z = g (onehot - p) [N, V], in the dtype of the logits."""
    return _backend(logits_NV).logit_gradient(logits_NV, total_N, target_N, grad_N)


def token_chooser(logits_RV: Tensor) -> Choose | None:
    """A function that samples tokens from these logits; None if `generate/sampling.py` has to do it."""
    return _backend(logits_RV).token_chooser(logits_RV)


def engine_linear(dtype: torch.dtype, device: torch.device, *, serving: bool = False) -> EngineLinear:
    """The products of an engine's forwards, which may keep packed copies of frozen weights. With `serving`, the last bits of a
    row's result may depend on the number of rows."""
    return _backend_of(device).engine_linear(dtype, device, serving=serving)


def slot_layout(dtype: torch.dtype, device: torch.device, *, serving: bool = False) -> SlotLayout:
    """The memory layout of an engine's adapter slots, and the products that use it."""
    return _backend_of(device).slot_layout(dtype, device, serving=serving)


def replay(model: nn.Module, forward: Forward) -> Replay:
    """The forwards of one base. Decoding steps may be recorded and replayed as one call."""
    return _backend(next(model.parameters())).replay(model, forward)


def step_graphs(device: torch.device, config: dict[str, Any]) -> Graphs:
    """Steps of fixed form for a model with this configuration: recorded on a GPU, run directly on a CPU."""
    return Graphs(device, record=replayable(config))


def attends_by_row(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `cache_attention` reads only each row's own keys, independent of its place on the shelf."""
    return _backend_of(device).attends_by_row(dtype, device)


def packed_bytes(weight_OI: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the packed copy of a weight that engines with this dtype keep."""
    return _backend_of(device).packed_bytes(weight_OI, dtype, device)


def advice(dtype: torch.dtype, device: torch.device) -> str | None:
    """How to make this machine faster (a missing compiler, for example); None if nothing is missing."""
    return _backend_of(device).advice(dtype, device)

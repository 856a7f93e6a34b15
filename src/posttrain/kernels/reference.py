"""The reference implementation of every operation of `kernels/__init__.py`, in PyTorch. The others agree up to rounding.

T: tokens, H: query heads, K: key/value heads, G = H / K, D: width, E: head width, I: inputs, O: outputs, R: rank, S: keys seen,
N: rows that decode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from posttrain.kernels.interfaces import Choose, EngineLinear, Forward, Replay, StepTokens
from posttrain.kernels.reference_head import head_slopes as head_slopes
from posttrain.kernels.reference_head import head_values as head_values
from posttrain.kernels.reference_head import logit_gradient as logit_gradient
from posttrain.kernels.reference_slots import slot_layout as slot_layout
from posttrain.kernels.segments import DecodingSegments, Extras, Reading, SegmentTable, gather, invisible


def rms_norm(x: Tensor, weight_D: Tensor, offset: float, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) (weight + offset), computed in float32, in the dtype of x (Zhang and Sennrich 2019)."""
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * root * (weight_D.float() + offset)).to(x.dtype)


def rotate(x_HTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding by halves (Su et al. 2021): x cos + (-x_2, x_1) sin, each product in the dtype of x."""
    half = x_HTE.shape[-1] // 2
    turned = torch.cat([-x_HTE[..., half:], x_HTE[..., :half]], -1)
    return (x_HTE * cos_TE) + (turned * sin_TE)


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) up, or gelu(gate) up with the tanh form of gelu (Shazeer 2020)."""
    return (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """W x + b."""
    return functional.linear(x, weight_OI, bias_O)


Adapted = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def adapted(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """W x + b + scale B A x [T, O], and A x [T, R], in the dtype of x; A and B are float32."""
    p_TR = x_TI @ a_RI.to(x_TI.dtype).T
    y_TO = functional.linear(x_TI, weight_OI, bias_O)
    return y_TO.addmm_(p_TR, b_OR.to(x_TI.dtype).T, alpha=scale), p_TR


class LoraProduct(torch.autograd.Function):
    """The product with an adapter and a frozen weight. Saves the input and its projection for backward, but no output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, product: Adapted
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, projected_TR = product(flat, weight, bias, a, b, scale)
        ctx.save_for_backward(flat, projected_TR, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        flat, projected_TR, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_TR = grad @ b.to(grad.dtype) * ctx.scale
        grad_a = (grad_TR.T @ flat).to(a.dtype) if ctx.needs_input_grad[3] else None
        grad_b = (grad.T @ projected_TR).to(b.dtype) * ctx.scale if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_TR, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def lora_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """W x + b + scale B A x, differentiable in x, A and B; the weight is frozen."""
    y: Tensor = LoraProduct.apply(x, weight_OI, bias_O, a_RI, b_OR, scale, adapted)  # type: ignore[no-untyped-call]
    return y


def softmax_with_sinks(scores: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Softmax over the last dimension of scores [H, ..., S] and the sinks; returns the weights without those of the sinks."""
    if sinks_H is None:
        return torch.softmax(scores, -1)
    sinks = sinks_H.to(scores.dtype).view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


def segment_attention(
    q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segments: SegmentTable, *, scale: float, extra: Extras
) -> Tensor:
    """softmax(scale Q K) V of each span [H, T, E] over its ancestors and itself; tokens of no span give zeros."""
    groups = q_HTE.shape[0] // k_KTE.shape[0]
    out = torch.zeros_like(q_HTE)
    for span in segments.spans:
        rows = slice(span.start, span.start + span.length)
        keys = gather(k_KTE, span).repeat_interleave(groups, 0)
        values = gather(v_KTE, span).repeat_interleave(groups, 0)
        scores = q_HTE[:, rows] @ keys.transpose(1, 2) * scale
        if extra.softcap:
            scores = torch.tanh(scores / extra.softcap) * extra.softcap
        hidden = invisible(segments, span.length, span.keys, extra.window, q_HTE.device)
        weights = softmax_with_sinks(scores.masked_fill(hidden, float("-inf")).float(), extra.sinks_H).to(q_HTE.dtype)
        out = torch.index_copy(out, 1, torch.arange(rows.start, rows.stop, device=q_HTE.device), weights @ values)
    return out


def cache_attention(
    q: Tensor, k: Tensor, v: Tensor, layer: int, readings: Sequence[Reading], rows: int, *, scale: float, extra: Extras
) -> Tensor:
    """Append the key and value of one new token per row, then attend to the row's cache. q [H, T, E] -> [H, rows, E]."""
    parts = []
    for reading in readings:
        shelf, count = reading.shelf, reading.rows
        shelf.write(layer, k, v, reading.place_N, reading.length_N, reading.token_N)
        grouped = q[:, reading.start : reading.start + count].transpose(0, 1).reshape(count, len(k), len(q) // len(k), -1)
        parts.append(_attend(grouped, *shelf.layer(layer, k), reading, scale, extra).reshape(count, len(q), -1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _attend(q_NKGE: Tensor, keys: Tensor, values: Tensor, reading: Reading, scale: float, extra: Extras) -> Tensor:
    """Batched products over the blocks [blocks, places, K, block, E] that contain the keys seen.

    The keys are the left factor, because the library packs only the right one, which is small here. A product covers the first
    places of one block, because these are contiguous; other slices would be copied.
    """
    rows, heads, groups, width = q_NKGE.shape
    size = keys.shape[3]
    turned = q_NKGE.reshape(rows * heads, groups, width).transpose(1, 2)
    # Scores of blocks that a row does not reach stay 0; the mask below hides them.
    scores = q_NKGE.new_zeros((rows * heads, groups, len(reading.rows_B) * size), dtype=torch.float32)
    for b, reached in enumerate(reading.rows_B):
        count = reached * heads
        part = torch.bmm(keys[b, :reached].view(count, size, width), turned[:count])
        scores[:count, :, b * size : (b + 1) * size] = part.transpose(1, 2)
    if extra.softcap is not None:
        scores, scale = torch.tanh(scores * (scale / extra.softcap)), extra.softcap
    scores = scores.view(rows, heads * groups, -1)[..., : reading.seen]
    # Adding the mask takes a sixth of the time of `masked_fill`.
    scores = torch.add(reading.bias(extra.window, torch.float32)[:, None], scores, alpha=scale)
    if extra.sinks_H is None:
        weights = torch.softmax(scores, -1)
    else:
        weights = softmax_with_sinks(scores.transpose(0, 1), extra.sinks_H).transpose(0, 1)
    weights = weights.to(q_NKGE.dtype).reshape(rows * heads, groups, -1)
    out = q_NKGE.new_zeros((rows * heads, groups, width), dtype=torch.float32)
    for b, reached in enumerate(reading.rows_B):
        count = reached * heads
        part = weights[:count, :, b * size : (b + 1) * size]
        out[:count] += torch.bmm(part, values[b, :reached].view(count, size, width)[:, : part.shape[2]])
    return out.to(q_NKGE.dtype).view(q_NKGE.shape)


def attends_by_row(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `cache_attention` reads only each row's own keys: no."""
    return False


class PlainLinear:
    """Products without packed copies of weights."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b; a weight of another dtype is cast in each call."""
        return functional.linear(x, weight.to(x.dtype), bias)

    def logits(self, x_RD: Tensor, head_VD: Tensor) -> Tensor:
        """Logits [R, V]."""
        return self(x_RD, head_VD)


def engine_linear(dtype: torch.dtype, device: torch.device, *, serving: bool) -> EngineLinear:
    """The products of an engine's forwards."""
    return PlainLinear()


def packed_bytes(weight_OI: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the packed copy of a weight: none."""
    return 0


def token_chooser(logits_RV: Tensor) -> Choose | None:
    """None: the reference implementation of sampling is `generate/sampling.py`."""
    return None


class PlainReplay:
    """Forwards without recordings."""

    def __init__(self, forward: Forward) -> None:
        self._forward, self.recording, self.replayed = forward, True, 0

    @property
    def wants_decoding_alone(self) -> bool:
        """False: nothing is recorded."""
        return False

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments: DecodingSegments, tokens: StepTokens) -> Tensor:
        """Last hidden states [T, D]."""
        return self._forward(ids_T, positions_T, segments)


def replay(model: nn.Module, forward: Forward) -> Replay:
    """The forwards of one base, without recordings."""
    return PlainReplay(forward)


def advice(dtype: torch.dtype, device: torch.device) -> str | None:
    """How to make this machine faster: nothing is known."""
    return None

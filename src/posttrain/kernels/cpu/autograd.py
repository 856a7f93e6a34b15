"""Functions on a CPU with a custom backward: norms, gates, rotations and products. Attention: `attention.py`.

    norm    y = x r w,   r = 1 / sqrt(mean(x^2) + eps)      dx = r (g w - x r mean(g w x r))      (Zhang and Sennrich 2019)

A norm of PyTorch operations saves two float32 copies of every activation for backward, which is most of the memory of a packed
step. This one saves the input and one number per token.

T: tokens, H: heads, D: width.
"""

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.cpu import bindings


def rms_norm(x: Tensor, weight_D: Tensor, offset: float, scale_D: Tensor, eps: float) -> Tensor:
    """x r w with a frozen weight; `scale_D` is w = weight + offset in float32."""
    if not torch.is_grad_enabled():  # the overhead of an autograd.Function exceeds the norm of a few tokens
        return _normed(x, scale_D, eps)[0]
    out: Tensor = FrozenNorm.apply(x, scale_D, eps)  # type: ignore[no-untyped-call]
    return out


def rotate(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x cos + (-x_2, x_1) sin."""
    if not bindings.able(x_HTD) or cos_TD.dtype != x_HTD.dtype:
        return reference.rotate(x_HTD, cos_TD, sin_TD)
    return Rotation.apply(x_HTD, cos_TD.contiguous(), sin_TD.contiguous())  # type: ignore[no-any-return, no-untyped-call]


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """act(gate) up."""
    if not bindings.able(gate):
        return reference.gated(gate, up, gelu=gelu)
    return Gate.apply(gate, up, gelu)  # type: ignore[no-any-return, no-untyped-call]


def _normed(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """y and r; r is None with the compiled function, which computes it again in backward."""
    if bindings.able(x):
        return bindings.rms_norm(x, weight_D, eps), None
    wide = x.float()
    root = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * root).mul_(weight_D).to(x.dtype), root


class FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, root = _normed(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, root)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight_D, root = ctx.saved_tensors
        if root is None:
            return bindings.rms_norm_backward(x, weight_D, ctx.eps, grads[0]), None, None
        normed = x.float() * root
        slope = grads[0].float() * weight_D
        along = (slope * normed).mean(-1, keepdim=True)
        return slope.sub_(normed.mul_(along)).mul_(root).to(x.dtype), None, None


class Gate(torch.autograd.Function):
    """act(gate) up on a CPU; saves both factors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return bindings.gated(gate, up, gelu=gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        return *bindings.gated_backward(gate, up, grads[0], gelu=ctx.gelu), None


class Rotation(torch.autograd.Function):
    """Rotation of x [H, T, D] on a CPU; saves cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return bindings.rotate(x, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return bindings.rotate_backward(grads[0], *ctx.saved_tensors), None, None


class Product(torch.autograd.Function):
    """W x + b with our own product. Backward uses the library's products, because sampling never computes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return bindings.products(flat, weight, bias)[0].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        flat, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = (grad @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ flat if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None

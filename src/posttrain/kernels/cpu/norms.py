"""Root-mean-square normalisation with a backward of its own.

    y = x r w,   r = 1 / sqrt(mean(x^2) + eps)          dx = r (g w - x r mean(g w x r))        (Zhang and Sennrich 2019)

The models' own modules leave two float32 copies of every activation for backward, which is most of what a packed step keeps in
memory; this keeps the input and one number a token. A module is replaced only where this function gives what it gives. On a
GPU a norm is one compiled kernel each way, and its weight may be trained.

T: tokens, D: width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cuda.compiled import rms_norm


def _normed(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """y and r; the compiled function makes r again in backward."""
    if bindings.able(x):
        return bindings.rms_norm(x, weight_D, eps), None
    wide = x.float()
    root = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * root).mul_(weight_D).to(x.dtype), root


class _FrozenNorm(torch.autograd.Function):
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


class RmsNorm(nn.Module):
    """y = x r w with w = weight + offset; `weight` is the model's own parameter. On a CPU it must be frozen."""

    def __init__(self, weight: nn.Parameter, offset: float, eps: float) -> None:
        super().__init__()
        self.weight, self.offset, self.eps = weight, offset, eps
        self._scale_D = weight.detach().float() + offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if x.is_cuda:
            return rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.offset, self.eps).view_as(x)
        if not torch.is_grad_enabled():  # the call of a function with a backward takes longer than the norm of a few tokens
            return _normed(x, self._scale_D, self.eps)[0]
        out: Tensor = _FrozenNorm.apply(x, self._scale_D, self.eps)  # type: ignore[no-untyped-call]
        return out


def replace_norms(model: nn.Module, eps: float | None) -> int:
    """Replace a model's RMS norms; returns how many. One that computes something else is left as it is.

    On a CPU only the norms of a frozen model may be replaced.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if type(module).__name__.endswith("RMSNorm") and eps is not None and weight is not None:
            equal = _equal(module, weight, eps)
            if equal is not None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, equal)
                replaced += 1
    return replaced


@torch.no_grad()
def _equal(module: nn.Module, weight: nn.Parameter, eps: float) -> RmsNorm | None:
    """The same norm, scaled by its weight (Llama) or by one more than its weight (Gemma), or None where neither fits."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
    # Small inputs show an eps that differs.
    probe = torch.cat([probe, probe * eps**0.5])
    wanted = module(probe).float()
    close = 2e-2 if weight.dtype == torch.bfloat16 else 1e-5
    for offset in (0.0, 1.0):
        candidate = RmsNorm(weight, offset, eps)
        if torch.allclose(rms_norm(probe, weight, offset, eps).float(), wanted, rtol=close, atol=close):
            return candidate
    return None

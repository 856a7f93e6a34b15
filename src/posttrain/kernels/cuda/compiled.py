"""Functions that are chains of small operations: compiled into one kernel on a GPU, run as they stand on a CPU.

On a GPU each operation of a chain reads and writes its whole tensor, and the chain costs what they move; a compiled one moves
it once, backward included. On a CPU compiling brought nothing, and the chains there have functions of their own.

N: rows, D: width, V: vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels import reference_head


def fused(rows: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """The function, compiled at its first use on a GPU. Its first `rows` arguments are tensors of any number of rows."""

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        compiled: list[Callable[..., Tensor]] = []

        @functools.wraps(function)
        def run(*args: Any) -> Tensor:
            if not args[0].is_cuda:
                return function(*args)
            if not compiled:  # importing the compiler takes seconds, which a CPU need not pay
                compiled.append(torch.compile(function, dynamic=False))
            for tensor in args[:rows]:  # the other sizes are the model's: kernels made for them are faster
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return compiled[0](*args)

        return run

    return wrap


@fused(rows=1)
def rms_norm(x_ND: Tensor, weight_D: Tensor, offset: float, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) (weight + offset) [N, D], in float32, given back as x came."""
    wide = x_ND.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * root * (weight_D.float() + offset)).to(x_ND.dtype)


log_sum_exp = fused(rows=1)(reference_head.log_sum_exp)
logit_gradient = fused(rows=4)(reference_head.logit_gradient)


@fused(rows=2)
def probabilities(logits_NV: Tensor, total_N: Tensor) -> Tensor:
    """exp(z - log sum) [N, V] as the logits came."""
    return torch.exp(logits_NV.float() - total_N[:, None]).to(logits_NV.dtype)


@fused(rows=2)
def gated_silu(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    """silu(gate) up [N, D] (SwiGLU, Shazeer 2020), in float32, given back as it came."""
    return (functional.silu(gate_ND.float()) * up_ND.float()).to(gate_ND.dtype)


@fused(rows=2)
def gated_gelu(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    """gelu(gate) up [N, D], gelu by its tanh form (GeGLU, Shazeer 2020), in float32, given back as it came."""
    return (functional.gelu(gate_ND.float(), approximate="tanh") * up_ND.float()).to(gate_ND.dtype)


@fused(rows=3)
def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding by halves (Su et al. 2021): x cos + (-x_2, x_1) sin, in float32, given back as x came."""
    wide, half = x_THD.float(), x_THD.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos_TD[:, None].float() + turned * sin_TD[:, None].float()).to(x_THD.dtype)

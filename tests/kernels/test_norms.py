"""The frozen RMS norm against float64 and against the models' own modules."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from posttrain.kernels.cuda.compiled import rms_norm
from posttrain.models.patch_modules import RmsNorm, replace_norms

EPS = 1e-6


def reference(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * scale


def test_value_and_gradient_are_those_of_a_float64_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    scale, grad = torch.rand(24, generator=generator) + 0.5, torch.randn(5, 24, generator=generator)
    x = torch.randn(5, 24, generator=generator)
    x[4] *= 1e-4  # so small that eps counts
    ours = x.clone().requires_grad_()
    out = RmsNorm(nn.Parameter(scale), 0.0, EPS)(ours)
    out.backward(grad)
    theirs = x.double().requires_grad_()
    wanted = reference(theirs, scale.double())
    wanted.backward(grad.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_plain_norm_has_the_gradient_of_its_weight_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(*shape, generator=generator) for shape in ((5, 24), (24,), (5, 24)))
    ours, theirs = [[t.to(kind).clone().requires_grad_() for t in (x, weight)] for kind in (torch.float32, torch.float64)]
    rms_norm(*ours, 1.0, EPS).backward(grad)
    reference(theirs[0], theirs[1] + 1).backward(grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-6)


class Holder(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_norm_is_replaced_by_its_equal(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm = kind(32, eps=EPS)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    holder = Holder(norm.to(dtype))
    holder.requires_grad_(False)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = holder.norm(x)
    assert replace_norms(holder, EPS) == 1
    assert isinstance(holder.norm, RmsNorm)
    assert [name for name, _ in holder.named_parameters()] == ["norm.weight"]
    torch.testing.assert_close(holder.norm(x), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


class OddRMSNorm(LlamaRMSNorm):
    """A norm of its own kind: it must be left alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.5


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    holder = Holder(OddRMSNorm(16))
    assert replace_norms(holder, EPS) == 0
    assert replace_norms(Holder(LlamaRMSNorm(16, eps=1e-2)), EPS) == 0  # another eps
    assert replace_norms(Holder(LlamaRMSNorm(16)), None) == 0  # the config names none

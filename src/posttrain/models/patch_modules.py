"""Puts the operations of `kernels/` in the places of a model's own code: norms, gated MLPs and rotary embeddings.

They are recognised by what they compute: where a small probe gives another result, the model's own code stays. A GPU step of
Qwen3-0.6B spends a fifth of its time in these chains when each operation runs by itself.

T: packed tokens, H: heads, D: width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.kernels import gated, rms_norm, rotate

ROTARY = "apply_rotary_pos_emb"
# The modules of transformers whose rotation was replaced in this process, and their own rotation.
_replaced: dict[str, Callable[..., Any]] = {}


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with the model's own layers, under their own names."""

    def __init__(self, mlp: Any, *, gelu: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), gelu=self._gelu))
        return out


class RmsNorm(nn.Module):
    """y = x r w with w = weight + offset; `weight` is the model's own parameter. On a CPU it must be frozen."""

    def __init__(self, weight: nn.Parameter, offset: float, eps: float) -> None:
        super().__init__()
        self.weight, self.offset, self.eps = weight, offset, eps
        self._scale_D = weight.detach().float() + offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.offset, self._scale_D, self.eps)


def replace_norms(model: nn.Module, eps: float | None) -> int:
    """Replace a model's RMS norms; returns how many. One that computes something else is left as it is.

    On a CPU only the norms of a frozen model may be replaced.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if type(module).__name__.endswith("RMSNorm") and eps is not None and weight is not None:
            equal = _equal_norm(module, weight, eps)
            if equal is not None:
                _put(model, name, equal)
                replaced += 1
    return replaced


@torch.no_grad()
def _equal_norm(module: nn.Module, weight: nn.Parameter, eps: float) -> RmsNorm | None:
    """The same norm, scaled by its weight (Llama) or by one more than its weight (Gemma), or None where neither fits."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
    # Small inputs show an eps that differs.
    probe = torch.cat([probe, probe * eps**0.5])
    wanted = module(probe).float()
    close = 2e-2 if weight.dtype == torch.bfloat16 else 1e-5
    for offset in (0.0, 1.0):
        candidate = RmsNorm(weight, offset, eps)
        if torch.allclose(candidate(probe).float(), wanted, rtol=close, atol=close):
            return candidate
    return None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """A module in the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def replace_mlps(model: nn.Module) -> int:
    """Replace the gated MLPs of a model that lies on the CPU; returns how many."""
    replaced = 0
    for name, module in list(model.named_modules()):
        parts = {child for child, _ in module.named_children()}
        if (
            not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= parts
            or next(module.parameters(recurse=False), None) is not None
        ):
            continue
        gelu = _is_gelu(module)
        if gelu is not None:
            _put(model, name, GatedMlp(module, gelu=gelu))
            replaced += 1
    return replaced


def _is_gelu(mlp: Any) -> bool | None:
    """Whether a gated MLP has a gelu (by its tanh form) or a silu; None for anything else."""
    weight = mlp.gate_proj.weight
    probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    wanted = mlp(probe).float()
    close = 2e-2 if weight.dtype == torch.bfloat16 else 1e-4
    points = torch.linspace(-6, 6, 49)
    for gelu in (False, True):
        found = mlp.down_proj(gated(mlp.gate_proj(probe), mlp.up_proj(probe), gelu=gelu)).float()
        same = torch.allclose(mlp.act_fn(points), gated(points, torch.ones(49), gelu=gelu), atol=1e-6)
        if same and (found - wanted).norm() <= close * wanted.norm():
            return gelu
    return None


@torch.no_grad()
def replace_rotary(model: nn.Module) -> bool:
    """Let the attention layers of a model's architecture rotate by one kernel, on a GPU and on a CPU.

    Their rotation is a function of the module that defines them, so it is replaced there, once.
    """
    names = {type(module).__module__ for module in model.modules()}
    for name in names - _replaced.keys():
        own = vars(sys.modules[name]).get(ROTARY)
        if own is not None and _rotates_by_halves(own):
            setattr(sys.modules[name], ROTARY, _fast(own))
            _replaced[name] = own
    return bool(names & _replaced.keys())


@contextmanager
def own_rotary() -> Iterator[None]:
    """Inside, models rotate by their own functions, whatever was replaced in this process."""
    fast = {name: vars(sys.modules[name])[ROTARY] for name in _replaced}
    for name, own in _replaced.items():
        setattr(sys.modules[name], ROTARY, own)
    try:
        yield
    finally:
        for name, function in fast.items():
            setattr(sys.modules[name], ROTARY, function)


def _rotates_by_halves(own: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    try:
        wanted = own(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):  # another signature
        return False
    return all(torch.allclose(a, _rotated(x, cos, sin), atol=1e-5) for a, x in zip(wanted, (q, k), strict=True))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, T, D], cos and sin [1, T, D]."""
    return rotate(x[0], cos[0], sin[0])[None]


def _fast(own: Callable[..., Any]) -> Callable[..., Any]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        # Some models turn only a part of the width.
        if len(q) == 1 and unsqueeze_dim == 1 and cos.shape[-1] == q.shape[-1]:
            return _rotated(q, cos, sin), _rotated(k, cos, sin)
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply

"""Replaces a model's norms, gated MLPs and rotary embeddings by the operations of `kernels/`.

Each module is tested with a small probe: if the replacement gives another result, the model's own code stays. On a GPU a step
of Qwen3-0.6B spends a fifth of its time in these chains of operations when each runs as a separate kernel.

T: packed tokens, H: heads, D: width.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.kernels import gated, rms_norm, rotate

# The name of the rotation function in the architectures of transformers.
ROTARY = "apply_rotary_pos_emb"


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with the model's own layers, under their original names."""

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
    """Replace a model's RMS norms and return their number. A norm that computes something else is left unchanged.

    On a CPU call it for a frozen model only.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if type(module).__name__.endswith("RMSNorm") and eps is not None and weight is not None:
            equal = _equal_norm(module, weight, eps)
            if equal is not None:
                _replace(model, name, equal)
                replaced += 1
    return replaced


@torch.no_grad()
def _equal_norm(module: nn.Module, weight: nn.Parameter, eps: float) -> RmsNorm | None:
    """An equal `RmsNorm`, scaled by the weight (Llama) or by the weight plus one (Gemma); None if neither is equal."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
    # Small inputs detect a different eps.
    probe = torch.cat([probe, probe * eps**0.5])
    wanted = module(probe).float()
    close = 2e-2 if weight.dtype == torch.bfloat16 else 1e-5
    for offset in (0.0, 1.0):
        candidate = RmsNorm(weight, offset, eps)
        if torch.allclose(candidate(probe).float(), wanted, rtol=close, atol=close):
            return candidate
    return None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def replace_mlps(model: nn.Module) -> int:
    """Replace the gated MLPs of a model in CPU memory and return their number."""
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
            _replace(model, name, GatedMlp(module, gelu=gelu))
            replaced += 1
    return replaced


def _is_gelu(mlp: Any) -> bool | None:
    """Whether a gated MLP uses gelu (tanh form; True) or silu (False); None for anything else."""
    weight = mlp.gate_proj.weight
    probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    wanted = mlp(probe).float()
    close = 2e-2 if weight.dtype == torch.bfloat16 else 1e-4
    points = torch.linspace(-6, 6, 49)
    for gelu in (False, True):
        output = mlp.down_proj(gated(mlp.gate_proj(probe), mlp.up_proj(probe), gelu=gelu)).float()
        same = torch.allclose(mlp.act_fn(points), gated(points, torch.ones(49), gelu=gelu), atol=1e-6)
        if same and (output - wanted).norm() <= close * wanted.norm():
            return gelu
    return None


@torch.no_grad()
def replace_rotary(model: nn.Module) -> bool:
    """Make the attention layers of this model rotate with one kernel. Other models in the process are not affected.

    The rotation is a global of the Python module that defines a layer's class. The layer gets copies of the methods that call
    it, in which that global is another function. Returns whether any layer was changed.
    """
    methods = {kind: _rotating(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        for name, method in methods[type(module)]:
            if name not in vars(module):
                patched = _with_global(method, ROTARY, _kernel_rotation(method.__globals__[ROTARY]))
                setattr(module, name, types.MethodType(patched, module))
    return any(methods.values())


def _rotating(kind: type[nn.Module]) -> list[tuple[str, types.FunctionType]]:
    """Methods of a class that call their module's rotation, if it rotates by halves."""
    methods = [(name, getattr(kind, name)) for name in dir(kind)]
    calling = [(n, m) for n, m in methods if isinstance(m, types.FunctionType) and ROTARY in m.__code__.co_names]
    return [(n, m) for n, m in calling if ROTARY in m.__globals__ and _rotates_by_halves(m.__globals__[ROTARY])]


def _with_global(function: types.FunctionType, name: str, value: Callable[..., Any]) -> types.FunctionType:
    """A copy of a function with one global replaced."""
    changed = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, changed, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _rotates_by_halves(rotation: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    try:
        wanted = rotation(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):  # another signature
        return False
    return all(torch.allclose(a, _rotated(x, cos, sin), atol=1e-5) for a, x in zip(wanted, (q, k), strict=True))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, H, T, D], cos and sin [1, T, D]."""
    return rotate(x[0], cos[0], sin[0])[None]


def _kernel_rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    """A rotation that uses the kernel where it applies, and otherwise the model's original function."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        # Some models rotate only a part of the width.
        if len(q) == 1 and unsqueeze_dim == 1 and cos.shape[-1] == q.shape[-1]:
            return _rotated(q, cos, sin), _rotated(k, cos, sin)
        return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply

"""Puts compiled chains in the places of a model's own code: those of `kernels/cuda/compiled.py` on a GPU, and those of
`kernels/cpu/bindings.py` on a CPU, in bfloat16.

Gated MLPs and rotary embeddings are recognised by what they compute: where a small probe gives another result, the model's own
code stays. A GPU step of Qwen3-0.6B spends a fifth of its time in these chains when each operation runs by itself.

T: packed tokens, H: heads, D: head width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cuda.compiled import gated_gelu, gated_silu, rotate

ROTARY = "apply_rotary_pos_emb"
# The modules of transformers whose rotation was replaced in this process, and their own rotation.
_replaced: dict[str, Callable[..., Any]] = {}


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with the model's own layers, under their own names."""

    def __init__(self, mlp: Any, gated: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
        self._gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(self._gate(gate, up))
        return out

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.is_cuda:
            return self._gated(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])).view_as(gate)
        if bindings.able(gate):
            return _Gate.apply(gate, up, self._gated is gated_gelu)  # type: ignore[no-any-return, no-untyped-call]
        own: Tensor = self.act_fn(gate) * up
        return own


class _Gate(torch.autograd.Function):
    """act(gate) up on a CPU; keeps both factors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return bindings.gated(gate, up, gelu=gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        return *bindings.gated_backward(gate, up, grads[0], gelu=ctx.gelu), None


class _Rotation(torch.autograd.Function):
    """x [H, T, D] turned on a CPU; keeps the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return bindings.rotate(x, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return bindings.rotate_backward(grads[0], *ctx.saved_tensors), None, None


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
        gated = _gate_of(module)
        if gated is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, GatedMlp(module, gated))
            replaced += 1
    return replaced


def _gate_of(mlp: Any) -> Callable[..., Tensor] | None:
    weight = mlp.gate_proj.weight
    probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    wanted = mlp(probe).float()
    close = 2e-2 if weight.dtype == torch.bfloat16 else 1e-4
    for gated in (gated_silu, gated_gelu):
        found = mlp.down_proj(gated(mlp.gate_proj(probe), mlp.up_proj(probe))).float()
        if (found - wanted).norm() <= close * wanted.norm():
            return gated
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
    return rotate(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None]


def _fast(own: Callable[..., Any]) -> Callable[..., Any]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        # Some models turn only a part of the width.
        if len(q) == 1 and unsqueeze_dim == 1 and cos.shape[-1] == q.shape[-1]:
            if q.is_cuda:
                return _rotated(q, cos, sin), _rotated(k, cos, sin)
            if bindings.able(q) and cos.dtype == q.dtype:
                angles = cos[0].contiguous(), sin[0].contiguous()
                return tuple(_Rotation.apply(x[0], *angles)[None] for x in (q, k))  # type: ignore[no-untyped-call]
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply

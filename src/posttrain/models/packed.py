"""Weights in the order that the processor's products read them, for decoding on a CPU.

A plain product brings its weight into that order at each call. For thousands of tokens that is nothing; for the few of a
decoding step it is a third of the time (docs/log.md). What is computed is the same to the bit. The copy takes as much memory as
the weights, so it lives as long as the engine that decodes with it. Where a server has one or two tokens it needs none: their
products are compiled ones (`models/compiled.py`).

T: tokens.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.models import compiled

# From so many tokens on the plain product is as fast.
MOST_TOKENS = 512


class PackedProducts:
    """Products with weights that stay as they are; each is packed at its first use."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, quick: bool = False) -> None:
        """`quick` lets few rows be computed as they are quickest, with last bits that differ from those of many."""
        self.quick = quick
        self._packs = packs(dtype, device)
        # The weight itself is kept too: no other can then have its identity.
        self._packed: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., T, inputs], weight [outputs, inputs] -> [..., T, outputs]. A weight of another type is narrowed each time."""
        if not self._packs or x.shape[-2] > MOST_TOKENS or weight.dtype != x.dtype:
            return functional.linear(x, weight.to(x.dtype), bias)
        if self.quick and x.numel() <= compiled.FEW_ROWS * x.shape[-1] and weight.is_contiguous() and compiled.able(x):
            return compiled.multiply(x, weight, bias)
        kept = self._packed.get(id(weight))
        if kept is None or kept[1] != weight._version:
            kept = weight, weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self._packed[id(weight)] = kept
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, kept[2], bias, "none", [], "")
        return y


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether engines keep packed copies of weights here."""
    return device.type == "cpu" and dtype == torch.bfloat16 and _packing_works()


@functools.cache
def _packing_works() -> bool:
    """Whether this build of torch has the operations, and this processor products in bfloat16."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x, weight = torch.ones(2, 32, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    except (AttributeError, RuntimeError):
        return False

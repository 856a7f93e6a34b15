"""Adapters chosen per row of one batch without gradients: for decoding, where rows of many policies stand side by side.

    y_t = W x_t + s_a B_a A_a x_t,   a: the adapter of token t

The base's product runs once over all tokens. The tokens of each of n adapters are gathered into a table [n, M], and the
low-rank products of all adapters are two batched ones. One adapter for all tokens is computed just as in training. Copies in
the type of the products are kept by the engine.

T: tokens, M: most tokens of one adapter, R: rank (of the widest adapter, others are filled with zeros).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from posttrain.models.packed import PackedProducts

if TYPE_CHECKING:
    from posttrain.models.lora import LoraAdapter


class Stack(NamedTuple):
    """One layer's A [n, R, inputs] and B [n, outputs, R] of all adapters."""

    a: Tensor
    b: Tensor


class NarrowAdapters:
    """Copies of some adapters' matrices in one dtype; made again where an adapter was trained in the meantime.

    `product` is what the base's own products are computed by.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.product = dtype, PackedProducts(dtype, device)
        self.adapters: tuple[LoraAdapter, ...] = ()
        self._versions: list[int] = []
        self._stacks: dict[str, Stack | None] = {}

    def hold(self, adapters: "Sequence[LoraAdapter]") -> None:
        """These are needed now. More may be kept, so that rows which come and go do not make copies each time."""
        needed = list(dict.fromkeys(adapters))
        versions = [sum(p._version for pair in a.weights.values() for p in pair) for a in self.adapters]
        enough = all(a in self.adapters for a in needed) and len(self.adapters) <= max(2, 2 * len(needed))
        if not enough or versions != self._versions:
            self.adapters, self._stacks = tuple(needed), {}
            self._versions = [sum(p._version for pair in a.weights.values() for p in pair) for a in needed]

    def stack(self, layer: str) -> Stack | None:
        """A layer's matrices; None where no adapter has any."""
        if layer not in self._stacks:
            self._stacks[layer] = self._make(layer)
        return self._stacks[layer]

    def _make(self, layer: str) -> Stack | None:
        pairs = [adapter.weights.get(layer) for adapter in self.adapters]
        there = [pair for pair in pairs if pair is not None]
        if not there:
            return None
        rank, (a, b) = max(len(a) for a, _ in there), there[0]
        a_nRI = a.new_zeros(len(pairs), rank, a.shape[1], dtype=self.dtype)
        b_nOR = a.new_zeros(len(pairs), b.shape[0], rank, dtype=self.dtype)
        for n, pair in enumerate(pairs):
            if pair is not None:
                a_nRI[n, : len(pair[0])], b_nOR[n, :, : len(pair[0])] = pair[0].detach(), pair[1].detach()
        return Stack(a_nRI, b_nOR)


class TokenAdapters:
    """Which adapter each token of one batch has: runs of (tokens, adapter or None for the base), in order."""

    def __init__(self, runs: "Sequence[tuple[int, LoraAdapter | None]]", kept: NarrowAdapters, device: torch.device) -> None:
        self.runs, self._kept = runs, kept
        kept.hold([adapter for _, adapter in runs if adapter is not None])
        tokens: dict[LoraAdapter, list[int]] = {adapter: [] for adapter in kept.adapters}
        start = 0
        for count, adapter in runs:
            if adapter is not None:
                tokens[adapter] += range(start, start + count)
            start += count
        self.total = start
        self._only = next((n for n, own in enumerate(tokens.values()) if len(own) == start), None)
        most = max(map(len, tokens.values()), default=0)
        self._most = most
        if most and self._only is None:
            # Spare entries of the table take the first token and add nothing to it.
            table = [own + [0] * (most - len(own)) for own in tokens.values()]
            scales = [[adapter.settings.scale] * len(own) + [0.0] * (most - len(own)) for adapter, own in tokens.items()]
            self._table_nM = torch.tensor(table, device=device)
            self._scale_nM1 = torch.tensor(scales, dtype=kept.dtype, device=device)[..., None]

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        y = self._kept.product(x, weight, bias)
        stack = self._kept.stack(layer) if self._most else None
        if stack is None:
            return y
        if self._only is not None:
            scale = self._kept.adapters[self._only].settings.scale
            y[0].addmm_(x[0] @ stack.a[self._only].T, stack.b[self._only].T, alpha=scale)
            return y
        projected_nMR = torch.bmm(x[0, self._table_nM], stack.a.transpose(1, 2)) * self._scale_nM1
        added_nMO = torch.bmm(projected_nMR, stack.b.transpose(1, 2))
        y[0].index_add_(0, self._table_nM.flatten(), added_nMO.flatten(0, 1))
        return y

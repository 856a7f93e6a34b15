"""Adapters chosen per token, without gradients: for decoding batches whose rows belong to different policies.

    y_t = W x_t + s_a B_a A_a x_t,   a: the adapter of token t

The engine keeps copies of the matrices in the dtype of its products (`models/adapter_slots.py`); `kernels/` multiplies with
them. Where shapes must not depend on the batch (`generate/graph_decoding.py`), one product multiplies all tokens with the
concatenated matrices of all adapters, and a mask keeps each token's own projection:

    y_t = W x_t + [s_1 B_1 .. s_n B_n] p_t,   p_t: A_a x_t in the columns of adapter a, 0 elsewhere

T: tokens, R: rank of the widest adapter (others are padded with zeros), C = n R.
"""

import functools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from posttrain.kernels import TokenProducts, TokenRuns
from posttrain.models.adapter import LoraAdapter
from posttrain.models.adapter_slots import NarrowAdapters


class TokenAdapters:
    """The adapter of each token of one batch, as runs of (number of tokens, adapter or None for the base), in order."""

    def __init__(self, runs: Sequence[tuple[int, LoraAdapter | None]], slots: NarrowAdapters, device: torch.device) -> None:
        self.runs, self.slots = runs, slots
        slots.hold([adapter for _, adapter in runs if adapter is not None])

    @functools.cached_property
    def _products(self) -> TokenProducts:
        slot_of = {adapter: slot for slot, adapter in enumerate(self.slots.slots) if adapter is not None}
        runs = [(count, -1 if adapter is None else slot_of[adapter]) for count, adapter in self.runs]
        unstacked = frozenset(slot_of[adapter] for adapter in self.slots.unstacked if adapter in slot_of)
        return self.slots.layout.tokens(TokenRuns(runs, len(self.slots.slots), unstacked), self.slots)

    @property
    def form(self) -> Hashable | None:
        """The key of a recorded step, apart from `numbers`; None for a step that cannot be recorded."""
        return self._products.form

    @property
    def numbers(self) -> list[Tensor]:
        """The tensors that assign an adapter to each token."""
        return self._products.numbers

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        stack = self.slots.stack(layer)
        if stack is None:
            return self.slots.product(x, weight, bias)
        y = self._products.apply(layer, x, weight, bias, stack)
        if self.slots.unstacked and stack.wide is not None:
            self._add_unstacked(layer, x[0], y[0])
        return y

    def _add_unstacked(self, layer: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """Add the products of adapters with non-finite weights to their own tokens only."""
        start = 0
        for count, adapter in self.runs:
            rows, start = slice(start, start + count), start + count
            pair = adapter.weights.get(layer) if adapter in self.slots.unstacked and adapter is not None else None
            if pair is not None and adapter is not None:
                a, b = (matrix.detach().to(x_TI.dtype) for matrix in pair)
                y_TO[rows].addmm_(x_TI[rows] @ a.T, b.T, alpha=adapter.settings.scale)


class SlotAdapters:
    """The slot of each token's adapter as a tensor `slot_T`, -1 for the base; None if all tokens use the base.

    `embedded` [1, T, D]: the embedded tokens, if an adapter has trained rows. All slots must be finite
    (`NarrowAdapters.finite`).
    """

    def __init__(self, slots: NarrowAdapters, slot_T: Tensor | None, embedded: Tensor | None) -> None:
        self._slots, self._adapted, self.embedded = slots, slot_T is not None, embedded
        if slot_T is not None:
            slot_C = torch.arange(len(slots.slots) * slots.rank, device=slot_T.device) // max(slots.rank, 1)
            self._other_TC = slot_T[:, None] != slot_C

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        y = self._slots.product(x, weight, bias)
        stack = self._slots.stack(layer) if self._adapted else None
        if stack is None:
            return y
        projected_TC = x[0] @ stack.a.flatten(0, 1).T
        # Filled, not multiplied with zeros: another adapter's projection of a token may overflow.
        projected_TC.masked_fill_(self._other_TC, 0.0)
        y[0].addmm_(projected_TC, stack.b.transpose(1, 2).flatten(0, 1))
        return y

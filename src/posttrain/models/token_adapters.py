"""Adapters chosen per row of one batch without gradients: for decoding, where rows of many policies stand side by side.

    y_t = W x_t + s_a B_a A_a x_t,   a: the adapter of token t

Copies in the type of the products are kept by the engine (`models/adapter_slots.py`); `kernels/` multiplies with them. Where
shapes must not depend on who is there (`generate/graph_decoding.py`), all tokens are multiplied with the matrices of all
adapters side by side, and of the projections each token keeps its own:

    y_t = W x_t + [s_1 B_1 .. s_n B_n] p_t,   p_t: A_a x_t at the place of adapter a, 0 elsewhere

T: tokens, R: rank (of the widest adapter, others are filled with zeros), C = n R.
"""

import functools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from posttrain.kernels import TokenProducts, TokenRuns
from posttrain.models.adapter import LoraAdapter
from posttrain.models.adapter_slots import NarrowAdapters


class TokenAdapters:
    """Which adapter each token of one batch has: runs of (tokens, adapter or None for the base), in order."""

    def __init__(self, runs: Sequence[tuple[int, LoraAdapter | None]], slots: NarrowAdapters, device: torch.device) -> None:
        self.runs, self.slots = runs, slots
        slots.hold([adapter for _, adapter in runs if adapter is not None])

    @functools.cached_property
    def _products(self) -> TokenProducts:
        slot_of = {adapter: slot for slot, adapter in enumerate(self.slots.slots) if adapter is not None}
        runs = [(count, -1 if adapter is None else slot_of[adapter]) for count, adapter in self.runs]
        apart = frozenset(slot_of[adapter] for adapter in self.slots.apart if adapter in slot_of)
        return self.slots.layout.tokens(TokenRuns(runs, len(self.slots.slots), apart), self.slots)

    @property
    def form(self) -> Hashable | None:
        """What a recorded step depends on beside `numbers`; None for one that cannot be recorded."""
        return self._products.form

    @property
    def numbers(self) -> list[Tensor]:
        """What says which adapter each token has."""
        return self._products.numbers

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        stack = self.slots.stack(layer)
        if stack is None:
            return self.slots.product(x, weight, bias)
        y = self._products.apply(layer, x, weight, bias, stack)
        if self.slots.apart and stack.wide is not None:
            self._add_apart(layer, x[0], y[0])
        return y

    def _add_apart(self, layer: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """What adapters that are not finite add, to their own tokens alone."""
        start = 0
        for count, adapter in self.runs:
            rows, start = slice(start, start + count), start + count
            pair = adapter.weights.get(layer) if adapter in self.slots.apart and adapter is not None else None
            if pair is not None and adapter is not None:
                a, b = (matrix.detach().to(x_TI.dtype) for matrix in pair)
                y_TO[rows].addmm_(x_TI[rows] @ a.T, b.T, alpha=adapter.settings.scale)


class SlotAdapters:
    """Which slot each token's adapter has, -1 for the base, in a tensor; None where all tokens are the base's.

    `embedded` [1, T, D] is what the tokens are embedded as, where an adapter has trained rows. All slots must be finite
    (`NarrowAdapters.finite`).
    """

    def __init__(self, kept: NarrowAdapters, slot_T: Tensor | None, embedded: Tensor | None) -> None:
        self._kept, self._adapted, self.embedded = kept, slot_T is not None, embedded
        if slot_T is not None:
            slot_C = torch.arange(len(kept.slots) * kept.rank, device=slot_T.device) // max(kept.rank, 1)
            self._other_TC = slot_T[:, None] != slot_C

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        y = self._kept.product(x, weight, bias)
        stack = self._kept.stack(layer) if self._adapted else None
        if stack is None:
            return y
        projected_TC = x[0] @ stack.a.flatten(0, 1).T
        # Not by multiplying with zeros: what another adapter makes of a token may overflow.
        projected_TC.masked_fill_(self._other_TC, 0.0)
        y[0].addmm_(projected_TC, stack.b.transpose(1, 2).flatten(0, 1))
        return y

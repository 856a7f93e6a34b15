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

# Slots kept for each adapter that is needed.
SPARE_SLOTS = 2


class Stack(NamedTuple):
    """One layer's A [n, R, inputs] and B [n, outputs, R] of all slots."""

    a: Tensor
    b: Tensor


class NarrowAdapters:
    """Copies of some adapters' matrices in one dtype, a slot each; made again where an adapter was trained in the meantime.

    `product` is what the base's own products are computed by.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.product = dtype, PackedProducts(dtype, device)
        self.slots: list[LoraAdapter | None] = []
        self._versions: list[int] = []
        self._stacks: dict[str, Stack] = {}
        self._rank = 0

    def hold(self, adapters: "Sequence[LoraAdapter]") -> None:
        """These are needed now. Others stay until their slots are, so that rows that come and go make no copies each time."""
        needed = list(dict.fromkeys(adapters))
        missing = [a for a in needed if a not in self.slots]
        room = len(self.slots)
        rank = max((len(a) for adapter in missing for a, _ in adapter.weights.values()), default=0)
        if len(needed) > room:  # where adapters come one by one, not every one makes all others be written again
            room = max(len(needed), room + room // 4)
        elif needed and room > SPARE_SLOTS * len(needed):
            room = len(needed)
        if room != len(self.slots) or rank > self._rank:
            self._open(room, max(rank, self._rank))
            missing = needed
        free = [slot for slot, adapter in enumerate(self.slots) if adapter not in needed]
        for slot, adapter in zip(free, missing, strict=False):
            self._write(slot, adapter)
        for slot, held in enumerate(self.slots):
            if held is not None and held in needed and _version(held) != self._versions[slot]:
                self._write(slot, held)

    def _open(self, slots: int, rank: int) -> None:
        """Empty slots for adapters of at most this rank."""
        self.slots, self._versions, self._stacks, self._rank = [None] * slots, [0] * slots, {}, rank

    def stack(self, layer: str) -> Stack | None:
        """A layer's matrices; None where no adapter has any."""
        return self._stacks.get(layer)

    def _write(self, slot: int, adapter: "LoraAdapter") -> None:
        self.slots[slot], self._versions[slot] = adapter, _version(adapter)
        for layer, (a, b) in adapter.weights.items():
            if layer not in self._stacks:
                self._stacks[layer] = Stack(
                    a.new_zeros(len(self.slots), self._rank, a.shape[1], dtype=self.dtype),
                    b.new_zeros(len(self.slots), b.shape[0], self._rank, dtype=self.dtype),
                )
        for layer, stack in self._stacks.items():
            pair = adapter.weights.get(layer)
            rank = 0 if pair is None else len(pair[0])
            if pair is not None:
                stack.a[slot, :rank], stack.b[slot, :, :rank] = pair[0].detach(), pair[1].detach()
            stack.a[slot, rank:] = 0  # what the adapter before it had beyond


def _version(adapter: "LoraAdapter") -> int:
    return sum(p._version for pair in adapter.weights.values() for p in pair)


class TokenAdapters:
    """Which adapter each token of one batch has: runs of (tokens, adapter or None for the base), in order."""

    def __init__(self, runs: "Sequence[tuple[int, LoraAdapter | None]]", kept: NarrowAdapters, device: torch.device) -> None:
        self.runs, self._kept = runs, kept
        kept.hold([adapter for _, adapter in runs if adapter is not None])
        slot_of = {adapter: slot for slot, adapter in enumerate(kept.slots) if adapter is not None}
        tokens: list[list[int]] = [[] for _ in kept.slots]
        start = 0
        for count, adapter in runs:
            if adapter is not None:
                tokens[slot_of[adapter]] += range(start, start + count)
            start += count
        self.total = start
        self._only = next((slot for slot, own in enumerate(tokens) if len(own) == start), None)
        self._most = most = max(map(len, tokens), default=0)
        # What the layers before found for the same input, which several of them have.
        self._input: Tensor | None = None
        self._gathered: Tensor | None = None
        if most and self._only is None:
            # Spare entries of the table take the first token and add nothing to it.
            table = [own + [0] * (most - len(own)) for own in tokens]
            scales = [
                [adapter.settings.scale if adapter else 0.0] * len(own) + [0.0] * (most - len(own))
                for adapter, own in zip(kept.slots, tokens, strict=True)
            ]
            self._table_nM = torch.tensor(table, device=device)
            self._scale_nM1 = torch.tensor(scales, dtype=kept.dtype, device=device)[..., None]

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        y = self._kept.product(x, weight, bias)
        stack = self._kept.stack(layer) if self._most else None
        if stack is None:
            return y
        if self._only is not None:
            adapter = self._kept.slots[self._only]
            assert adapter is not None
            y[0].addmm_(x[0] @ stack.a[self._only].T, stack.b[self._only].T, alpha=adapter.settings.scale)
            return y
        if x is not self._input or self._gathered is None:
            self._input, self._gathered = x, x[0, self._table_nM]
        projected_nMR = torch.bmm(self._gathered, stack.a.transpose(1, 2)) * self._scale_nM1
        added_nMO = torch.bmm(projected_nMR, stack.b.transpose(1, 2))
        y[0].index_add_(0, self._table_nM.flatten(), added_nMO.flatten(0, 1))
        return y

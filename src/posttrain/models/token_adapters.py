"""Adapters chosen per row of one batch without gradients: for decoding, where rows of many policies stand side by side.

    y_t = W x_t + s_a B_a A_a x_t,   a: the adapter of token t

The base's product runs once over all tokens. A long run of tokens of one adapter, of a prompt for instance, is computed just
as in training. The other tokens of each of n adapters are gathered into a table [n, M], and the low-rank products of all
adapters are two batched ones; layers that read the same input share the first. Copies in the type of the products are kept by
the engine.

Where the processor has matrix tiles (`kernels/cpu/linear.py`), the adapters of all slots lie side by side, and the product of
the base adds to each token what its slot's adapter adds, just as in training and to the same bit.

Where shapes must not depend on who is there (`kernels/cuda/graphs.py`), all tokens are multiplied with the matrices of all
adapters side by side, and of the projections each token keeps its own:

    y_t = W x_t + [s_1 B_1 .. s_n B_n] p_t,   p_t: A_a x_t at the place of adapter a, 0 elsewhere

T: tokens, M: most tokens of one adapter in the table, R: rank (of the widest adapter, others are filled with zeros), C = n R.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.build import library
from posttrain.models.adapter_slots import NarrowAdapters, Stack

if TYPE_CHECKING:
    from posttrain.models.lora import LoraAdapter

# A run of so many tokens needs no table.
LONG = 32
# Tokens of the largest decoding step.
DECODED = 256


class TokenAdapters:
    """Which adapter each token of one batch has: runs of (tokens, adapter or None for the base), in order."""

    def __init__(self, runs: "Sequence[tuple[int, LoraAdapter | None]]", kept: NarrowAdapters, device: torch.device) -> None:
        self.runs, self.kept, self._device = runs, kept, device
        kept.hold([adapter for _, adapter in runs if adapter is not None])
        self._slot_of = {adapter: slot for slot, adapter in enumerate(kept.slots) if adapter is not None}
        if kept.tiles:
            self._tile()

    def _tile(self) -> None:
        """The slot of each token, and the tokens in the order of their slots: few adapters then meet in a tile."""
        slots = [-1 if adapter is None or adapter in self.kept.apart else self._slot_of[adapter] for _, adapter in self.runs]
        counts = torch.tensor([count for count, _ in self.runs])
        self._slot_T = torch.tensor(slots, dtype=torch.int32).repeat_interleave(counts)
        self._order = None
        if len(set(slots)) > 1 or len(self._slot_T) <= DECODED:  # few tokens have an order anyway, so that steps have one form
            order = self._slot_T.argsort(stable=True).int()
            self._order = functional.pad(order, (0, -len(order) % bindings.LANES), value=-1)

    @property
    def form(self) -> Hashable | None:
        """What a recorded step depends on beside `numbers` (`kernels/cpu/replay.py`); None for one that cannot be recorded."""
        if self.kept.tiles:
            return None if self._order is None else self.kept.form
        return self._grouped.form

    @property
    def numbers(self) -> list[Tensor]:
        """What says which adapter each token has."""
        if self.kept.tiles:
            return [self._slot_T, *([] if self._order is None else [self._order])]
        return self._grouped.numbers

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        stack = self.kept.stack(layer)
        if stack is None:
            return self.kept.product(x, weight, bias)
        if stack.wide is None:
            return self._grouped.apply(layer, x, weight, bias, stack)
        slots = bindings.Slots(*stack.wide, self.kept.rank, self._slot_T, self._order)
        y = bindings.products(x[0], weight.to(x.dtype).contiguous(), bias, slots)[0]
        if self.kept.apart:
            self._add_apart(layer, x[0], y)
        return y[None]

    def _add_apart(self, layer: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """What adapters that are not finite add, to their own tokens alone."""
        start = 0
        for count, adapter in self.runs:
            rows, start = slice(start, start + count), start + count
            pair = adapter.weights.get(layer) if adapter in self.kept.apart and adapter is not None else None
            if pair is not None and adapter is not None:
                a, b = (matrix.detach().to(x_TI.dtype) for matrix in pair)
                y_TO[rows].addmm_(x_TI[rows] @ a.T, b.T, alpha=adapter.settings.scale)

    @functools.cached_property
    def _grouped(self) -> "GroupedTokens":
        return GroupedTokens(self.runs, self.kept, self._slot_of, self._device)


class GroupedTokens:
    """The same where slots do not lie side by side: tokens of few gathered by slot, and long runs one by one."""

    def __init__(
        self, runs: "Sequence[tuple[int, LoraAdapter | None]]", kept: NarrowAdapters, slot_of: "dict[LoraAdapter, int]",
        device: torch.device,
    ) -> None:  # fmt: skip
        self._kept = kept
        tokens: list[list[int]] = [[] for _ in kept.slots]
        self._total = total = sum(count for count, _ in runs)
        self._long: list[tuple[slice, int]] = []
        self._compiled = device.type == "cpu" and kept.dtype == torch.bfloat16 and library() is not None
        quick = self._compiled and kept.product.quick
        start = 0
        for count, adapter in runs:
            rows = slice(start, start + count)
            if adapter is not None and (count >= LONG or (count == total and not quick)):
                self._long.append((rows, slot_of[adapter]))
            elif adapter is not None:
                tokens[slot_of[adapter]] += range(rows.start, rows.stop)
            start += count
        self._most = max(map(len, tokens), default=0)
        # What the layers before found for the same input, which several of them have.
        self._input: Tensor | None = None
        if self._most and self._compiled:
            self._groups = bindings.Groups(tokens)
        elif self._most:
            self._tabulate(tokens, device)

    @property
    def form(self) -> Hashable | None:
        """As of TokenAdapters. The tensors of slots that do not lie side by side are part of it."""
        if self._long or self._total > bindings.FEW_ROWS or not (self._compiled and self._kept.product.quick):
            return None
        return ("grouped", self._kept.address, len(self._groups.order)) if self._most else "grouped"

    @property
    def numbers(self) -> list[Tensor]:
        """As of TokenAdapters."""
        return [self._groups.order, self._groups.start] if self._most else []

    def _tabulate(self, tokens: list[list[int]], device: torch.device) -> None:
        """The table of the tokens of each slot, and the way back: for each token its place in the table."""
        most = self._most
        self._table_nM = torch.tensor([own + [0] * (most - len(own)) for own in tokens], device=device)
        places = {token: slot * most + place for slot, own in enumerate(tokens) for place, token in enumerate(own)}
        # Tokens between them that stand in no table find zeros behind it.
        self._covered = slice(min(places), max(places) + 1)
        self._place_C = torch.tensor(
            [places.get(token, len(tokens) * most) for token in range(self._covered.start, self._covered.stop)], device=device
        )
        self._added: dict[int, Tensor] = {}

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        y = self._kept.product(x, weight, bias)
        for rows, slot in self._long:
            y[0, rows].addmm_(x[0, rows] @ stack.a[slot].T, stack.b[slot].T)
        if self._most:
            projected, first = self._project(layer, x, stack)
            if self._compiled:
                bindings.expand(projected, stack.b.transpose(1, 2), self._groups, first, y[0])
            else:
                self._add(projected[..., first : first + stack.a.shape[1]], stack, y)
        return y

    def _add(self, projected_nMR: Tensor, stack: Stack, y: Tensor) -> None:
        """B p of the table added to the tokens that stand in it."""
        slots, outputs = stack.b.shape[:2]
        if outputs not in self._added:
            self._added[outputs] = y.new_zeros(slots * self._most + 1, outputs)
        added = self._added[outputs]
        torch.bmm(projected_nMR, stack.b.transpose(1, 2), out=added[:-1].view(slots, self._most, outputs))
        y[0, self._covered].add_(added[self._place_C])

    def _project(self, layer: str, x: Tensor, stack: Stack) -> tuple[Tensor, int]:
        """Projections of the grouped tokens, and the column from which they are this layer's; the first layer that reads an
        input does it for all that do."""
        if x is not self._input:
            self._input, self._first = x, layer
            self._gathered = x[0].contiguous() if self._compiled else x[0, self._table_nM]
            self._names, wide = self._kept.readers(layer)
            self._projected = self._times(wide)
        if layer in self._names:
            return self._projected, self._names.index(layer) * stack.a.shape[1]
        if not x.is_cuda:  # there all slots side by side must be one matrix
            self._kept.join(self._first, layer)
        return self._times(stack.a), 0

    def _times(self, a: Tensor) -> Tensor:
        """A x: compiled [T, C], else of the table [n, M, C]."""
        if self._compiled:
            return bindings.project(self._gathered, a.contiguous(), self._groups)
        return torch.bmm(self._gathered, a.transpose(1, 2))


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

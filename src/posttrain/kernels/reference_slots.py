"""Products of one batch with the adapters of several slots, in plain PyTorch.

    y_t = W x_t + s_a B_a A_a x_t,   a: the adapter of token t

The base's product runs once over all tokens. A long run of tokens of one adapter, such as a prompt, is computed as in
training. The other tokens are gathered by adapter into a table [n, M], and two batched products compute the low-rank products
of all n adapters. Layers that read the same input share the first one.

T: tokens, M: most tokens of one adapter in the table, R: rank, n: slots, C: columns.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from posttrain.kernels.interfaces import AdapterSlots, SlotLayout, Stack, TokenProducts, TokenRuns

# A run of at least this number of tokens is computed without a table.
LONG = 32


class Grouping(Protocol):
    """Low-rank products of tokens that are gathered by slot."""

    numbers: list[Tensor]

    def gather(self, x: Tensor) -> Tensor:
        """The grouped tokens of x [1, T, inputs], in the layout of `project`."""

    def project(self, gathered: Tensor, a: Tensor) -> Tensor:
        """A x of every grouped token with its slot's A [n, C, inputs]."""

    def add(self, projected: Tensor, first: int, stack: Stack, y: Tensor) -> None:
        """Add B p to y [1, T, outputs] for every grouped token, with the columns of p from `first`."""


class TableGrouping:
    """The tokens of each slot in a table [n, M], padded with token 0, and batched products over it."""

    def __init__(self, tokens: Sequence[Sequence[int]], device: torch.device) -> None:
        self.numbers: list[Tensor] = []
        self._most = most = max(map(len, tokens))
        self._table_nM = torch.tensor([[*group, *[0] * (most - len(group))] for group in tokens], device=device)
        places = {token: slot * most + place for slot, group in enumerate(tokens) for place, token in enumerate(group)}
        # Other tokens between the first and the last one get the row of zeros after the table.
        self._covered = slice(min(places), max(places) + 1)
        self._place_C = torch.tensor(
            [places.get(token, len(tokens) * most) for token in range(self._covered.start, self._covered.stop)], device=device
        )
        self._added: dict[int, Tensor] = {}

    def gather(self, x: Tensor) -> Tensor:
        """[n, M, inputs]."""
        return x[0, self._table_nM]

    def project(self, gathered: Tensor, a: Tensor) -> Tensor:
        """[n, M, C]."""
        return torch.bmm(gathered, a.transpose(1, 2))

    def add(self, projected: Tensor, first: int, stack: Stack, y: Tensor) -> None:
        """Add B p of the table to its tokens."""
        slots, outputs, rank = stack.b.shape
        if outputs not in self._added:
            self._added[outputs] = y.new_zeros(slots * self._most + 1, outputs)
        added = self._added[outputs]
        layer_projected = projected[..., first : first + rank]
        torch.bmm(layer_projected, stack.b.transpose(1, 2), out=added[:-1].view(slots, self._most, outputs))
        y[0, self._covered].add_(added[self._place_C])


class MixedTokens:
    """Products that compute long runs of one adapter separately and group all other tokens by slot."""

    def __init__(
        self, runs: TokenRuns, slots: AdapterSlots, grouping: Callable[[list[list[int]]], Grouping], *, joins: bool,
        recorded: int = 0,
    ) -> None:  # fmt: skip
        """`joins` concatenates the A of layers with the same input. Batches of at most `recorded` tokens can be recorded."""
        self._slots, self._joins, self._recorded = slots, joins, recorded
        tokens: list[list[int]] = [[] for _ in range(runs.slots)]
        self._total = total = sum(count for count, _ in runs.runs)
        self._long: list[tuple[slice, int]] = []
        start = 0
        for count, slot in runs.runs:
            rows = slice(start, start + count)
            if slot >= 0 and (count >= LONG or (count == total and not recorded)):
                self._long.append((rows, slot))
            elif slot >= 0:
                tokens[slot] += range(rows.start, rows.stop)
            start += count
        self._grouping = grouping(tokens) if any(tokens) else None
        # The last input: layers that read the same one share its projection.
        self._input: Tensor | None = None

    @property
    def form(self) -> Hashable | None:
        """As in TokenProducts. The tensors of stacks that are not wide are part of it."""
        if self._long or self._total > self._recorded:
            return None
        return "base" if self._grouping is None else ("grouped", self._slots.address, len(self.numbers[0]))

    @property
    def numbers(self) -> list[Tensor]:
        """As in TokenProducts."""
        return [] if self._grouping is None else self._grouping.numbers

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        y = self._slots.product(x, weight, bias)
        for rows, slot in self._long:
            y[0, rows].addmm_(x[0, rows] @ stack.a[slot].T, stack.b[slot].T)
        if self._grouping is not None:
            projected, first = self._project(self._grouping, layer, x, stack)
            self._grouping.add(projected, first, stack, y)
        return y

    def _project(self, grouping: Grouping, layer: str, x: Tensor, stack: Stack) -> tuple[Tensor, int]:
        """Projections of the grouped tokens, and the first column of this layer. The first layer that reads an input projects
        it for all layers that read it."""
        if x is not self._input:
            self._input, self._first = x, layer
            self._gathered = grouping.gather(x)
            self._names, wide = self._slots.readers(layer)
            self._projected = grouping.project(self._gathered, wide)
        if layer in self._names:
            return self._projected, self._names.index(layer) * stack.a.shape[1]
        if self._joins:
            self._slots.join(self._first, layer)
        return grouping.project(self._gathered, stack.a), 0


def all_finite(matrices: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite. An overflowing sum gives False although all numbers are finite."""
    return bool(torch.stack([matrix.sum(dtype=torch.float32) for matrix in matrices]).sum().isfinite())


def fill(stack: Stack, slot: int, pair: tuple[Tensor, Tensor] | None, scale: float) -> None:
    """Copy A and s B into a slot and fill the rest with zeros; without a pair, fill all of it."""
    rank, room = 0 if pair is None else len(pair[0]), stack.a.shape[1]
    if pair is not None:
        stack.a[slot, :rank] = pair[0].detach()
        torch.mul(pair[1].detach(), scale, out=stack.b[slot, :, :rank])
    if rank < room:  # numbers of the slot's previous adapter, which may not be finite
        stack.a[slot, rank:], stack.b[slot, :, rank:] = 0, 0


class PlainLayout:
    """One slot after another in each layer. With `one_matrix` B is stored as [n, R, outputs], so that all slots together form
    one matrix, and the products of this file do not join layers. `products` replaces them."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, *, one_matrix: bool = False,
        products: Callable[[TokenRuns, AdapterSlots], TokenProducts] | None = None,
    ) -> None:  # fmt: skip
        self._dtype, self._device, self._one_matrix, self._products = dtype, device, one_matrix, products

    def rank(self, rank: int) -> int:
        """Unchanged."""
        return rank

    def columns(self, columns: int) -> int:
        """Unchanged."""
        return columns

    def new_stack(self, slots: int, rank: int, a: Tensor, b: Tensor) -> Stack:
        """As in SlotLayout."""
        turned = b.new_zeros((slots, rank, len(b)), dtype=self._dtype).transpose(1, 2)
        by_slot = a.new_zeros(slots, rank, a.shape[1], dtype=self._dtype)
        return Stack(by_slot, turned if self._one_matrix else turned.contiguous())

    def write(self, slot: int, stacks: Mapping[str, Stack], weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> bool:
        """As in SlotLayout. No stack is wide, so the numbers may be infinite or NaN."""
        for layer, stack in stacks.items():
            fill(stack, slot, weights.get(layer), scale)
        return True

    def tokens(self, runs: TokenRuns, slots: AdapterSlots) -> TokenProducts:
        """As in SlotLayout."""
        if self._products is not None:
            return self._products(runs, slots)
        return MixedTokens(runs, slots, lambda tokens: TableGrouping(tokens, self._device), joins=not self._one_matrix)


def slot_layout(dtype: torch.dtype, device: torch.device, *, serving: bool) -> SlotLayout:
    """The memory layout of adapter slots."""
    return PlainLayout(dtype, device)

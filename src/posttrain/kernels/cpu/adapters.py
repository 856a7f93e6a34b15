"""Slots of adapters in bfloat16 on a CPU: concatenated on processors with matrix tiles, otherwise grouped by slot in C.

The tiled product (`c/tiles.c`) of the base also adds each token's low-rank product, bit for bit as in training. Layers whose
inputs do not fill tiles, and processors without tiles, use the low-rank products of `c/lowrank.c`.

T: tokens, n: slots, R: rank, C: columns of all slots, a multiple of DEEP.
"""

import functools
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels.cpu import bindings, linear
from posttrain.kernels.cpu.build import library
from posttrain.kernels.interfaces import AdapterSlots, SlotLayout, Stack, TokenProducts, TokenRuns
from posttrain.kernels.reference_slots import MixedTokens, PlainLayout, all_finite, fill

# Tokens of the largest decoding step.
DECODED = 256


def slot_layout(dtype: torch.dtype, device: torch.device, *, serving: bool) -> SlotLayout:
    """The memory layout of adapter slots."""
    if linear.tileable(bindings.DEEP, dtype, device):
        return TileLayout(serving=serving)
    if dtype == torch.bfloat16 and device.type == "cpu" and library() is not None:
        return _grouped_layout(serving=serving)
    return PlainLayout(dtype, device)


class CompiledGrouping:
    """Tokens of each slot in a list, and compiled products over it."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self._groups = bindings.Groups(tokens)
        self.numbers = [self._groups.order, self._groups.start]

    def gather(self, x: Tensor) -> Tensor:
        """[T, inputs]."""
        return x[0].contiguous()

    def project(self, gathered: Tensor, a: Tensor) -> Tensor:
        """[T, C], float32."""
        return bindings.project(gathered, a.contiguous(), self._groups)

    def add(self, projected: Tensor, first: int, stack: Stack, y: Tensor) -> None:
        """Add B p to the grouped tokens."""
        bindings.expand(projected, stack.b.transpose(1, 2), self._groups, first, y[0])


def _grouped(runs: TokenRuns, slots: AdapterSlots, *, serving: bool) -> MixedTokens:
    return MixedTokens(runs, slots, CompiledGrouping, joins=True, recorded=bindings.FEW_ROWS if serving else 0)


def _grouped_layout(*, serving: bool) -> PlainLayout:
    """B is stored as [n, R, outputs], as `expand` reads it."""
    products = functools.partial(_grouped, serving=serving)
    return PlainLayout(torch.bfloat16, torch.device("cpu"), one_matrix=True, products=products)


class TileLayout:
    """The slots of a layer concatenated in one matrix, if its inputs fill tiles."""

    def __init__(self, *, serving: bool) -> None:
        self._serving, self._grouped = serving, _grouped_layout(serving=serving)

    def rank(self, rank: int) -> int:
        """Slots fill a block of columns, or blocks a slot."""
        return bindings.slot_rank(rank) if rank else rank

    def columns(self, columns: int) -> int:
        """Whole blocks."""
        return -(-columns // bindings.DEEP) * bindings.DEEP

    def new_stack(self, slots: int, rank: int, a: Tensor, b: Tensor) -> Stack:
        """As in SlotLayout."""
        inputs, outputs = a.shape[1], len(b)
        if not linear.tileable(inputs, torch.bfloat16, a.device):
            return self._grouped.new_stack(slots, rank, a, b)
        used = slots * rank
        columns = self.columns(used)
        wide = a.new_zeros(columns, inputs, dtype=torch.bfloat16), b.new_zeros(outputs, columns, dtype=torch.bfloat16)
        by_slot = wide[1][:, :used].view(outputs, slots, rank).transpose(0, 1)
        return Stack(wide[0][:used].view(slots, rank, inputs), by_slot, wide)

    def write(self, slot: int, stacks: Mapping[str, Stack], weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> bool:
        """As in SlotLayout; at once where every layer's stack is wide."""
        pairs = {layer: (a.detach(), b.detach()) for layer, (a, b) in weights.items()}
        at_once = all(
            stacks[layer].wide is not None and all(x.dtype == torch.float32 and x.is_contiguous() for x in pair)
            for layer, pair in pairs.items()
        )
        if at_once:
            places = [(stacks[layer].a[slot], stacks[layer].b[slot]) for layer in pairs]
            finite = bindings.fill_slot(list(pairs.values()), places, scale)
        else:
            finite = all_finite([x for pair in pairs.values() for x in pair])
        for layer, stack in stacks.items():
            pair = pairs.get(layer)
            if not finite and stack.wide is not None:
                pair = None
            if pair is None or not at_once:
                fill(stack, slot, pair, scale)
        return finite

    def tokens(self, runs: TokenRuns, slots: AdapterSlots) -> TokenProducts:
        """As in SlotLayout."""
        return TiledTokens(runs, slots, serving=self._serving)


class TiledTokens:
    """The slot of each token, and the tokens sorted by slot, so that few adapters share a tile."""

    def __init__(self, runs: TokenRuns, slots: AdapterSlots, *, serving: bool) -> None:
        self._runs, self._slots, self._serving = runs, slots, serving
        slot_of_run = [-1 if slot in runs.unstacked else slot for _, slot in runs.runs]
        counts = torch.tensor([count for count, _ in runs.runs])
        self._slot_T = torch.tensor(slot_of_run, dtype=torch.int32).repeat_interleave(counts)
        self._order = None
        # Few tokens always have an order, so that decoding steps have one form.
        if len(set(slot_of_run)) > 1 or len(self._slot_T) <= DECODED:
            order = self._slot_T.argsort(stable=True).int()
            self._order = functional.pad(order, (0, -len(order) % bindings.LANES), value=-1)

    @property
    def form(self) -> Hashable | None:
        """As in TokenProducts."""
        return None if self._order is None else self._slots.form

    @property
    def numbers(self) -> list[Tensor]:
        """As in TokenProducts."""
        return [self._slot_T, *([] if self._order is None else [self._order])]

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack) -> Tensor:
        """x [1, T, inputs] -> [1, T, outputs]."""
        if stack.wide is None:
            return self._grouped.apply(layer, x, weight, bias, stack)
        slots = bindings.Slots(*stack.wide, self._slots.rank, self._slot_T, self._order)
        return bindings.products(x[0], weight.to(x.dtype).contiguous(), bias, slots)[0][None]

    @functools.cached_property
    def _grouped(self) -> MixedTokens:
        return _grouped(self._runs, self._slots, serving=self._serving)

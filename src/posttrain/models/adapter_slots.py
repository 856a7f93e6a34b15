"""Copies of an engine's adapters in the dtype of its products: each layer has a stack with one slot per adapter.

R: rank of the widest adapter (others are padded with zeros), n: slots, C = n R. `slot_bytes` is an upper bound of their memory.

Slots hold weak references: an adapter that leaves memory frees its slot. If it was the widest, the slots can become narrower.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor

from posttrain.kernels import Stack, all_finite, engine_linear, slot_layout
from posttrain.models.adapter import LoraAdapter
from posttrain.models.cache import new_address

# Upper limit of slots per adapter in use.
SPARE_SLOTS = 4

_NO_FORM: Hashable | None = None


class SlotShape(NamedTuple):
    """The size of a slot for one adapter: its rank, and for each of its layers the name and inputs + outputs."""

    rank: int
    layers: frozenset[tuple[str, int]]

    @classmethod
    def of(cls, adapter: LoraAdapter) -> "SlotShape":
        """The shape of an adapter."""
        return cls(_rank(adapter), frozenset((layer, a.shape[1] + len(b)) for layer, (a, b) in adapter.weights.items()))


def most_slots(adapters: int) -> int:
    """Upper limit of slots for this number of adapters."""
    return 3 * adapters // 2


def slot_bytes(shapes: Sequence[SlotShape], dtype: torch.dtype, device: torch.device) -> int:
    """Upper bound of the slots' memory in bytes after all of these adapters have been used."""
    layers = frozenset().union(*{shape.layers for shape in shapes})
    layout, rank = slot_layout(dtype, device), max((shape.rank for shape in shapes), default=0)
    columns = layout.columns(most_slots(len(shapes)) * layout.rank(rank))
    return columns * sum(width for _, width in layers) * dtype.itemsize


def _rank(adapter: LoraAdapter) -> int:
    return max((len(a) for a, _ in adapter.weights.values()), default=0)


class NarrowAdapters:
    """Copies of adapters' matrices in one dtype, one slot each. A copy is renewed if its adapter was trained since.

    `product` computes the products with the base's own weights.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, serving: bool = False) -> None:
        self.product = engine_linear(dtype, device, serving=serving)
        self.layout = slot_layout(dtype, device, serving=serving)
        # Adapters with non-finite weights. Wide stacks hold zeros in their slots, and their products are added separately.
        self.unstacked: WeakSet[LoraAdapter] = WeakSet()
        self._allocate(0, 0)

    def settle(self, adapters: Sequence[LoraAdapter]) -> None:
        """Give slots to all adapters in use, and release memory first if there are too many slots or they are too wide.

        Too many: more than SPARE_SLOTS per adapter in use, or than `most_slots` of the adapters in memory. Too wide: the
        widest adapter has left memory."""
        needed = list(dict.fromkeys(adapters))
        slots = self.slots
        occupied = [slot for slot, adapter in enumerate(slots) if adapter is not None]
        in_memory = len(occupied) + sum(adapter not in slots for adapter in needed)
        too_wide = max((self._ranks[slot] for slot in occupied), default=self.rank) < self.rank
        if needed and (too_wide or len(slots) > min(SPARE_SLOTS * len(needed), most_slots(in_memory))):
            rank = max((self._ranks[slot] for slot in occupied), default=0)
            self._allocate(len(needed), rank)
        self.hold(needed)

    @property
    def slots(self) -> list[LoraAdapter | None]:
        """The adapter of each slot; None for a free slot."""
        return [None if reference is None else reference() for reference in self._references]

    def hold(self, adapters: Sequence[LoraAdapter]) -> None:
        """Give these adapters slots with current copies. Other adapters keep their slots until the slots are needed, so that
        rows that join and leave cause no repeated copies."""
        needed = list(dict.fromkeys(adapters))
        slots = self.slots
        missing = [a for a in needed if a not in slots]
        rank = self.layout.rank(max(map(_rank, missing), default=0))
        if rank > self.rank:
            self._allocate(max(len(needed), sum(adapter is not None for adapter in slots)), rank)
            missing = needed
        elif len(needed) > len(
            slots
        ):  # grows by half, so that adapters that arrive one by one do not copy all others each time
            self._widen(max(len(needed), 3 * len(slots) // 2))
        free = [slot for slot, adapter in enumerate(self.slots) if adapter not in needed]
        for slot, adapter in zip(free, missing, strict=False):
            self._write(slot, adapter)
        for slot, current in enumerate(self.slots):
            if current is None or current not in needed:
                continue
            # An adapter that was read from a file and is not trained cannot change. Comparing versions takes milliseconds.
            if (current.training or current.fingerprint is None) and _version(current) != self._versions[slot]:
                self._write(slot, current)

    def clear(self) -> None:
        """Release all slots: after a failed step their content is unknown."""
        self._allocate(0, 0)

    def _widen(self, slots: int) -> None:
        """Allocate more slots and copy the present ones."""
        references, versions, finite, stacks = self._references, self._versions, self._finite, self._stacks
        unstacked, ranks, count = self.unstacked, self._ranks, len(self._references)
        self._allocate(slots, self.rank)
        self._references[:count], self._versions[:count], self._finite[:count] = references, versions, finite
        self.unstacked, self._ranks[:count] = unstacked, ranks
        for layer in list(stacks):  # layer by layer, so that only one layer is in memory twice
            old = stacks.pop(layer)
            new = self._stacks[layer] = self.layout.new_stack(slots, self.rank, old.a[0], old.b[0])
            new.a[:count], new.b[:count] = old.a, old.b

    def _allocate(self, slots: int, rank: int) -> None:
        """Replace all slots by empty ones for adapters of at most this rank."""
        self._references: list[ref[LoraAdapter] | None] = [None] * slots
        self._versions, self._ranks, self.rank = [0] * slots, [0] * slots, rank
        self._stacks: dict[str, Stack] = {}
        # Whether a slot's matrices are finite; None: not checked yet.
        self._finite: list[bool | None] = [True] * slots
        self.unstacked = WeakSet()
        # Changes whenever the tensors are replaced.
        self.address = new_address()
        self._form_address, self._form = -1, _NO_FORM
        # By the first layer that reads an input: all layers that read it, and their concatenated A [n, layers x R, inputs].
        self._readers: dict[str, tuple[list[str], Tensor]] = {}

    def stack(self, layer: str) -> Stack | None:
        """A layer's matrices; None if no adapter covers the layer."""
        return self._stacks.get(layer)

    def wide(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The matrices of the layers whose stack is wide."""
        return {layer: stack.wide for layer, stack in self._stacks.items() if stack.wide is not None}

    @property
    def form(self) -> Hashable | None:
        """The rank and the layers of the slots: a step recorded for one form can run with any slots of that form. None if an
        adapter is unstacked, or a layer's stack is not wide."""
        if self._form_address != self.address:
            all_wide = all(stack.wide is not None for stack in self._stacks.values())
            self._form = (self.rank, frozenset(self._stacks)) if all_wide else _NO_FORM
            self._form_address = self.address
        return None if self.unstacked else self._form

    def readers(self, first: str) -> tuple[list[str], Tensor]:
        """The layers that read the same input as `first`, itself included, and their concatenated A [n, layers x R, inputs]."""
        return self._readers.get(first) or ([first], self._stacks[first].a)

    def join(self, first: str, layer: str) -> None:
        """Concatenate the A of `layer` with those of the layers that read the same input as `first`."""
        names, wide = self.readers(first)
        names, wide = [*names, layer], torch.cat([wide, self._stacks[layer].a], 1)
        self._readers[first] = names, wide
        for index, name in enumerate(names):
            self._stacks[name] = Stack(wide[:, index * self.rank : (index + 1) * self.rank], self._stacks[name].b)
        self.address = new_address()

    def finite(self, needed: Sequence[LoraAdapter]) -> bool:
        """Whether the matrices in all slots are finite, so that masked projections add exact zeros. Slots of non-finite
        adapters that are not in `needed` are cleared first."""
        slots = self.slots
        for slot, finite in enumerate(self._finite):
            if finite is None:
                parts = [matrix[slot] for stack in self._stacks.values() for matrix in (stack.a, stack.b)]
                self._finite[slot] = all_finite(parts)
            if not self._finite[slot] and slots[slot] not in needed:
                for stack in self._stacks.values():
                    stack.a[slot], stack.b[slot] = 0, 0
                self._references[slot], self._finite[slot] = None, True
        return all(self._finite)

    def _write(self, slot: int, adapter: LoraAdapter) -> None:
        self.unstacked.discard(adapter)
        self._references[slot], self._versions[slot], self._finite[slot] = ref(adapter), _version(adapter), None
        self._ranks[slot] = self.layout.rank(_rank(adapter))
        slots = self.slots
        self.unstacked = WeakSet(other for other in self.unstacked if other in slots)
        for layer, (a, b) in adapter.weights.items():
            if layer not in self._stacks:
                self._stacks[layer] = self.layout.new_stack(len(slots), self.rank, a.detach(), b.detach())
                self.address = new_address()
        if not self.layout.write(slot, self._stacks, adapter.weights, adapter.settings.scale):
            self.unstacked.add(adapter)


def _version(adapter: LoraAdapter) -> int:
    return sum(p._version for pair in adapter.weights.values() for p in pair)

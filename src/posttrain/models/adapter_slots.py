"""Copies of the adapters that an engine needs, in the type of its products: a slot for each, side by side in each layer.

R: rank (of the widest adapter, others are filled with zeros), n: slots, C = n R. `slot_bytes` bounds what they take.

Slots keep no adapter alive: one that has left memory leaves its slot, and with the widest one its width.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor

from posttrain.kernels import Stack, all_finite, engine_linear, slot_layout
from posttrain.models.adapter import LoraAdapter
from posttrain.models.cache import new_address

# Slots kept at most for each adapter in flight.
SPARE_SLOTS = 4

_NO_FORM: Hashable | None = None


class SlotShape(NamedTuple):
    """What an adapter needs of a slot: its rank, and of each of its layers the name and inputs + outputs."""

    rank: int
    layers: frozenset[tuple[str, int]]

    @classmethod
    def of(cls, adapter: LoraAdapter) -> "SlotShape":
        """The shape of an adapter."""
        return cls(_rank(adapter), frozenset((layer, a.shape[1] + len(b)) for layer, (a, b) in adapter.weights.items()))


def most_slots(adapters: int) -> int:
    """Slots that are kept for so many adapters at most."""
    return 3 * adapters // 2


def slot_bytes(shapes: Sequence[SlotShape], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that the slots of these adapters take at most, when all of them have been in flight."""
    layers = frozenset().union(*{shape.layers for shape in shapes})
    layout, rank = slot_layout(dtype, device), max((shape.rank for shape in shapes), default=0)
    columns = layout.columns(most_slots(len(shapes)) * layout.rank(rank))
    return columns * sum(width for _, width in layers) * dtype.itemsize


def _rank(adapter: LoraAdapter) -> int:
    return max((len(a) for a, _ in adapter.weights.values()), default=0)


class NarrowAdapters:
    """Copies of some adapters' matrices in one dtype, a slot each; made again where an adapter was trained in the meantime.

    `product` is what the base's own products are computed by.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, serving: bool = False) -> None:
        self.product = engine_linear(dtype, device, serving=serving)
        self.layout = slot_layout(dtype, device, serving=serving)
        # Adapters that are not finite, and whose slots are zeros instead in stacks that are wide.
        self.apart: WeakSet[LoraAdapter] = WeakSet()
        self._open(0, 0)

    def settle(self, adapters: Sequence[LoraAdapter]) -> None:
        """These are all that are in flight: they are held, and far more slots than they need, or than there are adapters in
        memory, are given up; so is the width of one that is not in memory any more."""
        needed = list(dict.fromkeys(adapters))
        slots = self.slots
        there = [slot for slot, held in enumerate(slots) if held is not None]
        known = len(there) + sum(adapter not in slots for adapter in needed)
        narrower = max((self._ranks[slot] for slot in there), default=self.rank) < self.rank
        if needed and (narrower or len(slots) > min(SPARE_SLOTS * len(needed), most_slots(known))):
            rank = max((self._ranks[slot] for slot in there), default=0)
            self._open(len(needed), rank)
        self.hold(needed)

    @property
    def slots(self) -> list[LoraAdapter | None]:
        """The adapter of each slot; None where there is none in memory."""
        return [None if held is None else held() for held in self._held]

    def hold(self, adapters: Sequence[LoraAdapter]) -> None:
        """These are needed now. Others stay until their slots are, so that rows that come and go make no copies each time."""
        needed = list(dict.fromkeys(adapters))
        slots = self.slots
        missing = [a for a in needed if a not in slots]
        rank = self.layout.rank(max(map(_rank, missing), default=0))
        if rank > self.rank:
            self._open(max(len(needed), sum(held is not None for held in slots)), rank)
            missing = needed
        elif len(needed) > len(slots):  # where adapters come one by one, not every one makes all others be moved
            self._widen(max(len(needed), 3 * len(slots) // 2))
        free = [slot for slot, adapter in enumerate(self.slots) if adapter not in needed]
        for slot, adapter in zip(free, missing, strict=False):
            self._write(slot, adapter)
        for slot, held in enumerate(self.slots):
            if held is None or held not in needed:
                continue
            # What was read from a file and is not trained stays as it is: asking all of its tensors takes milliseconds.
            if (held.training or held.fingerprint is None) and _version(held) != self._versions[slot]:
                self._write(slot, held)

    def clear(self) -> None:
        """Give up all slots: after a step that failed half way, nobody knows what they hold."""
        self._open(0, 0)

    def _widen(self, slots: int) -> None:
        """More slots; what is in the ones that there are is copied."""
        there, versions, finite, stacks = self._held, self._versions, self._finite, self._stacks
        apart, ranks = self.apart, self._ranks
        self._open(slots, self.rank)
        self._held[: len(there)], self._versions[: len(there)], self._finite[: len(there)] = there, versions, finite
        self.apart, self._ranks[: len(there)] = apart, ranks
        for layer in list(stacks):  # one by one, so that never all are there twice
            old = stacks.pop(layer)
            new = self._stacks[layer] = self.layout.new_stack(slots, self.rank, old.a[0], old.b[0])
            new.a[: len(there)], new.b[: len(there)] = old.a, old.b

    def _open(self, slots: int, rank: int) -> None:
        """Empty slots for adapters of at most this rank."""
        self._held: list[ref[LoraAdapter] | None] = [None] * slots
        self._versions, self._ranks, self.rank = [0] * slots, [0] * slots, rank
        self._stacks: dict[str, Stack] = {}
        # Whether a slot's matrices are finite; None where nobody has looked.
        self._finite: list[bool | None] = [True] * slots
        self.apart = WeakSet()
        # Another one where the tensors are others.
        self.address = new_address()
        self._formed, self._form = -1, _NO_FORM
        # By the first layer that reads an input: all that read it, and their A side by side [n, layers x R, inputs].
        self._readers: dict[str, tuple[list[str], Tensor]] = {}

    def stack(self, layer: str) -> Stack | None:
        """A layer's matrices; None where no adapter has any."""
        return self._stacks.get(layer)

    def wide(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The matrices of the layers whose stack is wide."""
        return {layer: stack.wide for layer, stack in self._stacks.items() if stack.wide is not None}

    @property
    def form(self) -> Hashable | None:
        """What adapters are but for their numbers: those of one form differ by where their tensors lie. None where one is
        computed apart, or a layer's stack is not wide."""
        if self._formed != self.address:
            whole = all(stack.wide is not None for stack in self._stacks.values())
            self._form = (self.rank, frozenset(self._stacks)) if whole else _NO_FORM
            self._formed = self.address
        return None if self.apart else self._form

    def readers(self, first: str) -> tuple[list[str], Tensor]:
        """Layers that read what this one is the first to read, itself among them, and their A [n, layers x R, inputs]."""
        return self._readers.get(first) or ([first], self._stacks[first].a)

    def join(self, first: str, layer: str) -> None:
        """This layer reads what `first` reads: from now on its A stands beside the others."""
        names, wide = self.readers(first)
        names, wide = [*names, layer], torch.cat([wide, self._stacks[layer].a], 1)
        self._readers[first] = names, wide
        for index, name in enumerate(names):
            self._stacks[name] = Stack(wide[:, index * self.rank : (index + 1) * self.rank], self._stacks[name].b)
        self.address = new_address()

    def finite(self, needed: Sequence[LoraAdapter]) -> bool:
        """Whether all matrices are finite, so that what is not a token's own adds zeros to it. Of adapters that are not needed
        what is not finite is forgotten."""
        slots = self.slots
        for slot, finite in enumerate(self._finite):
            if finite is None:
                parts = [matrix[slot] for stack in self._stacks.values() for matrix in (stack.a, stack.b)]
                self._finite[slot] = all_finite(parts)
            if not self._finite[slot] and slots[slot] not in needed:
                for stack in self._stacks.values():
                    stack.a[slot], stack.b[slot] = 0, 0
                self._held[slot], self._finite[slot] = None, True
        return all(self._finite)

    def _write(self, slot: int, adapter: LoraAdapter) -> None:
        self.apart.discard(adapter)
        self._held[slot], self._versions[slot], self._finite[slot] = ref(adapter), _version(adapter), None
        self._ranks[slot] = self.layout.rank(_rank(adapter))
        held = self.slots
        self.apart = WeakSet(adapter for adapter in self.apart if adapter in held)
        for layer, (a, b) in adapter.weights.items():
            if layer not in self._stacks:
                self._stacks[layer] = self.layout.new_stack(len(held), self.rank, a.detach(), b.detach())
                self.address = new_address()
        if not self.layout.write(slot, self._stacks, adapter.weights, adapter.settings.scale):
            self.apart.add(adapter)


def _version(adapter: LoraAdapter) -> int:
    return sum(p._version for pair in adapter.weights.values() for p in pair)

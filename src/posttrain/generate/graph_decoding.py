"""Steps that only decode, in few fixed forms, so that a GPU can replay them (`kernels/cuda/graphs.py`).

Of a shelf all places up to a power of two are computed, and keys seen are rounded up to powers of two. A place without a row
is taken for a row of no tokens that the base answers: it writes its first key, which the prompt of whoever joins there writes
over, and nobody reads what it says. What rows bring to a step is one tensor [4, T] of integers; what is not in it is the form.

T: tokens of the forward, one for each place computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.generate.batch import Places, merged, steady_rows
from posttrain.generate.requests import Row
from posttrain.kernels import Step, step_graphs
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.cache import CacheStep, Reading, Shelf
from posttrain.models.lora import LoraAdapter
from posttrain.models.segments import Segments
from posttrain.models.token_adapters import SlotAdapters

# The fewest keys that a row is computed over, where its shelf has so many.
LEAST_SEEN = 256


class Part(NamedTuple):
    """Tokens [start, start + rows) of the forward stand for the first places of a shelf and see its first `seen` keys."""

    shelf: Shelf
    start: int
    rows: int
    seen: int


class Form(NamedTuple):
    """What a step is but for its numbers: each shelf's tensors, rows and keys seen; the tensors of the adapters, None where all
    rows are the base's; those of the weights; whether embeddings are brought along."""

    parts: tuple[tuple[int, int, int], ...]
    adapters: int | None
    weights: int
    embedded: bool


class Steady(NamedTuple):
    """A step: ids, lengths, slots of adapters (-1 for the base) and the tokens that the rows are read at [4, T], and the rows.

    Rows are read in their order; behind them the first one is read again.
    """

    numbers_4T: Tensor
    parts: tuple[Part, ...]
    rows: list[Row]
    runs: list[tuple[int, LoraAdapter | None]]


class SteadyDecoder:
    """Runs steps without prompts over one base, with the adapters that its engine holds."""

    def __init__(self, base: BaseModel, narrow: NarrowAdapters) -> None:
        self._base, self._narrow = base, narrow
        self.graphs = step_graphs(base.device, base.model.config.get_text_config().to_dict())

    def lay_out(self, places: Places) -> Steady | None:
        """The next step of all rows, whose prompts are filled; None where it cannot be one of fixed form."""
        needed = list(dict.fromkeys(row.adapter for row in places.rows() if row.adapter is not None))
        self._narrow.hold(needed)
        if not self._narrow.finite(needed):
            return None
        if self._base.narrow is not None and any(adapter.tokens is not None for adapter in needed):
            return None  # embeddings are made outside of the forward, which narrows them
        slot_of = {adapter: slot for slot, adapter in enumerate(self._narrow.slots) if adapter is not None}
        parts, rows, source, total = [], [], [], 0
        ids, lengths, slots, runs = [], [], [], []
        for shelf, there in places.shelves.values():
            standing = [(place, row) for place, row in enumerate(there) if row is not None]
            size, longest = steady_rows(standing[-1][0] + 1, shelf), max(row.length for _, row in standing)
            parts.append(Part(shelf, total, size, min(shelf.capacity, max(LEAST_SEEN, 1 << longest.bit_length()))))
            own: list[Row | None] = [None] * size
            for place, row in standing:
                own[place] = row
                rows.append(row)
                source.append(total + place)
            ids += [row.ids[-1] if row else 0 for row in own]
            lengths += [row.length if row else 0 for row in own]
            slots += [slot_of[row.adapter] if row and row.adapter else -1 for row in own]
            runs += [(1, row.adapter if row else None) for row in own]
            total += size
        numbers_4T = torch.tensor([ids, lengths, slots, source + source[:1] * (total - len(source))])
        return Steady(numbers_4T, tuple(parts), rows, merged(runs))

    def forward(self, steady: Steady) -> Tensor:
        """Last hidden states [T, D] of the rows, and of the first one again up to T; they stand until the next forward."""
        base, narrow, parts = self._base, self._narrow, steady.parts
        adapters = [adapter for _, adapter in steady.runs if adapter is not None]
        inputs, embedded = [steady.numbers_4T], any(adapter.tokens is not None for adapter in adapters)
        if embedded:
            inputs.append(base.adapters.embed(steady.numbers_4T[0].to(base.device), steady.runs))
        form = Form(
            tuple((part.shelf.address, part.rows, part.seen) for part in parts), narrow.address if adapters else None,
            0 if base.narrow is None else base.narrow.address, embedded,
        )  # fmt: skip
        if form not in self.graphs.forms:
            shelves = {part.shelf.address for part in parts}
            self.graphs.forget(lambda other: self._stale(other, form, shelves))
        return self.graphs.run(form, inputs, self._step(parts, adapted=bool(adapters)))

    def _stale(self, other: Form, form: Form, shelves: set[int]) -> bool:
        """Whether a form names tensors that are not there any more."""
        return (
            not shelves.issuperset(address for address, _, _ in other.parts)
            or other.weights != form.weights
            or other.adapters not in (None, self._narrow.address)
        )

    def _step(self, parts: Sequence[Part], *, adapted: bool) -> Step:
        base, narrow = self._base, self._narrow

        def step(inputs: Sequence[Tensor]) -> Tensor:
            ids_T, length_T, slot_T, source_T = inputs[0]
            cache = CacheStep(len(ids_T), tuple(_reading(part, length_T) for part in parts), ())
            adapters = SlotAdapters(narrow, slot_T if adapted else None, inputs[1] if len(inputs) > 1 else None)
            with base.adapters.use_tokens(adapters):
                hidden_TD = base.forward(ids_T, length_T, Segments((), step=cache))
            return hidden_TD.index_select(0, source_T)

        return step


def _reading(part: Part, length_T: Tensor) -> Reading:
    shelf, start, rows, seen = part
    tokens = slice(start, start + rows)
    blocks = -(-seen // shelf.block)
    place_R = torch.arange(rows, device=length_T.device)
    return Reading(shelf, start, rows, place_R, length_T[tokens], tokens, seen, (rows,) * blocks, {})

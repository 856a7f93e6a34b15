"""Decoding steps in a few fixed forms, so that CUDA graphs can replay them (`kernels/cuda/graphs.py`).

A step computes a power of two of a shelf's places over a power of two of keys. A place without a row is computed as an empty
row of the base: it writes its first key, which the next prompt there overwrites, and its output is ignored. The inputs of a
step are one integer tensor [4, T]; everything else about the step is its form.

T: tokens of the forward, one for each place computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.generate.batch import Places, fixed_form_rows, merged
from posttrain.generate.requests import Row
from posttrain.kernels import Step, step_graphs
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.cache import CacheStep, Reading, Shelf
from posttrain.models.lora import LoraAdapter
from posttrain.models.segments import Segments
from posttrain.models.token_adapters import SlotAdapters

# The minimum number of keys per row, if its shelf has so many.
MIN_KEYS = 256


class Part(NamedTuple):
    """Tokens [start, start + rows) of the forward are the first places of a shelf and read its first `keys` keys."""

    shelf: Shelf
    start: int
    rows: int
    keys: int


class Form(NamedTuple):
    """Everything about a step except its input values: each shelf's tensors, rows and keys; the tensors of the adapters, None
    if all rows use the base; those of the weights; whether embeddings are an input."""

    parts: tuple[tuple[int, int, int], ...]
    adapters: int | None
    weights: int
    embedded: bool


class DecodingStep(NamedTuple):
    """A decoding step: ids, lengths, adapter slots (-1 for the base) and the output token of each row [4, T], and the rows.

    Outputs are read in the order of the rows, padded with the first one.
    """

    numbers_4T: Tensor
    parts: tuple[Part, ...]
    rows: list[Row]
    runs: list[tuple[int, LoraAdapter | None]]


class FixedFormDecoder:
    """Runs steps without prompts over one base, with the adapters of its engine."""

    def __init__(self, base: BaseModel, adapters: NarrowAdapters) -> None:
        self._base, self._adapters = base, adapters
        self.graphs = step_graphs(base.device, base.model.config.get_text_config().to_dict())

    def lay_out(self, places: Places) -> DecodingStep | None:
        """The next step of all rows, whose prompts are complete. None if the step has no fixed form."""
        needed = list(dict.fromkeys(row.adapter for row in places.rows() if row.adapter is not None))
        self._adapters.hold(needed)
        if not self._adapters.finite(needed):
            return None
        if self._base.narrow is not None and any(adapter.tokens is not None for adapter in needed):
            return None  # embeddings are computed outside the forward, which casts them
        slot_of = {adapter: slot for slot, adapter in enumerate(self._adapters.slots) if adapter is not None}
        parts, rows, source, total = [], [], [], 0
        ids, lengths, slots, runs = [], [], [], []
        for shelf, rows_on_shelf in places.shelves.values():
            placed = [(place, row) for place, row in enumerate(rows_on_shelf) if row is not None]
            size, longest = fixed_form_rows(placed[-1][0] + 1, shelf), max(row.length for _, row in placed)
            parts.append(Part(shelf, total, size, min(shelf.capacity, max(MIN_KEYS, 1 << longest.bit_length()))))
            row_at_place: list[Row | None] = [None] * size
            for place, row in placed:
                row_at_place[place] = row
                rows.append(row)
                source.append(total + place)
            ids += [row.ids[-1] if row else 0 for row in row_at_place]
            lengths += [row.length if row else 0 for row in row_at_place]
            slots += [slot_of[row.adapter] if row and row.adapter else -1 for row in row_at_place]
            runs += [(1, row.adapter if row else None) for row in row_at_place]
            total += size
        numbers_4T = torch.tensor([ids, lengths, slots, source + source[:1] * (total - len(source))])
        return DecodingStep(numbers_4T, tuple(parts), rows, merged(runs))

    def forward(self, step: DecodingStep) -> Tensor:
        """Last hidden states [T, D] of the rows, padded with the first one. Valid until the next forward."""
        base, slots, parts = self._base, self._adapters, step.parts
        used_adapters = [adapter for _, adapter in step.runs if adapter is not None]
        inputs, embedded = [step.numbers_4T], any(adapter.tokens is not None for adapter in used_adapters)
        if embedded:
            inputs.append(base.adapters.embed(step.numbers_4T[0].to(base.device), step.runs))
        form = Form(
            tuple((part.shelf.address, part.rows, part.keys) for part in parts),
            slots.address if used_adapters else None, 0 if base.narrow is None else base.narrow.address, embedded,
        )  # fmt: skip
        if form not in self.graphs.forms:
            shelves = {part.shelf.address for part in parts}
            self.graphs.forget(lambda other: self._stale(other, form, shelves))
        return self.graphs.run(form, inputs, self._step(parts, adapted=bool(used_adapters)))

    def _stale(self, candidate: Form, form: Form, shelves: set[int]) -> bool:
        """Whether a form refers to tensors that no longer exist."""
        return (
            not shelves.issuperset(address for address, _, _ in candidate.parts)
            or candidate.weights != form.weights
            or candidate.adapters not in (None, self._adapters.address)
        )

    def _step(self, parts: Sequence[Part], *, adapted: bool) -> Step:
        base, engine_adapters = self._base, self._adapters

        def step(inputs: Sequence[Tensor]) -> Tensor:
            ids_T, length_T, slot_T, source_T = inputs[0]
            cache = CacheStep(len(ids_T), tuple(_reading(part, length_T) for part in parts), ())
            adapters = SlotAdapters(engine_adapters, slot_T if adapted else None, inputs[1] if len(inputs) > 1 else None)
            with base.adapters.use_tokens(adapters):
                hidden_TD = base.forward(ids_T, length_T, Segments((), step=cache))
            return hidden_TD.index_select(0, source_T)

        return step


def _reading(part: Part, length_T: Tensor) -> Reading:
    shelf, start, rows, keys = part
    tokens = slice(start, start + rows)
    blocks = -(-keys // shelf.block)
    place_R = torch.arange(rows, device=length_T.device)
    return Reading(shelf, start, rows, place_R, length_T[tokens], tokens, keys, (rows,) * blocks, {})

"""Steps that only decode, on a CPU: recorded when their form comes a second time (`record.py`), and run as programs.

A form is a number of tokens, how they stand on shelves, and what kinds of adapters there are. What changes from step to step is
written over the inputs of the recorded one; another engine's cache and adapters take the places of those it was recorded
with, so that programs outlive engines. A program is kept only if it gives the bits of the forward that it was recorded from.

T: tokens of the forward, N: rows that stand on a shelf.
"""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.kernels.cpu import bindings, bounds
from posttrain.kernels.cpu.linear import tileable
from posttrain.kernels.cpu.record import NotRecordedError, Program, Recorder
from posttrain.kernels.interfaces import AdapterSlots, Forward, Replay, StepTokens
from posttrain.kernels.segments import CacheShelf, DecodingSegments, Reading

# Programs that are kept; the longest unused leave.
MOST = 64
# Forms that could not be recorded until none is tried any more.
FAILURES = 3
# Where the numbers of an attention (c/cache.c) tell the rows and the places of the shelf.
ROWS, PLACES = 0, 5


class _Shelved(NamedTuple):
    """One shelf of a program: the tensors that say where its rows stand, with room for as many as it computes; by layer what
    its keys and values are like and where they stand among the calls; the numbers of its attentions."""

    where: list[Tensor]
    layers: dict[int, tuple[Tensor, list[list[int]]]]
    sizes: list[Any]


class _Kept:
    """A program with what it reads."""

    def __init__(self, program: Program, inputs: list[Tensor], shelves: list[_Shelved], adapters: AdapterSlots) -> None:
        self.program, self.inputs, self.shelves = program, inputs, shelves
        self.adapters = {layer: [program.stands(x.data_ptr()) for x in pair] for layer, pair in adapters.wide().items()}
        self.bound: tuple[int, ...] = ()

    def run(self, inputs: list[Tensor], readings: tuple[Reading, ...], adapters: AdapterSlots) -> Tensor:
        """The output for these inputs."""
        bound = (*(reading.shelf.address for reading in readings), adapters.address)
        if bound != self.bound:
            self._bind(readings, adapters)
            self.bound = bound
        for held, given in zip(self.inputs, inputs, strict=True):
            bounds.require(held.shape == given.shape, f"an input {tuple(given.shape)} for {tuple(held.shape)}")
            held.copy_(given)
        for shelved, reading in zip(self.shelves, readings, strict=True):
            count = len(reading.place_N)
            index, (like, _) = next(iter(shelved.layers.items()))
            bounds.check_places(_where(reading), reading.shelf.layer(index, like)[0], len(self.inputs[0]))
            for held, given in zip(shelved.where, _where(reading), strict=True):
                held[:count] = given
            for sizes in shelved.sizes:
                sizes[ROWS] = count
        return self.program.run()

    def _bind(self, readings: tuple[Reading, ...], adapters: AdapterSlots) -> None:
        """Read the cache of these shelves, and these adapters."""
        for shelved, reading in zip(self.shelves, readings, strict=True):
            for sizes in shelved.sizes:
                sizes[PLACES] = reading.shelf.places
            for index, (like, places) in shelved.layers.items():
                self._put(places, reading.shelf.layer(index, like))
        wide = adapters.wide()
        self.program.widen(max((len(a) for a, _ in wide.values()), default=0))
        for layer, places in self.adapters.items():
            self._put(places, wide[layer])

    def _put(self, places: list[list[int]], tensors: tuple[Tensor, Tensor]) -> None:
        for own, tensor in zip(places, tensors, strict=True):
            self.program.put(own, tensor.data_ptr())


def _where(reading: Reading) -> tuple[Tensor, ...]:
    assert isinstance(reading.token_N, Tensor)
    return reading.place_N, reading.length_N, reading.token_N


class Programs:
    """The programs of one base. For one thread at a time; another one's steps run as they stand meanwhile."""

    def __init__(self, model: Any, forward: Forward) -> None:
        self._model, self._forward = model, forward
        # Forms that came once, or cannot be recorded, have none.
        self._kept: OrderedDict[Hashable, _Kept | None] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._lock = threading.Lock()
        # Whether new steps are recorded, and recorded ones run.
        self.recording = True
        # Steps that ran as programs.
        self.replayed = 0

    @property
    def wants_decoding_alone(self) -> bool:
        """Whether steps of many rows are recorded: by matrix tiles they are, while new forms are still tried."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return tileable(bindings.DEEP, weight.dtype, weight.device) and self._tries

    @property
    def _tries(self) -> bool:
        """Whether steps of new forms are still recorded."""
        return self.recording and len(self._failed) < FAILURES

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments: DecodingSegments, tokens: StepTokens) -> Tensor:
        """Last hidden states [T, D], valid until the next ones."""
        own = tokens.form if self._recordable(segments) else None
        if own is None or not self._lock.acquire(blocking=False):
            return self._forward(ids_T, positions_T, segments)
        try:
            form = (len(ids_T), tuple((r.start, r.rows, r.shelf.block) for r in segments.readings), own)
            return self._known(form, [ids_T, positions_T, *tokens.numbers], segments, tokens.slots)
        finally:
            self._lock.release()

    def _recordable(self, segments: DecodingSegments) -> bool:
        if not segments.readings or segments.spans or not self.recording:
            return False
        return bindings.able(self._model.get_input_embeddings().weight)

    def _known(self, form: Hashable, inputs: list[Tensor], segments: DecodingSegments, slots: AdapterSlots) -> Tensor:
        new, kept = form not in self._kept, self._kept.setdefault(form, None)
        self._kept.move_to_end(form)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        if kept is not None:
            self.replayed += 1
            return kept.run(inputs, segments.readings, slots)
        if new or form in self._failed or not self._tries:
            return self._forward(inputs[0], inputs[1], segments)
        return self._record(form, inputs, segments, slots)

    def _record(self, form: Hashable, inputs: list[Tensor], segments: DecodingSegments, slots: AdapterSlots) -> Tensor:
        """Run a step and keep what it did, where that can be run again."""
        rooms = [[torch.cat([x, x.new_zeros(r.rows - len(x))]) for x in _where(r)] for r in segments.readings]
        readings = []
        for reading, room in zip(segments.readings, rooms, strict=True):
            place_N, length_N, token_N = (x[: len(reading.place_N)] for x in room)
            readings.append(reading._replace(place_N=place_N, length_N=length_N, token_N=token_N))
        recorder = Recorder(inputs)
        with recorder.watching(list(self._modules())):
            hidden_TD = self._forward(inputs[0], inputs[1], segments.with_readings(tuple(readings)))
        try:
            program = recorder.program(hidden_TD)
            shelves = [_shelved(recorder, program, r.shelf, room) for r, room in zip(readings, rooms, strict=True)]
            kept = _Kept(program, inputs, shelves, slots)
            _check(kept.run(inputs, tuple(readings), slots), hidden_TD)
            self._kept[form] = kept
        except NotRecordedError:
            self._failed.add(form)
        return hidden_TD

    def _modules(self) -> Iterator[nn.Module]:
        """Those that make something of the inputs: embeddings, and the angles of rotations."""
        yield self._model.get_input_embeddings()
        for module in self._model.modules():
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
                yield module


def replay(model: nn.Module, forward: Forward) -> Replay:
    """The forwards of one base, whose decoding steps are recorded where they call compiled functions alone."""
    return Programs(model, forward)


def _check(found: Tensor, wanted: Tensor) -> None:
    """Reject a recording whose output differs in any bit from the forward it was recorded from."""
    same = (found.view(torch.int16) == wanted.view(torch.int16)) | (found.isnan() & wanted.isnan())
    if not same.all():
        raise NotRecordedError("other numbers than the forward's")


def _shelved(recorder: Recorder, program: Program, shelf: CacheShelf, where: list[Tensor]) -> _Shelved:
    arrays = {ctypes.addressof(array): array for array in recorder.sizes}
    # The first of an attention's arguments is its numbers, the seventh where its rows stand.
    own = [call.args[0] for call in recorder.calls if call.kind == "attend" and call.args[6] == where[0].data_ptr()]
    layers = {
        index: (keys.new_empty(keys.shape[2], 0, keys.shape[4]), [program.stands(x.data_ptr()) for x in (keys, values)])
        for index, (keys, values) in shelf.layers()
    }
    return _Shelved(where, layers, [arrays[at] for at in own])

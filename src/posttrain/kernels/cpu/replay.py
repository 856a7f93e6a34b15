"""Decoding steps on a CPU, recorded when their form occurs a second time (`record.py`) and then replayed as programs.

The form of a step is its number of tokens, their distribution over shelves, and the form of its adapters. A replay copies the
new inputs over those of the recording. Another engine's cache and adapters are patched in by address, so programs outlive
engines. A program is rejected if its output differs in any bit from the forward that it was recorded from.

T: tokens of the forward, N: rows on a shelf.
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

# Upper limit of cached programs; the least recently used are evicted.
MOST = 64
# After this number of forms that could not be recorded, no further form is recorded.
FAILURES = 3
# Indices of the number of rows and of the shelf's places in the sizes of an attention call (c/cache.c).
ROWS, PLACES = 0, 5


class _RecordedShelf(NamedTuple):
    """One shelf of a program.

    `where`: place, length and token of its rows, with room for all rows that it computes. `layers`: by layer a tensor with the
    shape of its keys and values, and the positions of their addresses in the program. `sizes`: sizes of its attention calls.
    """

    where: list[Tensor]
    layers: dict[int, tuple[Tensor, list[list[int]]]]
    sizes: list[Any]


class _RecordedStep:
    """A program with its inputs, shelves and adapters."""

    def __init__(self, program: Program, inputs: list[Tensor], shelves: list[_RecordedShelf], adapters: AdapterSlots) -> None:
        self.program, self.inputs, self.shelves = program, inputs, shelves
        self.adapters = {layer: [program.positions(x.data_ptr()) for x in pair] for layer, pair in adapters.wide().items()}
        self.bound: tuple[int, ...] = ()

    def run(self, inputs: list[Tensor], readings: tuple[Reading, ...], adapters: AdapterSlots) -> Tensor:
        """Replay the step for these inputs and return its output."""
        bound = (*(reading.shelf.address for reading in readings), adapters.address)
        if bound != self.bound:
            self._bind(readings, adapters)
            self.bound = bound
        for recorded, new in zip(self.inputs, inputs, strict=True):
            bounds.require(recorded.shape == new.shape, f"an input {tuple(new.shape)} for {tuple(recorded.shape)}")
            recorded.copy_(new)
        for shelf, reading in zip(self.shelves, readings, strict=True):
            count = len(reading.place_N)
            index, (like, _) = next(iter(shelf.layers.items()))
            bounds.check_places(_where(reading), reading.shelf.layer(index, like)[0], len(self.inputs[0]))
            for recorded, new in zip(shelf.where, _where(reading), strict=True):
                recorded[:count] = new
            for sizes in shelf.sizes:
                sizes[ROWS] = count
        return self.program.run()

    def _bind(self, readings: tuple[Reading, ...], adapters: AdapterSlots) -> None:
        """Patch the addresses of these shelves and adapters into the program."""
        for shelf, reading in zip(self.shelves, readings, strict=True):
            for sizes in shelf.sizes:
                sizes[PLACES] = reading.shelf.places
            for index, (like, positions) in shelf.layers.items():
                self._patch(positions, reading.shelf.layer(index, like))
        wide = adapters.wide()
        self.program.widen(max((len(a) for a, _ in wide.values()), default=0))
        for layer, positions in self.adapters.items():
            self._patch(positions, wide[layer])

    def _patch(self, positions: list[list[int]], tensors: tuple[Tensor, Tensor]) -> None:
        for tensor_positions, tensor in zip(positions, tensors, strict=True):
            self.program.patch(tensor_positions, tensor.data_ptr())


def _where(reading: Reading) -> tuple[Tensor, ...]:
    assert isinstance(reading.token_N, Tensor)
    return reading.place_N, reading.length_N, reading.token_N


class Programs:
    """The programs of one base. One thread at a time may use them; steps of other threads run the plain forward meanwhile."""

    def __init__(self, model: Any, forward: Forward) -> None:
        self._model, self._forward = model, forward
        # By form; None for a form that occurred once or cannot be recorded.
        self._steps: OrderedDict[Hashable, _RecordedStep | None] = OrderedDict()
        self._failed: set[Hashable] = set()
        self._lock = threading.Lock()
        # Whether new steps are recorded, and recorded steps replayed.
        self.recording = True
        # Number of replayed steps.
        self.replayed = 0

    @property
    def wants_decoding_alone(self) -> bool:
        """Whether steps of many rows are recorded: only with matrix tiles, and while new forms are still recorded."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return tileable(bindings.DEEP, weight.dtype, weight.device) and self._tries

    @property
    def _tries(self) -> bool:
        """Whether steps of new forms are still recorded."""
        return self.recording and len(self._failed) < FAILURES

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments: DecodingSegments, tokens: StepTokens) -> Tensor:
        """Last hidden states [T, D]. The next call may overwrite them."""
        adapter_form = tokens.form if self._recordable(segments) else None
        if adapter_form is None or not self._lock.acquire(blocking=False):
            return self._forward(ids_T, positions_T, segments)
        try:
            form = (len(ids_T), tuple((r.start, r.rows, r.shelf.block) for r in segments.readings), adapter_form)
            return self._replay_or_record(form, [ids_T, positions_T, *tokens.numbers], segments, tokens.slots)
        finally:
            self._lock.release()

    def _recordable(self, segments: DecodingSegments) -> bool:
        if not segments.readings or segments.spans or not self.recording:
            return False
        return bindings.able(self._model.get_input_embeddings().weight)

    def _replay_or_record(
        self, form: Hashable, inputs: list[Tensor], segments: DecodingSegments, slots: AdapterSlots
    ) -> Tensor:
        """Replay a recorded form, record a form that occurs again, or run the forward."""
        new, step = form not in self._steps, self._steps.setdefault(form, None)
        self._steps.move_to_end(form)
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        if step is not None:
            self.replayed += 1
            return step.run(inputs, segments.readings, slots)
        if new or form in self._failed or not self._tries:
            return self._forward(inputs[0], inputs[1], segments)
        return self._record(form, inputs, segments, slots)

    def _record(self, form: Hashable, inputs: list[Tensor], segments: DecodingSegments, slots: AdapterSlots) -> Tensor:
        """Run a step, and store its recording if it can be replayed."""
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
            shelves = [_recorded_shelf(recorder, program, r.shelf, room) for r, room in zip(readings, rooms, strict=True)]
            step = _RecordedStep(program, inputs, shelves, slots)
            _check(step.run(inputs, tuple(readings), slots), hidden_TD)
            self._steps[form] = step
        except NotRecordedError:
            self._failed.add(form)
        return hidden_TD

    def _modules(self) -> Iterator[nn.Module]:
        """Modules that read the inputs and run from Python: the embedding and the rotary embeddings."""
        yield self._model.get_input_embeddings()
        for module in self._model.modules():
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
                yield module


def replay(model: nn.Module, forward: Forward) -> Replay:
    """The forwards of one base. Decoding steps that call only compiled functions are recorded."""
    return Programs(model, forward)


def _check(output: Tensor, expected: Tensor) -> None:
    """Reject a recording whose output differs in any bit from the forward it was recorded from."""
    same = (output.view(torch.int16) == expected.view(torch.int16)) | (output.isnan() & expected.isnan())
    if not same.all():
        raise NotRecordedError("the program's output differs from the forward's")


def _recorded_shelf(recorder: Recorder, program: Program, shelf: CacheShelf, where: list[Tensor]) -> _RecordedShelf:
    arrays = {ctypes.addressof(array): array for array in recorder.sizes}
    # Argument 0 of an attention call is the address of its sizes, argument 6 that of its rows' places.
    addresses = [call.args[0] for call in recorder.calls if call.kind == "attend" and call.args[6] == where[0].data_ptr()]
    layers = {
        index: (keys.new_empty(keys.shape[2], 0, keys.shape[4]), [program.positions(x.data_ptr()) for x in (keys, values)])
        for index, (keys, values) in shelf.layers()
    }
    return _RecordedShelf(where, layers, [arrays[address] for address in addresses])

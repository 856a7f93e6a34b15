"""Records one forward as a list of compiled function calls, and replays the list as one call.

A forward of one token makes about 400 small calls from Python, whose overhead exceeds their computation. The recorder notes
every call of a compiled function (`bindings.py`), and the additions and zero fills of torch; views need no call. Then each
intermediate tensor gets a place in one buffer, and one team of threads runs the list in C (`c/program.c`). The modules that
embed tokens and compute the angles of rotations run from Python in every step.

A forward with any other operation on numbers cannot be recorded. `kernels/cpu/replay.py` chooses which forwards to record.
"""

import bisect
import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.bindings import DEEP, LANES

# Bytes of a cache line; places are aligned to it.
LINE = 64
# Index of the number of adapter columns in the sizes of a product (c/tiles.h).
COLUMNS = 4
# Arguments of a call in c/program.c.
ARGUMENTS = bindings.CALL - 2
# The role of each argument of a call: an address that the call reads (r), writes (w), reads and writes (u) or ignores (-), an
# integer (n) or a float (f). In the order of c/program.c.
KINDS = {
    "zero": "wn", "add": "rrnw", "rms_norm": "rrnnfw", "rotate": "rnnrrnnnnw", "gated": "rrnnw", "attend": "rrrruurrrfu",
    "multiply": "rrrnnnw", "project": "rrrrnnnw", "expand": "rrrrnnnnu", "tile blocks": "r-----rr----ww",
    "tile turn": "rr----r---w---", "tile project": "r---r-rr--rwrr", "tile multiply": "r-rr-rrr-wrrrr",
}  # fmt: skip
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_EMPTY = ("aten::empty.memory_format", "aten::new_empty", "aten::empty_like", "aten::new_empty_strided")


class NotRecordedError(Exception):
    """The forward cannot be recorded. It still runs from Python, slower."""


class ModuleCall(NamedTuple):
    """A module that runs from Python in each step, with its arguments and the outputs of the recording."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    def rerun(self) -> list[Tensor]:
        """The outputs for the current contents of the inputs."""
        return _tensors(self.module(*self.args, **self.kwargs))


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree that have an address; the library's packed weights have none."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Call(NamedTuple):
    kind: str
    args: list[int]

    def addresses(self, roles: str) -> Iterator[int]:
        return (arg for role, arg in zip(KINDS[self.kind], self.args, strict=True) if role in roles and arg)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The calls of one forward, in order. All tensors that it creates stay referenced, so that each address is unique."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        """`inputs`: the inputs of the step, which later steps overwrite."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = {_storage(x) for x in inputs}
        # Why the forward cannot be recorded; None if it can.
        self._refused: str | None = None
        self.calls: list[_Call] = []
        self.module_calls: list[ModuleCall] = []
        # Arrays of sizes that calls read.
        self.sizes: list[Any] = []
        # Sizes of the products that add adapters, and the largest number of inputs of a tiled product.
        self.wide_sizes: list[Any] = []
        self.most_inputs = 0
        self._made: list[Tensor] = []
        self._others: list[Tensor] = []
        self._prepared: dict[tuple[str, tuple[int, ...]], dict[int, Tensor]] = {}
        self._inside = False

    @contextmanager
    def watching(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Record the calls of this thread, except those inside of these modules."""
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
            stack.enter_context(bindings.noting(self._note))
            stack.enter_context(self)
            yield

    def _enter(self, *_: Any) -> None:
        self._inside = True

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._inside = False
        self.module_calls.append(ModuleCall(module, args, kwargs, _tensors(output)))
        self._made += self.module_calls[-1].outputs
        # A floating-point argument may be any tensor: rotary embeddings read only its dtype and device.
        if any(not x.is_floating_point() and _storage(x) not in self._inputs for x in _tensors((args, kwargs))):
            self._refused = f"{type(module).__name__} reads a tensor that is not an input of the step"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record one operation of torch."""
        output = function(*args, **(kwargs or {}))
        arguments, outputs = _tensors((args, kwargs)), _tensors(output)
        if self._inside:
            self._others += outputs
        elif function._schema.is_mutable:
            self._others += arguments
        elif not {_storage(x) for x in outputs} <= {_storage(x) for x in arguments}:
            self._operation(function.name(), arguments, kwargs or {}, outputs)
        return output

    def _operation(self, name: str, arguments: list[Tensor], kwargs: Any, outputs: list[Tensor]) -> None:
        out = outputs[0]
        if name in _EMPTY or name == "aten::new_zeros":
            self._made.append(out)
            if name == "aten::new_zeros":
                self._add("zero", out.data_ptr(), out.nbytes)
        elif name == "aten::add.Tensor" and not kwargs and len(arguments) == 2 and all(_alike(x, out) for x in arguments):
            self._made.append(out)
            self._add("add", *(x.data_ptr() for x in arguments), out.numel(), out.data_ptr())
        else:
            self._others += outputs

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        """Record one call of a compiled function."""
        numbers = [self._number(arg) for arg in args]
        if name == "products":
            self._tiles(args[0], numbers)
        elif name in KINDS:
            self._add(name, *numbers)
        else:
            self._refused = name

    def _number(self, arg: Any) -> int:
        if isinstance(arg, ctypes.Array):
            self.sizes.append(arg)
            return ctypes.addressof(arg)
        if isinstance(arg, ctypes.c_float):
            return int.from_bytes(struct.pack("<f", arg.value), "little")
        return int((arg if arg is None or isinstance(arg, int) else arg.value) or 0)

    def _add(self, kind: str, *args: int) -> None:
        assert len(args) == len(KINDS[kind]), f"{kind}: {len(args)} arguments"
        self.calls.append(_Call(kind, list(args)))

    def _tiles(self, sizes: Any, args: list[int]) -> None:
        """Record a tiled product as several calls. Preparations are shared with earlier products that need the same ones."""
        tokens, inputs, _, along, columns, rank, across, tiles = sizes
        if across or args[8]:
            self._refused = "a product in its training form"
            return
        self.most_inputs = max(self.most_inputs, inputs)
        x, order, slot = args[1], *args[6:8]
        # Enough for any number of slots, because a later step may have more (`Program.widen`).
        most = LANES * max(rank // DEEP, 1) if columns else 0
        call_args = [*args, 0, 0, 0, 0]
        if columns:
            self.wide_sizes.append(sizes)
        self._prepare("tile blocks", (order, slot, columns, rank, tokens), call_args, {12: 4 * tiles * most, 13: 8 * tiles})
        self._prepare("tile turn", (x, along, inputs, tokens, order), call_args, {10: 2 * tiles * inputs * LANES})
        if columns:
            self._prepare("tile project", (len(self.calls),), call_args, {11: 4 * tiles * most * LANES**2})
        self._add("tile multiply", *call_args)

    def _prepare(self, kind: str, key: tuple[int, ...], call_args: list[int], sizes: dict[int, int]) -> None:
        """Set arguments (index to size in bytes) to the buffers that a call of this kind fills; add that call if it is new."""
        new = (kind, key) not in self._prepared
        if new:
            self._prepared[kind, key] = {index: torch.empty(size, dtype=torch.uint8) for index, size in sizes.items()}
        for index, buffer in self._prepared[kind, key].items():
            call_args[index] = buffer.data_ptr()
        if new:
            self._add(kind, *call_args)

    def program(self, output: Tensor) -> "Program":
        """The recorded calls as a program. Raises NotRecordedError if the forward cannot be recorded."""
        if self._refused is not None:
            raise NotRecordedError(self._refused)
        return Program(self, _Ranges(self._made), _Ranges(self._others), output)


def _alike(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and x.is_contiguous() and x.dtype == other.dtype == torch.bfloat16


class _Ranges:
    """The address ranges of tensors, sorted; a tensor's number is its index."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        size_of = {_storage(x): x.untyped_storage().nbytes() for x in tensors}
        self.starts = sorted(start for start, size in size_of.items() if size)
        self.sizes = [size_of[start] for start in self.starts]

    def find(self, address: int) -> int | None:
        """The number of the tensor that contains this address, or None."""
        at = bisect.bisect_right(self.starts, address) - 1
        return at if at >= 0 and address < self.starts[at] + self.sizes[at] else None


class Program:
    """Calls whose intermediate tensors have places in one buffer. Tensors with overlapping lifetimes do not share a place."""

    def __init__(self, recorder: Recorder, made: _Ranges, others: _Ranges, output: Tensor) -> None:
        self._made, self._sizes, self._wide_sizes = made, recorder.sizes, recorder.wide_sizes
        calls = self._early(recorder.calls)
        self._most_inputs = recorder.most_inputs
        self.widen(max((sizes[COLUMNS] for sizes in recorder.wide_sizes), default=0))
        if any(others.find(at) is not None and made.find(at) is None for call in calls for at in call.addresses("rwu")):
            raise NotRecordedError("an operation that cannot be recorded")
        waits, stages = self._stages(calls)
        first, last = {}, {}
        for tensor in (x for module_call in recorder.module_calls for x in module_call.outputs):
            first[self._place_of(tensor)] = 0
        for call, stage in zip(calls, stages, strict=True):
            for number in self._tensors(call, "rwu"):
                first.setdefault(number, stage)
                last[number] = stage
        last[self._place_of(output)] = len(calls)
        self._lay_out(first, last)
        self._calls = (ctypes.c_int64 * (len(calls) * (2 + ARGUMENTS)))()
        self.count = len(calls)
        for index, (call, wait) in enumerate(zip(calls, waits, strict=True)):
            args = [arg if role in "nf" else self._moved(arg) for role, arg in zip(KINDS[call.kind], call.args, strict=True)]
            start = index * (2 + ARGUMENTS)
            self._calls[start : start + 2 + len(args)] = [_NUMBERS[call.kind], wait, *args]
        # The positions in `_calls` of each address outside of the buffer.
        self._positions: dict[int, list[int]] = {}
        for index, call in enumerate(calls):
            for place, (role, arg) in enumerate(zip(KINDS[call.kind], call.args, strict=True)):
                if role not in "nf" and arg and made.find(arg) is None:
                    self._positions.setdefault(arg, []).append(index * (2 + ARGUMENTS) + 2 + place)
        self.output = self._view(output)
        self.module_calls = [(call, [self._view(x) for x in call.outputs]) for call in recorder.module_calls]

    def _place_of(self, tensor: Tensor) -> int:
        number = self._made.find(tensor.data_ptr())
        if number is None or not tensor.is_contiguous():
            raise NotRecordedError("a tensor that no recorded call creates")
        return number

    def _tensors(self, call: _Call, roles: str) -> set[int]:
        """Numbers of the tensors that a call reads or writes."""
        return {number for at in call.addresses(roles) if (number := self._made.find(at)) is not None}

    def _early(self, calls: Sequence[_Call]) -> list[_Call]:
        """Move projections as early as their inputs allow, so that the threads wait once for all projections of an input."""
        ordered: list[_Call] = []
        for call in calls:
            at = len(ordered)
            if call.kind == "tile project":
                reads = self._tensors(call, "r")
                while at and not reads & self._tensors(ordered[at - 1], "wu"):
                    at -= 1
            ordered.insert(at, call)
        return ordered

    def _stages(self, calls: Sequence[_Call]) -> tuple[list[bool], list[int]]:
        """Whether each call waits for the calls before it, and the number of waits before each call (its stage)."""
        waits, stages, stage, read, written = [], [], 0, set[int](), set[int]()
        for call in calls:
            reads, writes = self._tensors(call, "ru"), self._tensors(call, "wu")
            waits.append(bool(reads & written or writes & (read | written)))
            if waits[-1]:
                stage, read, written = stage + 1, set(), set()
            read |= reads
            written |= writes
            stages.append(stage)
        return waits, stages

    def _lay_out(self, first: dict[int, int], last: dict[int, int]) -> None:
        """Assign each tensor a place that is free from its first stage to its last."""
        self._at: dict[int, int] = {}
        self.bytes = 0
        occupied: list[tuple[int, int, int]] = []
        for number in sorted(first, key=first.__getitem__):
            size, place = -(-self._made.sizes[number] // LINE) * LINE, 0
            occupied = [(start, end, until) for start, end, until in occupied if until >= first[number]]
            for start, end, _ in sorted(occupied):
                if place + size <= start:
                    break
                place = max(place, end)
            occupied.append((place, place + size, last.get(number, 0)))
            self._at[number] = place
            self.bytes = max(self.bytes, place + size)
        self._memory = torch.empty(self.bytes + LINE, dtype=torch.uint8)
        self._start = -self._memory.data_ptr() % LINE

    def _moved(self, address: int) -> int:
        number = self._made.find(address)
        if number is None:
            return address
        return self._memory.data_ptr() + self._start + self._at.get(number, 0) + address - self._made.starts[number]

    def _view(self, tensor: Tensor) -> Tensor:
        start = self._moved(tensor.data_ptr()) - self._memory.data_ptr()
        return self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def widen(self, columns: int) -> None:
        """Set the total number of adapter columns (`bindings.Slots`)."""
        for sizes in self._wide_sizes:
            sizes[COLUMNS] = columns
        # Bytes of a thread's buffer for the rows of a tile.
        self._room = 2 * DEEP * (self._most_inputs + columns)

    def positions(self, address: int) -> list[int]:
        """The positions of an address in the calls, for `patch`."""
        return self._positions.get(address, [])

    def patch(self, positions: Sequence[int], address: int) -> None:
        """Replace the addresses at these positions."""
        for position in positions:
            self._calls[position] = address

    def run(self) -> Tensor:
        """The output for the current contents of the inputs. The next run overwrites it."""
        for call, places in self.module_calls:
            for place, output in zip(places, call.rerun(), strict=True):
                place.copy_(output)
        bindings.run(self._calls, self.count, self._room)
        return self.output

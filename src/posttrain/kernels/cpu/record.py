"""One forward recorded as the compiled functions that it calls, and run again as one call.

A forward of one token calls some four hundred small functions from Python, which takes longer than what they compute. It is
recorded as it runs: every call of a compiled function (`bindings.py`), and of torch's own operations the sums and the
zeros; views leave no trace. Then its intermediate tensors get places in memory that is kept, and one team of threads runs the
list in C (`c/program.c`). What embeds tokens and makes the angles of rotations runs from Python each time.

A forward that does anything else with numbers is not recorded. `kernels/cpu/replay.py` says which forwards are.
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

# Bytes of a line of memory: places begin at one.
LINE = 64
# Where the numbers of a product (c/tiles.h) tell the columns of adapters.
COLUMNS = 4
# Arguments of a call in c/program.c.
ARGUMENTS = bindings.CALL - 2
# What a call does with each argument: it reads what lies at the address, writes it or both ("u"), or does not look; or the
# argument is a number, or a float. In the order of c/program.c.
KINDS = {
    "zero": "wn", "add": "rrnw", "rms_norm": "rrnnfw", "rotate": "rnnrrnnnnw", "gated": "rrnnw", "attend": "rrrruurrrfu",
    "multiply": "rrrnnnw", "project": "rrrrnnnw", "expand": "rrrrnnnnu", "tile blocks": "r-----rr----ww",
    "tile turn": "rr----r---w---", "tile project": "r---r-rr--rwrr", "tile multiply": "r-rr-rrr-wrrrr",
}  # fmt: skip
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_EMPTY = ("aten::empty.memory_format", "aten::new_empty", "aten::empty_like", "aten::new_empty_strided")


class NotRecordedError(Exception):
    """A forward that does what no program does; it is only slower."""


class Brought(NamedTuple):
    """What a module makes from the inputs in each step, from Python."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    def again(self) -> list[Tensor]:
        """Its outputs for what now lies in the inputs."""
        return _tensors(self.module(*self.args, **self.kwargs))


def _tensors(found: Any) -> list[Tensor]:
    """Those that lie in memory that can be named; the library's packed weights do not."""
    return [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.layout == torch.strided]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Call(NamedTuple):
    kind: str
    args: list[int]

    def addresses(self, roles: str) -> Iterator[int]:
        return (arg for role, arg in zip(KINDS[self.kind], self.args, strict=True) if role in roles and arg)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What one forward does, in order. Everything that it makes is kept, so that an address means one tensor."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        """`inputs` are what a step brings, and what later ones write over."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = {_storage(x) for x in inputs}
        # What no program does, where the forward did it.
        self._refused: str | None = None
        self.calls: list[_Call] = []
        self.brought: list[Brought] = []
        # Arrays of numbers that calls read.
        self.sizes: list[Any] = []
        # Those of products that add adapters, and the most inputs of a product by tiles.
        self.wide_sizes: list[Any] = []
        self.most_inputs = 0
        self._made: list[Tensor] = []
        self._others: list[Tensor] = []
        self._prepared: dict[tuple[str, tuple[int, ...]], dict[int, Tensor]] = {}
        self._inside = False

    @contextmanager
    def watching(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Record the calls of this thread; what these modules do is left to them."""
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
            stack.enter_context(bindings.noting(self._note))
            stack.enter_context(self)
            yield

    def _enter(self, *_: Any) -> None:
        self._inside = True

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        self._inside = False
        self.brought.append(Brought(module, args, kwargs, _tensors(found)))
        self._made += self.brought[-1].outputs
        # Numbers of others are only asked what they are like, as rotations do.
        if any(not x.is_floating_point() and _storage(x) not in self._inputs for x in _tensors((args, kwargs))):
            self._refused = f"{type(module).__name__} reads what is not brought"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One of torch's own operations."""
        found = function(*args, **(kwargs or {}))
        given, outputs = _tensors((args, kwargs)), _tensors(found)
        if self._inside:
            self._others += outputs
        elif function._schema.is_mutable:
            self._others += given
        elif not {_storage(x) for x in outputs} <= {_storage(x) for x in given}:
            self._operation(function.name(), given, args, kwargs or {}, outputs)
        return found

    def _operation(self, name: str, given: list[Tensor], args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        out = outputs[0]
        if name in _EMPTY or name == "aten::new_zeros":
            self._made.append(out)
            if name == "aten::new_zeros":
                self._add("zero", out.data_ptr(), out.nbytes)
        elif name == "aten::add.Tensor" and not kwargs and len(given) == 2 and all(_alike(x, out) for x in given):
            self._made.append(out)
            self._add("add", *(x.data_ptr() for x in given), out.numel(), out.data_ptr())
        else:
            self._others += outputs

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        """One call of a compiled function."""
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
        """A product in its parts; what one product needs prepared and another had already is not prepared again."""
        tokens, inputs, _, along, columns, rank, across, tiles = sizes
        if across or args[8]:
            self._refused = "a product as training has it"
            return
        self.most_inputs = max(self.most_inputs, inputs)
        x, order, slot = args[1], *args[6:8]
        # Of any number of slots: another step may have more (`Program.widen`).
        most = LANES * max(rank // DEEP, 1) if columns else 0
        own = [*args, 0, 0, 0, 0]
        if columns:
            self.wide_sizes.append(sizes)
        self._prepare("tile blocks", (order, slot, columns, rank, tokens), own, {12: 4 * tiles * most, 13: 8 * tiles})
        self._prepare("tile turn", (x, along, inputs, tokens, order), own, {10: 2 * tiles * inputs * LANES})
        if columns:
            self._prepare("tile project", (len(self.calls),), own, {11: 4 * tiles * most * LANES**2})
        self._add("tile multiply", *own)

    def _prepare(self, kind: str, key: tuple[int, ...], own: list[int], rooms: dict[int, int]) -> None:
        """Let these arguments be places of so many bytes that a call of this kind has filled."""
        new = (kind, key) not in self._prepared
        if new:
            self._prepared[kind, key] = {place: torch.empty(size, dtype=torch.uint8) for place, size in rooms.items()}
        for place, room in self._prepared[kind, key].items():
            own[place] = room.data_ptr()
        if new:
            self._add(kind, *own)

    def program(self, output: Tensor) -> "Program":
        """The list of calls, with the intermediate tensors in memory of its own. Raises NotRecordedError."""
        if self._refused is not None:
            raise NotRecordedError(self._refused)
        return Program(self, _Ranges(self._made), _Ranges(self._others), output)


def _alike(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and x.is_contiguous() and x.dtype == other.dtype == torch.bfloat16


class _Ranges:
    """Memory of tensors, by address."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        found = {_storage(x): x.untyped_storage().nbytes() for x in tensors}
        self.starts = sorted(start for start, size in found.items() if size)
        self.sizes = [found[start] for start in self.starts]

    def find(self, address: int) -> int | None:
        """The number of the tensor that this address lies in."""
        at = bisect.bisect_right(self.starts, address) - 1
        return at if at >= 0 and address < self.starts[at] + self.sizes[at] else None


class Program:
    """Calls whose intermediate tensors have places in `memory`. Those that live at the same time have different ones."""

    def __init__(self, recorder: Recorder, made: _Ranges, others: _Ranges, output: Tensor) -> None:
        self._made, self._sizes, self._wide_sizes = made, recorder.sizes, recorder.wide_sizes
        calls = self._early(recorder.calls)
        self._most_inputs = recorder.most_inputs
        self.widen(max((sizes[COLUMNS] for sizes in recorder.wide_sizes), default=0))
        if any(others.find(at) is not None and made.find(at) is None for call in calls for at in call.addresses("rwu")):
            raise NotRecordedError("an operation that no program has")
        waits, stages = self._stages(calls)
        first, last = {}, {}
        for tensor in (x for brought in recorder.brought for x in brought.outputs):
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
        # Where an address that is not one of these tensors stands among the calls.
        self._stands: dict[int, list[int]] = {}
        for index, call in enumerate(calls):
            for place, (role, arg) in enumerate(zip(KINDS[call.kind], call.args, strict=True)):
                if role not in "nf" and arg and made.find(arg) is None:
                    self._stands.setdefault(arg, []).append(index * (2 + ARGUMENTS) + 2 + place)
        self.output = self._view(output)
        self.brought = [(brought, [self._view(x) for x in brought.outputs]) for brought in recorder.brought]

    def _place_of(self, tensor: Tensor) -> int:
        number = self._made.find(tensor.data_ptr())
        if number is None or not tensor.is_contiguous():
            raise NotRecordedError("a tensor that no call makes")
        return number

    def _tensors(self, call: _Call, roles: str) -> set[int]:
        """Numbers of the tensors that a call reads or writes."""
        return {number for at in call.addresses(roles) if (number := self._made.find(at)) is not None}

    def _early(self, calls: Sequence[_Call]) -> list[_Call]:
        """Projections of all layers that read an input before the first product with it, so that threads wait once for them."""
        found: list[_Call] = []
        for call in calls:
            at = len(found)
            if call.kind == "tile project":
                reads = self._tensors(call, "r")
                while at and not reads & self._tensors(found[at - 1], "wu"):
                    at -= 1
            found.insert(at, call)
        return found

    def _stages(self, calls: Sequence[_Call]) -> tuple[list[bool], list[int]]:
        """Which calls wait for those before them, and after how many waits each comes."""
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
        """A place for each tensor from its first stage to its last."""
        self._at: dict[int, int] = {}
        self.bytes = 0
        held: list[tuple[int, int, int]] = []
        for number in sorted(first, key=first.__getitem__):
            size, place = -(-self._made.sizes[number] // LINE) * LINE, 0
            held = [(start, end, until) for start, end, until in held if until >= first[number]]
            for start, end, _ in sorted(held):
                if place + size <= start:
                    break
                place = max(place, end)
            held.append((place, place + size, last.get(number, 0)))
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
        """Let adapters have so many columns in all (`bindings.Slots`)."""
        for sizes in self._wide_sizes:
            sizes[COLUMNS] = columns
        # Bytes of rows that a thread copies for a tile.
        self._room = 2 * DEEP * (self._most_inputs + columns)

    def stands(self, address: int) -> list[int]:
        """Where this address, of what the forward did not make, stands among the calls."""
        return self._stands.get(address, [])

    def put(self, places: Sequence[int], address: int) -> None:
        """Let what stands at these places be another address."""
        for place in places:
            self._calls[place] = address

    def run(self) -> Tensor:
        """The output for what lies in the inputs, valid until the next run."""
        for brought, places in self.brought:
            for place, found in zip(places, brought.again(), strict=True):
                place.copy_(found)
        bindings.run(self._calls, self.count, self._room)
        return self.output

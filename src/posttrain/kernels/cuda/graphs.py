"""Forwards of few tokens recorded on a GPU and replayed: as one piece they cost what the GPU computes, not 2,000 launches.

A step is a function of tensors that has a form: shapes, and the tensors in memory that it reads and writes beside its inputs.
The first step of a form runs as it stands, which compiles and loads whatever it needs; the second is recorded; from then on
only its inputs are written over. A recorded step reads memory by address: whoever gives forms puts numbers in them that no
other tensors ever have (`models/cache.py`, `new_address`), so that one whose memory has gone is never asked for again.

Inside of a recorded step nothing may wait for the GPU or bring numbers to it. On a CPU every step runs as it stands.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Forms that are kept; the longest unused leave.
MOST = 64
# Rotations that look at the positions to choose their frequencies.
_WAITING_ROTATIONS = ("dynamic", "longrope")

Step = Callable[[Sequence[Tensor]], Tensor]


class _Recorded(NamedTuple):
    """A recorded step, the inputs that it reads and the output that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class _Ground(NamedTuple):
    """What all recordings of a device share: a stream, and one pool of memory for what their steps make on the way."""

    stream: torch.cuda.Stream
    pool: Any
    # A pool is given up with its last recording, and what it held comes back only when memory runs out: this one stays.
    anchor: torch.cuda.CUDAGraph


def replayable(config: dict[str, Any]) -> bool:
    """Whether a model's forward asks nothing of the GPU on its way, by its configuration; tokens sorted by expert do."""
    kinds = [config.get("rope_parameters"), config.get("rope_scaling"), *(config.get("rope_parameters") or {}).values()]
    rotations = {kind.get("rope_type") for kind in kinds if isinstance(kind, dict)}
    experts = any("expert" in name and isinstance(count, int) and count > 1 for name, count in config.items())
    return not experts and rotations.isdisjoint(_WAITING_ROTATIONS)


class Graphs:
    """Recorded steps by their form. They live as long as it does."""

    def __init__(self, device: torch.device, *, record: bool) -> None:
        self._device, self._record_them = device, record and device.type == "cuda"
        # Forms that came once have nothing recorded yet.
        self._kept: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        # Steps that were replayed.
        self.replayed = 0

    @property
    def forms(self) -> Set[Hashable]:
        """Those that are known."""
        return self._kept.keys()

    def forget(self, stale: Callable[[Any], bool]) -> None:
        """Let go of forms that cannot come again."""
        for form in [form for form in self._kept if stale(form)]:
            del self._kept[form]

    def run(self, form: Hashable, inputs: Sequence[Tensor], step: Step) -> Tensor:
        """What `step` gives for these inputs, which may lie anywhere. It stands until the next run."""
        new = form not in self._kept
        recorded = self._kept.setdefault(form, None)
        self._kept.move_to_end(form)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        if not self._record_them:
            return step([x.to(self._device) for x in inputs])
        if new:
            return self._beside([x.to(self._device) for x in inputs], step)
        if recorded is None:
            try:
                recorded = self._kept[form] = self._record(inputs, step)
            except RuntimeError:  # a model that does what cannot be recorded; it is only slower
                self._record_them = False
                return step([x.to(self._device) for x in inputs])
        for held, given in zip(recorded.inputs, inputs, strict=True):
            held.copy_(given)
        recorded.graph.replay()
        self.replayed += 1
        return recorded.output

    def _beside(self, inputs: Sequence[Tensor], step: Step) -> Tensor:
        """Run a step on the stream that records: what the libraries keep for a stream is there before anything is recorded."""
        stream, current = _ground(self._device).stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = step(inputs)
        current.wait_stream(stream)
        return output

    def _record(self, inputs: Sequence[Tensor], step: Step) -> _Recorded:
        """Record a step without running it."""
        ground, graph = _ground(self._device), torch.cuda.CUDAGraph()
        held = tuple(torch.empty_like(x, device=self._device) for x in inputs)
        torch.cuda.current_stream(self._device).synchronize()
        with torch.cuda.stream(ground.stream):
            # Other threads go on: a server reads adapters meanwhile.
            graph.capture_begin(pool=ground.pool, capture_error_mode="thread_local")
            try:
                output = step(held)
            finally:
                graph.capture_end()
        return _Recorded(graph, held, output)


@functools.cache
@torch.inference_mode(False)  # what torch keeps for its random numbers then belongs to everybody
def _ground(device: torch.device) -> _Ground:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool, anchor = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        anchor.capture_begin(pool=pool, capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        anchor.capture_end()
    return _Ground(stream, pool, anchor)

"""CUDA graphs of forwards of few tokens: a replay is one launch instead of about 2,000.

A step is a function of tensors with a form: shapes, and the other tensors in memory that it reads and writes. The first step
of a form runs directly, which compiles and loads everything it needs. The second is recorded. Later steps only overwrite its
inputs and replay it. A recorded step reads memory by address, so a form must contain unique numbers of its tensors
(`models/cache.py`, `new_address`): then a form whose memory was freed never occurs again.

A recorded step must not synchronise with the GPU or copy data to it. On a CPU every step runs directly.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Upper limit of cached forms; the least recently used are evicted.
MOST = 64
# Rotations that choose their frequencies by the positions, which synchronises with the GPU.
_WAITING_ROTATIONS = ("dynamic", "longrope")

Step = Callable[[Sequence[Tensor]], Tensor]


class _Recorded(NamedTuple):
    """A recorded step, the inputs that it reads and the output that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class _CaptureResources(NamedTuple):
    """A stream and a memory pool for intermediate tensors, shared by all recordings of a device."""

    stream: torch.cuda.Stream
    pool: Any
    # Keeps the pool alive: a pool without recordings is released, and its memory returns only when memory runs out.
    anchor: torch.cuda.CUDAGraph


def replayable(config: dict[str, Any]) -> bool:
    """Whether a model's forward runs without synchronising with the GPU, by its configuration. Sorting tokens by expert
    synchronises."""
    kinds = [config.get("rope_parameters"), config.get("rope_scaling"), *(config.get("rope_parameters") or {}).values()]
    rotations = {kind.get("rope_type") for kind in kinds if isinstance(kind, dict)}
    experts = any("expert" in name and isinstance(count, int) and count > 1 for name, count in config.items())
    return not experts and rotations.isdisjoint(_WAITING_ROTATIONS)


class Graphs:
    """Recorded steps by form, for the lifetime of this object."""

    def __init__(self, device: torch.device, *, record: bool) -> None:
        self._device, self._record_them = device, record and device.type == "cuda"
        # None for a form that occurred once and is not recorded yet.
        self._steps: OrderedDict[Hashable, _Recorded | None] = OrderedDict()
        # Number of replayed steps.
        self.replayed = 0

    @property
    def forms(self) -> Set[Hashable]:
        """The known forms."""
        return self._steps.keys()

    def forget(self, stale: Callable[[Any], bool]) -> None:
        """Delete forms that cannot occur again."""
        for form in [form for form in self._steps if stale(form)]:
            del self._steps[form]

    def run(self, form: Hashable, inputs: Sequence[Tensor], step: Step) -> Tensor:
        """The output of `step` for these inputs, which may be on any device. The next run may overwrite it."""
        new = form not in self._steps
        recorded = self._steps.setdefault(form, None)
        self._steps.move_to_end(form)
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        if not self._record_them:
            return step([x.to(self._device) for x in inputs])
        if new:
            return self._run_on_capture_stream([x.to(self._device) for x in inputs], step)
        if recorded is None:
            try:
                recorded = self._steps[form] = self._record(inputs, step)
            except RuntimeError:  # the model does something that cannot be recorded; its steps run directly, slower
                self._record_them = False
                return step([x.to(self._device) for x in inputs])
        for recorded_input, new_input in zip(recorded.inputs, inputs, strict=True):
            recorded_input.copy_(new_input)
        recorded.graph.replay()
        self.replayed += 1
        return recorded.output

    def _run_on_capture_stream(self, inputs: Sequence[Tensor], step: Step) -> Tensor:
        """Run a step on the stream of the recordings, so that libraries allocate their buffers for it before a recording."""
        stream, current = _capture_resources(self._device).stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = step(inputs)
        current.wait_stream(stream)
        return output

    def _record(self, inputs: Sequence[Tensor], step: Step) -> _Recorded:
        """Record a step without running it."""
        resources, graph = _capture_resources(self._device), torch.cuda.CUDAGraph()
        recorded_inputs = tuple(torch.empty_like(x, device=self._device) for x in inputs)
        torch.cuda.current_stream(self._device).synchronize()
        with torch.cuda.stream(resources.stream):
            # "thread_local" lets other threads use the GPU meanwhile: a server loads adapters.
            graph.capture_begin(pool=resources.pool, capture_error_mode="thread_local")
            try:
                output = step(recorded_inputs)
            finally:
                graph.capture_end()
        return _Recorded(graph, recorded_inputs, output)


@functools.cache
@torch.inference_mode(False)  # so that torch's random state for graphs is not an inference tensor
def _capture_resources(device: torch.device) -> _CaptureResources:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    pool, anchor = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        anchor.capture_begin(pool=pool, capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        anchor.capture_end()
    return _CaptureResources(stream, pool, anchor)

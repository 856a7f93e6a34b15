"""The objects that `kernels/__init__.py` hands out and takes: what each must offer, whoever implements it.

T: tokens, n: slots, R: rank, C: columns of several layers' or slots' A.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from posttrain.kernels.head_rows import HeadRows
from posttrain.kernels.reference_head import HeadSlopes, HeadValues
from posttrain.kernels.segments import DecodingSegments, Extras, Reading, SegmentTable

# A forward of the model: token ids [T], positions [T] and its segments to last hidden states [T, D].
Forward = Callable[[Tensor, Tensor, Any], Tensor]
# Logits [R, V], of each row (a number in [0, 1), temperature or 0 for the likeliest, whether log-probabilities are wanted) and
# the tokens that it goes without, to (token, its log-probability under softmax(z / temperature) of the others, the one under
# softmax(z), whether the logits are finite).
Choose = Callable[
    [Tensor, Sequence[tuple[float, float, bool]], Sequence[Sequence[int]]], list[tuple[float, float, float, float]]
]


class EngineLinear(Protocol):
    """Products with weights that stay as they are while an engine lives."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., T, inputs], weight [outputs, inputs] -> [..., T, outputs]. A weight of another type is narrowed each time."""

    def logits(self, x_RD: Tensor, head_VD: Tensor) -> Tensor:
        """Logits [R, V], valid until the next ones."""


class Stack(NamedTuple):
    """One layer's A [n, R, inputs] and s B [n, outputs, R] of all slots."""

    a: Tensor
    b: Tensor
    # The memory of both, where all tokens are multiplied with it: [C, inputs] and [outputs, C]. Its numbers must be finite.
    wide: tuple[Tensor, Tensor] | None = None


class TokenRuns(NamedTuple):
    """The slots of one batch: runs of (tokens, slot or -1 for the base) in order; of slots how many there are, and those
    whose adapters the caller adds by itself where a layer's stack is wide."""

    runs: Sequence[tuple[int, int]]
    slots: int
    apart: frozenset[int]


class AdapterSlots(Protocol):
    """What products with the adapters of slots read of them."""

    # Products with the base's weights.
    product: EngineLinear
    # Columns of a slot.
    rank: int
    # Another number where the tensors are others.
    address: int

    @property
    def form(self) -> Hashable | None:
        """What the slots are but for their numbers, where every layer's stack is wide; else None."""

    def readers(self, first: str) -> tuple[list[str], Tensor]:
        """Layers that read what this one is the first to read, itself among them, and their A [n, layers x R, inputs]."""

    def join(self, first: str, layer: str) -> None:
        """Put the A of `layer` beside those of the layers that read what `first` reads."""

    def wide(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The matrices of the layers whose stack is wide."""


class TokenProducts(Protocol):
    """Products of one batch whose tokens have the adapters of different slots."""

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack) -> Tensor:
        """W x + b + s B A x [1, T, outputs] of x [1, T, inputs], each token with the adapter of its slot."""

    @property
    def form(self) -> Hashable | None:
        """What a recorded step depends on beside `numbers`; None for one that cannot be recorded."""

    @property
    def numbers(self) -> list[Tensor]:
        """What says which adapter each token has."""


class SlotLayout(Protocol):
    """How the slots of an engine lie in memory, and are multiplied with."""

    def rank(self, rank: int) -> int:
        """Columns of a slot for adapters of this rank."""

    def columns(self, columns: int) -> int:
        """Columns in memory for so many columns of slots."""

    def new_stack(self, slots: int, rank: int, a: Tensor, b: Tensor) -> Stack:
        """Zeros for a layer with matrices like these."""

    def write(self, slot: int, stacks: Mapping[str, Stack], weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> bool:
        """Copy A and s B of an adapter into a slot of all layers, with zeros where it has none. False where a number is not
        finite: then wide stacks got zeros."""

    def tokens(self, runs: TokenRuns, slots: AdapterSlots) -> TokenProducts:
        """The products of one batch."""


class StepTokens(Protocol):
    """What a recorded step reads of the adapters of its tokens."""

    @property
    def form(self) -> Hashable | None:
        """What a recorded step depends on beside `numbers`; None for one that cannot be recorded."""

    @property
    def numbers(self) -> list[Tensor]:
        """What says which adapter each token has."""

    @property
    def slots(self) -> AdapterSlots:
        """The slots that the adapters are in."""


class Replay(Protocol):
    """The forwards of one base, of which decoding steps may be recorded and run again as one call."""

    # Whether new steps are recorded, and recorded ones run.
    recording: bool
    # Steps that ran as recorded.
    replayed: int

    @property
    def wants_decoding_alone(self) -> bool:
        """Whether steps of many rows are recorded, so that prompts should have a forward of their own."""

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments: DecodingSegments, tokens: StepTokens) -> Tensor:
        """Last hidden states [T, D], valid until the next ones."""


class Backend(Protocol):
    """One implementation of every operation, `reference.py`, `cpu` or `cuda`; `kernels/__init__.py` says what each computes."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, offset: float, scale_D: Tensor, eps: float) -> Tensor: ...

    def rotate(self, x_HTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor: ...

    def gated(self, gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor: ...

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor: ...

    def lora_linear(
        self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor: ...

    def segment_attention(
        self, q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segments: SegmentTable, *, scale: float, extra: Extras
    ) -> Tensor: ...

    def cache_attention(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, readings: Sequence[Reading], rows: int, *, scale: float,
        extra: Extras,
    ) -> Tensor: ...  # fmt: skip

    def head_values(
        self, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
    ) -> HeadValues: ...

    def head_slopes(
        self, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
    ) -> HeadSlopes: ...

    def logit_gradient(self, logits_NV: Tensor, total_N: Tensor, target_N: Tensor, grad_N: Tensor) -> Tensor: ...

    def token_chooser(self, logits_RV: Tensor) -> Choose | None: ...

    def engine_linear(self, dtype: torch.dtype, device: torch.device, *, serving: bool) -> EngineLinear: ...

    def slot_layout(self, dtype: torch.dtype, device: torch.device, *, serving: bool) -> SlotLayout: ...

    def replay(self, model: nn.Module, forward: Forward) -> Replay: ...

    def attends_by_row(self, dtype: torch.dtype, device: torch.device) -> bool: ...

    def packed_bytes(self, weight_OI: Tensor, dtype: torch.dtype, device: torch.device) -> int: ...

    def advice(self, dtype: torch.dtype, device: torch.device) -> str | None: ...

"""Protocols and types of the objects that `kernels/__init__.py` returns and accepts.

T: tokens, n: slots, R: rank, C: columns of several layers' or slots' A.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from posttrain.kernels.head_rows import HeadRows
from posttrain.kernels.reference_head import HeadSlopes, HeadValues
from posttrain.kernels.segments import DecodingSegments, Extras, Reading, SegmentTable

# A forward of the model: (token ids [T], positions [T], segments) -> last hidden states [T, D].
Forward = Callable[[Tensor, Tensor, Any], Tensor]
# Chooses one token per row. Arguments: logits [R, V]; per row (a uniform number in [0, 1), temperature or 0 for greedy, whether
# to compute log-probabilities); per row the excluded tokens. Result per row: (token, its log-probability under
# softmax(z / temperature) over the tokens that are not excluded, its log-probability under softmax(z), whether the logits are
# finite).
Choose = Callable[
    [Tensor, Sequence[tuple[float, float, bool]], Sequence[Sequence[int]]], list[tuple[float, float, float, float]]
]


class EngineLinear(Protocol):
    """Products with weights that do not change during an engine's lifetime."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., T, inputs], weight [outputs, inputs] -> [..., T, outputs]. A weight of another dtype is cast in each call."""

    def logits(self, x_RD: Tensor, head_VD: Tensor) -> Tensor:
        """Logits [R, V]. The next call may overwrite them."""


class Stack(NamedTuple):
    """One layer's A [n, R, inputs] and s B [n, outputs, R] of all slots."""

    a: Tensor
    b: Tensor
    # The memory of both as [C, inputs] and [outputs, C], if one product covers the slots of all tokens. It must be finite.
    wide: tuple[Tensor, Tensor] | None = None


class TokenRuns(NamedTuple):
    """The slots of one batch's tokens: runs of (number of tokens, slot or -1 for the base) in order, the number of slots, and
    the slots of non-finite adapters, whose products the caller adds if a layer's stack is wide."""

    runs: Sequence[tuple[int, int]]
    slots: int
    unstacked: frozenset[int]


class AdapterSlots(Protocol):
    """The slots of an engine's adapters, as products read them."""

    # Products with the base's weights.
    product: EngineLinear
    # Columns of a slot.
    rank: int
    # Changes whenever the tensors are replaced.
    address: int

    @property
    def form(self) -> Hashable | None:
        """The rank and the layers of the slots if every layer's stack is wide; otherwise None."""

    def readers(self, first: str) -> tuple[list[str], Tensor]:
        """The layers that read the same input as `first`, itself included, and their concatenated A [n, layers x R, inputs]."""

    def join(self, first: str, layer: str) -> None:
        """Concatenate the A of `layer` with those of the layers that read the same input as `first`."""

    def wide(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The matrices of the layers whose stack is wide."""


class StepKey(Protocol):
    """The part of a recorded step that depends on the adapters of its tokens."""

    @property
    def form(self) -> Hashable | None:
        """The key of a recorded step, apart from `numbers`; None for a step that cannot be recorded."""

    @property
    def numbers(self) -> list[Tensor]:
        """The tensors that assign an adapter to each token."""


class TokenProducts(StepKey, Protocol):
    """Products of one batch whose tokens have the adapters of different slots."""

    def apply(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None, stack: Stack) -> Tensor:
        """W x + b + s B A x [1, T, outputs] of x [1, T, inputs], each token with the adapter of its slot."""


class SlotLayout(Protocol):
    """The memory layout of an engine's slots, and the products that use it."""

    def rank(self, rank: int) -> int:
        """Columns of a slot for adapters of this rank."""

    def columns(self, columns: int) -> int:
        """Allocated columns for this number of slot columns."""

    def new_stack(self, slots: int, rank: int, a: Tensor, b: Tensor) -> Stack:
        """A stack of zeros for a layer whose matrices have the shapes of `a` and `b`."""

    def write(self, slot: int, stacks: Mapping[str, Stack], weights: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> bool:
        """Copy A and s B of an adapter into its slot of all layers; layers that it does not cover get zeros. Returns False if a
        number is not finite: wide stacks then hold zeros."""

    def tokens(self, runs: TokenRuns, slots: AdapterSlots) -> TokenProducts:
        """The products of one batch."""


class StepTokens(StepKey, Protocol):
    """The adapters of a recorded step's tokens."""

    @property
    def slots(self) -> AdapterSlots:
        """The slots of the adapters."""


class Replay(Protocol):
    """The forwards of one base. Decoding steps may be recorded and replayed as one call."""

    # Whether new steps are recorded, and recorded steps replayed.
    recording: bool
    # Number of replayed steps.
    replayed: int

    @property
    def wants_decoding_alone(self) -> bool:
        """Whether steps of many rows are recorded, so that prompts should run in a separate forward."""

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments: DecodingSegments, tokens: StepTokens) -> Tensor:
        """Last hidden states [T, D]. The next call may overwrite them."""


class Backend(Protocol):
    """One implementation of every operation: `reference.py`, `cpu` or `cuda`. `kernels/__init__.py` defines the operations."""

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

"""Products with the weights of linear layers.

On processors with matrix tiles (AMX), the summation order of a library (oneDNN) product depends on the number of tokens.
There training and decoding use our own products (`c/tiles.c`), whose summation order is fixed. On other processors the
library's order is fixed too.

A decoding step uses each weight for a few tokens only. Our products read the weight in its original layout. The library would
reorder it in every call, a third of a step's time, so an engine keeps a packed copy for it, as large as the weights. A server
with one or two tokens uses compiled products without a packed copy (`kernels/cpu/bindings.py`).

T: tokens, R: rank, C: columns of the slots of adapters.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels import reference
from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.autograd import Product
from posttrain.kernels.interfaces import EngineLinear

# With more tokens, an unpacked product is as fast as a packed one.
MOST_TOKENS = 512


def tiled(x: Tensor, weight: Tensor) -> bool:
    """Whether our own products compute W x: bfloat16 on a CPU with matrix tiles, and inputs that fill them."""
    return x.dtype == weight.dtype and weight.is_contiguous() and tileable(weight.shape[1], x.dtype, x.device)


def tileable(inputs: int, dtype: torch.dtype, device: torch.device) -> bool:
    """The same condition for a weight that is not loaded yet."""
    return dtype == torch.bfloat16 and device.type == "cpu" and inputs % bindings.DEEP == 0 and bindings.tiles()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., inputs], weight [outputs, inputs] -> [..., outputs], differentiable."""
    if not tiled(x, weight):
        return functional.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return bindings.products(x.reshape(-1, x.shape[-1]), weight, bias)[0].view(*x.shape[:-1], -1)
    return Product.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def adapted(x_TI: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """W x + bias + scale B A x [T, outputs], and A x [T, R], in the type of x; a [R, inputs], b [outputs, R], float32."""
    rank = len(a)
    if tiled(x_TI, weight):
        columns = -(-rank // bindings.DEEP) * bindings.DEEP
        wide_a, wide_b = x_TI.new_zeros(columns, a.shape[1]), x_TI.new_zeros(len(b), columns)
        wide_a[:rank], wide_b[:, :rank] = a, b * scale
        y, p_TC = bindings.products(x_TI, weight, bias, bindings.Slots(wide_a, wide_b, columns), projected=True)
        assert p_TC is not None
        return y, p_TC[:, :rank].contiguous()
    return reference.adapted(x_TI, weight, bias, a, b, scale)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W x + bias + scale B A x [..., outputs], differentiable in x, A and B."""
    y: Tensor = reference.LoraProduct.apply(x, weight, bias, a, b, scale, adapted)  # type: ignore[no-untyped-call]
    return y


class EngineProducts:
    """Products with weights that do not change, for an engine."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, serving: bool = False) -> None:
        """`serving` selects the fastest product for few rows, whose last bits differ from those of many rows."""
        self._serving = serving
        self._packs = _packing(dtype, device)
        # By id of the weight: the weight, its version and the packed copy. The reference to the weight keeps the id unique.
        self._packed: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._logits_buffer: Tensor | None = None

    def logits(self, x_RD: Tensor, head_VD: Tensor) -> Tensor:
        """Logits [R, V]. The next call may overwrite them: our products write to a reused buffer, because allocating memory of
        this size takes half as long as the product."""
        if not tiled(x_RD, head_VD):
            return self(x_RD, head_VD)
        size = len(x_RD) * len(head_VD)
        if self._logits_buffer is None or len(self._logits_buffer) < size:
            self._logits_buffer = x_RD.new_empty(size)
        return bindings.products(x_RD, head_VD, None, into=self._logits_buffer[:size].view(len(x_RD), -1))[0]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., T, inputs], weight [outputs, inputs] -> [..., T, outputs]. A weight of another dtype is cast in each call."""
        if tiled(x, weight):
            return linear(x, weight, bias)
        if not self._packs or x.shape[-2] > MOST_TOKENS or weight.dtype != x.dtype:
            return functional.linear(x, weight.to(x.dtype), bias)
        if self._serving and x.numel() <= bindings.FEW_ROWS * x.shape[-1] and weight.is_contiguous() and bindings.able(x):
            return bindings.multiply(x, weight, bias)
        entry = self._packed.get(id(weight))
        if entry is None or entry[1] != weight._version:
            # Packed at its first use.
            entry = weight, weight._version, torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self._packed[id(weight)] = entry
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, entry[2], bias, "none", [], "")
        return y


def packs(inputs: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether engines with this dtype keep a packed copy of a weight."""
    return _packing(dtype, device) and not tileable(inputs, dtype, device)


def engine_linear(dtype: torch.dtype, device: torch.device, *, serving: bool) -> EngineLinear:
    """The products of an engine's forwards."""
    return EngineProducts(dtype, device, serving=serving)


def packed_bytes(weight: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the packed copy of a weight."""
    return weight.numel() * dtype.itemsize if packs(weight.shape[1], dtype, device) else 0


def _packing(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and _packing_works()


@functools.cache
def _packing_works() -> bool:
    """Whether this build of torch has the operations, and this processor supports bfloat16 products."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x, weight = torch.ones(2, 32, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    except (AttributeError, RuntimeError):
        return False

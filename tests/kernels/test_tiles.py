"""Products by matrix tiles against float64, and to the bit against themselves with other tokens beside."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu import linear as cpu_linear
from posttrain.kernels.cpu.linear import linear
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.models.token_adapters import TokenAdapters

pytestmark = pytest.mark.skipif(not bindings.tiles(), reason="this processor has no matrix tiles (AMX)")
SHAPES = [(32, 33), (64, 64), (96, 1), (576, 50), (640, 320)]  # inputs, outputs
# Half of the last place of bfloat16, and sums of float32.
CLOSE = {"rtol": 2**-8 * 1.01, "atol": 1e-3}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3).bfloat16()


def in_tiles(slot_T: Tensor) -> Tensor:
    order = slot_T.argsort(stable=True).int()
    return torch.cat([order, torch.full((-len(order) % bindings.LANES,), -1, dtype=torch.int32)])


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_products(inputs: int, outputs: int) -> None:
    """Any count of tokens, wherever they stand, gives each the bits that 600 give it: more than one pass of both threads."""
    x, w, bias = numbers(600, inputs), numbers(outputs, inputs, seed=1), numbers(outputs, seed=2)
    whole, none = bindings.products(x, w, bias)
    assert none is None
    torch.testing.assert_close(whole.double(), x.double() @ w.double().T + bias.double(), **CLOSE)
    plain, _ = bindings.products(x, w, None)
    torch.testing.assert_close(plain.double(), x.double() @ w.double().T, **CLOSE)
    for count in (1, 2, 15, 16, 17, 31, 33, 100, 599):
        for start in (0, 600 - count):
            part = x[start : start + count]
            assert torch.equal(bindings.products(part, w, bias)[0], whole[start : start + count])
            turned = numbers(outputs, -(-count // 16) * 16)
            bindings.turned_products(part, w, turned)
            assert torch.equal(turned[:, :count].T, plain[start : start + count])
            assert not turned[:, count:].any()
    assert bindings.products(x[:0], w, bias)[0].shape == (0, outputs)
    wide = numbers(600, 3 * inputs)
    wide[:, inputs : 2 * inputs] = x
    assert torch.equal(bindings.products(wide[:, inputs : 2 * inputs], w, bias)[0], whole)


@pytest.mark.parametrize(("count", "rank"), [(1, 16), (5, 8), (16, 16), (3, 64), (4, 32), (20, 2)])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_adapters_side_by_side(inputs: int, outputs: int, count: int, rank: int) -> None:
    """Each token gets from its slot what it would get if there were no other, in any order of the tokens."""
    columns = -(-count * rank // bindings.DEEP) * bindings.DEEP
    x, w = numbers(300, inputs), numbers(outputs, inputs, seed=1)
    a, b = numbers(columns, inputs, seed=2), numbers(outputs, columns, seed=3)
    slot = torch.randint(-1, count, (300,), generator=torch.Generator().manual_seed(4)).int()
    y, p = bindings.products(x, w, None, bindings.Slots(a, b, rank, slot, in_tiles(slot)), projected=True)
    for order in (None, torch.randperm(304, generator=torch.Generator().manual_seed(5)).int()):
        if order is not None:
            order[order >= 300] = -1
        again, p_again = bindings.products(x, w, None, bindings.Slots(a, b, rank, slot, order), projected=True)
        assert torch.equal(again, y)
        assert p is not None
        assert p_again is not None
        assert torch.equal(p_again, p)
    base = bindings.products(x, w, None)[0]
    assert torch.equal(y[slot < 0], base[slot < 0])
    for s in range(count):
        own, at = slot == s, slice(s * rank, (s + 1) * rank)
        wide_a, wide_b = (
            torch.zeros(-(-rank // 32) * 32, inputs).bfloat16(),
            torch.zeros(outputs, -(-rank // 32) * 32).bfloat16(),
        )
        wide_a[:rank], wide_b[:, :rank] = a[at], b[:, at]
        alone, p_alone = bindings.products(x[own], w, None, bindings.Slots(wide_a, wide_b, len(wide_a)), projected=True)
        assert p_alone is not None
        assert torch.equal(alone, y[own])
        assert torch.equal(p_alone[:, :rank], p[own][:, at])
        assert not p[~own][:, at].any()
        torch.testing.assert_close(p_alone[:, :rank].double(), x[own].double() @ a[at].double().T, **CLOSE)
        wanted = x[own].double() @ w.double().T + p[own][:, at].double() @ b[:, at].double().T
        torch.testing.assert_close(alone.double(), wanted, **CLOSE)


def test_what_is_no_number_stays_with_its_token() -> None:
    x, w = numbers(40, 64), numbers(64, 64, seed=1)
    a, b = numbers(32, 64, seed=2), numbers(64, 32, seed=3)
    slot = (torch.arange(40) % 2).int()
    slots = bindings.Slots(a, b, 16, slot, in_tiles(slot))
    wanted, _ = bindings.products(x, w, None, slots)
    x[7, 3], x[20, 5] = math.nan, math.inf
    found, _ = bindings.products(x, w, None, slots)
    whole = [t for t in range(40) if t not in (7, 20)]
    assert torch.equal(found[whole], wanted[whole])
    assert not found[[7, 20]].isfinite().any()


def test_gradients() -> None:
    """Of a weight, a bias and an input that are all trained, against float64."""
    x, w, bias = (numbers(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(3, 7, 64), (96, 64), (96,)]))
    grad = numbers(3, 7, 96, seed=5)
    linear(x, w, bias).backward(grad)  # type: ignore[no-untyped-call]
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, w, bias)]
    torch.nn.functional.linear(*wide).backward(grad.double())  # type: ignore[no-untyped-call]
    for found, wanted in zip((x, w, bias), wide, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=2**-7, atol=2e-2)


def ready(base: BaseModel, name: str, seed: int, targets: str | tuple[str, ...], rank: int) -> LoraAdapter:
    adapter = base.adapters.create(name, LoraSettings(rank, 2.0 * rank, 0.0, targets, "standard"), seed=seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return adapter


@torch.no_grad()
def test_layers_that_fill_no_tiles_are_computed_beside_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 128 inputs were no multiple of 32: those layers are the library's, grouped by slot, in the same engine."""
    able = cpu_linear.tileable
    monkeypatch.setattr(cpu_linear, "tileable", lambda inputs, *kind: inputs != 128 and able(inputs, *kind))
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    there = [ready(base, "a", 1, "all", 16), ready(base, "b", 2, "all", 3), None]
    kept = NarrowAdapters(torch.bfloat16, base.device)
    tokens = TokenAdapters([(1, there[k % 3]) for k in range(40)], kept, base.device)
    kinds = set()
    for name, layer in base.model.named_modules():
        if type(layer).__name__ != "LoraLinear":
            continue
        x = numbers(1, 40, layer.in_features)
        found, stack = tokens.apply(layer.name, x, layer.weight, None), kept.stack(layer.name)
        assert stack is not None
        kinds.add(stack.wide is None)
        for k in range(40):
            adapter = there[k % 3]
            with base.adapters.use("base" if adapter is None else adapter.name):
                torch.testing.assert_close(found[:, k], layer(x[:, k]), rtol=2**-6, atol=2e-2, msg=name)
    assert kinds == {False, True}


@torch.no_grad()
@pytest.mark.parametrize("broken", [False, True])
def test_an_engine_computes_as_training_does(broken: bool) -> None:
    """Layers of adapters of other ranks and targets, and of the base, mixed in a batch; and beside one that is not finite."""
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    there = [ready(base, "a", 1, "all", 16), ready(base, "b", 2, "mlp", 5), ready(base, "c", 3, ("q_proj", "v_proj"), 40), None]
    if broken:
        bad = ready(base, "bad", 4, "all", 8)
        for _, b in bad.weights.values():
            b[0], b[1] = math.inf, math.nan
        there.append(bad)
    kept = NarrowAdapters(torch.bfloat16, base.device)
    runs = [(1, there[k % len(there)]) for k in range(30)] + [(50, there[0]), (3, None), (40, there[2])]
    tokens = sum(count for count, _ in runs)
    for name, layer in base.model.named_modules():
        if type(layer).__name__ != "LoraLinear":
            continue
        x = numbers(1, tokens, layer.in_features)
        found, start = TokenAdapters(runs, kept, base.device).apply(layer.name, x, layer.weight, None), 0
        for count, adapter in runs:
            rows, start = slice(start, start + count), start + count
            with base.adapters.use("base" if adapter is None else adapter.name):
                alone = layer(x[:, rows])
            if adapter is not None and adapter.name == "bad":
                assert not found[:, rows, :2].isfinite().any(), name
                torch.testing.assert_close(found[:, rows, 2:], alone[:, :, 2:], rtol=2**-6, atol=2e-2)
            else:
                assert torch.equal(found[:, rows], alone), name

"""Slots of adapters in one batch: after any coming and going each holds its adapter's matrices and nothing of another."""

import random

import torch

from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter, LoraSettings


def adapters(base: BaseModel) -> list[LoraAdapter]:
    """Of several ranks and layers, with nothing at zero."""
    found = []
    for i in range(12):
        settings = LoraSettings((2, 4, 8)[i % 3], 8.0, 0.0, ("all", "attention", "mlp")[i % 3], "standard")
        adapter = base.adapters.create(f"a{i}", settings, seed=i)
        base.adapters.remove(f"a{i}")
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.normal_()
        found.append(adapter)
    return found


def wrong_slots(kept: NarrowAdapters, needed: list[LoraAdapter]) -> int:
    """Of the adapters needed, how many have no slot, or one with other matrices."""
    wrong = 0
    for adapter in needed:
        if adapter not in kept.slots:
            wrong += 1
            continue
        slot = kept.slots.index(adapter)
        layers = {layer for layer in adapter.weights if kept.stack(layer) is not None}
        same = layers == set(adapter.weights)
        for layer, stack in kept._stacks.items():
            product = stack.b[slot] @ stack.a[slot]
            pair = adapter.weights.get(layer)
            wanted = torch.zeros_like(product) if pair is None else adapter.settings.scale * (pair[1] @ pair[0])
            same &= torch.allclose(product, wanted, atol=1e-6)
        wrong += not same
    return wrong


@torch.no_grad()
def test_every_adapter_that_is_needed_has_its_slot(tiny: BaseModel):
    there = adapters(tiny)
    kept = NarrowAdapters(torch.float32, tiny.device)
    chance = random.Random(0)
    wrong = 0
    for turn in range(60):
        needed = chance.sample(there, chance.randrange(len(there) + 1))
        kept.hold(needed)
        for layer in [name for name in kept._stacks if name.endswith(("k_proj", "v_proj"))]:  # as the first forward finds
            first = f"{layer[:-6]}q_proj"
            if layer not in kept.readers(first)[0]:
                kept.join(first, layer)
        wrong += wrong_slots(kept, needed)
        if needed and turn % 5 == 0:  # one that was trained in the meantime
            next(iter(needed[0].weights.values()))[1].add_(1.0)
    assert f"{wrong} wrong of 60 turns" == "0 wrong of 60 turns"


def test_slots_follow_what_is_needed(tiny: BaseModel):
    """They open for more than come one by one, and close where few are left in flight, but not in a forward of few."""
    there = adapters(tiny)
    kept = NarrowAdapters(torch.float32, tiny.device)
    counts = []
    for needed in (1, 2, 8, 9, 10, 4, 3, 0, 1):
        kept.settle(there[:needed])
        counts.append(len(kept.slots))
        kept.hold(there[:1])
        assert len(kept.slots) == counts[-1]
        assert wrong_slots(kept, there[:needed]) == 0
    assert counts == [1, 2, 8, 12, 12, 12, 12, 12, 1]


@torch.no_grad()
def test_nothing_is_left_of_weights_that_were_not_finite(tiny: BaseModel):
    """Neither under an adapter of lower rank that has their slot next, nor where all slots are multiplied."""
    one, _, broken, next_one = adapters(tiny)[:4]
    for a, b in broken.weights.values():
        a.fill_(float("nan"))
        b.fill_(float("inf"))
    kept = NarrowAdapters(torch.float32, tiny.device)
    kept.hold([one, broken])
    kept.hold([one, next_one])
    assert wrong_slots(kept, [one, next_one]) == 0
    assert kept.finite([one, next_one])
    kept.hold([one, broken])
    assert not kept.finite([one, broken])
    kept.hold([one])
    assert kept.finite([one])
    assert broken not in kept.slots
    assert wrong_slots(kept, [one]) == 0
    assert all(matrix.isfinite().all() for stack in kept._stacks.values() for matrix in (stack.a, stack.b))

"""The compiled copy of an adapter into its slot, against plain operations."""

import pytest
import torch
from torch.nn import functional

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here, or POSTTRAIN_COMPILE=0: plain operations copy")


@pytest.mark.parametrize("worst", [1.0, float("nan"), float("inf"), -3e38])
def test_the_compiled_copy_gives_the_bits_of_plain_operations(worst: float) -> None:
    """Also where a slot has room for a larger rank, and what stood there was no number; it says where something is none."""
    generator = torch.Generator().manual_seed(0)
    pairs, places, wanted = [], [], []
    for rank, room, inputs, outputs in ((4, 4, 64, 96), (3, 16, 33, 7), (16, 16, 1, 1)):
        a, b = (torch.randn(shape, generator=generator) * 10 for shape in ((rank, inputs), (outputs, rank)))
        wide_a, wide_b = torch.full((3 * room, inputs), torch.nan), torch.full((outputs, 3 * room + 5), torch.nan)
        for row in (a, b):
            row.flatten()[0] = 1e-42
        b[-1, -1] = worst
        own_a, own_b = wide_a.bfloat16()[room : 2 * room], wide_b.bfloat16()[:, room : 2 * room]
        pairs.append((a, b))
        places.append((own_a, own_b))
        filled = functional.pad(a, (0, 0, 0, room - rank)), functional.pad(b * 1.5, (0, room - rank))
        wanted.append([x.bfloat16() for x in filled])
    assert bindings.fill_slot(pairs, places, 1.5) is (worst == 1.0)
    for found, right in zip(places, wanted, strict=True):
        for one, other in zip(found, right, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert all(a._base[0].isnan().all() and b._base[:, -1].isnan().all() for a, b in places if a._base is not None)

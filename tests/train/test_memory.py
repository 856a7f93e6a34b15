"""PPO's memory by parts: counted by hand on the tiny model."""

from pathlib import Path

import pytest
import torch
from ppo_runs import run_ppo
from tiny_stages import rows_of

from posttrain.generate.engine import SamplingSettings, generate
from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.linear import packs
from posttrain.models.base_model import BaseModel, load_base
from posttrain.train.memory import MIB, ActivationCounter, packed_memory

# Linear layers of the tiny model: 64 inputs and 64 or 32 outputs of attention, an MLP of 128; two layers of rank 4.
INPUTS_OUTPUTS = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
ADAPTER = 2 * 4 * sum(map(sum, INPUTS_OUTPUTS)) * 4
HEAD = 64 * 4


def test_four_roles_are_one_base_and_small_adapters(base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "own", iterations=1)
    row = rows_of(tmp_path / "own")[0]
    weights = sum(p.numel() for p in base.model.parameters())
    assert row["memory/base"] * MIB == pytest.approx(4 * weights + sum(b.nbytes for b in base.model.buffers()))
    assert row["memory/adapters"] * MIB == 3 * ADAPTER + 2 * HEAD, "policy, reward model, value; the reference is the base"
    assert row["memory/optimiser"] * MIB == 3 * (2 * ADAPTER + HEAD), "gradients and two moments of policy and value"
    # keys and values of two layers with two heads of 16 numbers; six completions, in blocks of tokens
    assert row["memory/cache"] * MIB % (2 * 2 * 2 * 16 * 4 * 6) == 0
    run_ppo(base, tmp_path / "shared", iterations=1, value="shared")
    shared = rows_of(tmp_path / "shared")[0]
    assert shared["memory/adapters"] * MIB == 2 * ADAPTER + 2 * HEAD
    assert shared["memory/optimiser"] * MIB == 3 * (ADAPTER + HEAD)


def test_activations_grow_with_what_is_computed_at_once(base: BaseModel, tmp_path: Path) -> None:
    """Two prompts a minibatch against one: about twice as much, and not less than the hidden states of every layer."""
    found = {}
    for size in (1, 4):
        run_ppo(base, tmp_path / f"{size}", iterations=1, prompts=4, minibatch=size, ppo_epochs=1, max_new_tokens=64)
        rows = rows_of(tmp_path / f"{size}")
        found[size] = max(row["memory/activations"] for row in rows)
    assert 2.5 < found[4] / found[1] < 6
    assert found[1] * MIB > 64 * 64 * 4 * 2 * 4, "tokens, width, bytes, layers, tensors a layer"


def test_what_a_forward_drops_again_is_not_counted(base: BaseModel) -> None:
    """Its memory is given to something else, and the count would depend on to what."""
    kept = ActivationCounter(base)
    with kept.counted():
        y = torch.ones(1000, requires_grad=True).mul(2).square()
        for size in (3000, 2000):
            torch.ones(size, requires_grad=True).mul(2).square()
    assert kept.largest * MIB == 1000 * 4
    y.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_that_is_counted_stays_in_memory(recompute: bool, base: BaseModel, tmp_path: Path) -> None:
    import gc

    run_ppo(base, tmp_path / "ppo", iterations=1, recompute=recompute)
    gc.collect()
    big = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.grad_fn is not None]
    assert big == []


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_the_engine_holds_twice(dtype: str, tiles: bool, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was really packed while an engine decoded, by the packed tensors' own numbers; float32 packs nothing, and neither
    does a processor with matrix tiles."""
    if tiles and not bindings.tiles():
        pytest.skip("this processor has no matrix tiles")
    monkeypatch.setattr(bindings, "tiles", lambda: tiles)
    made: list[torch.Tensor] = []
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def noted(weight: torch.Tensor) -> torch.Tensor:
        made.append(weight)
        return reorder(weight)

    base = load_base("random:tiny", template="gemma", dtype=dtype, device="cpu")
    able = packs(64, base.dtype, base.device)  # tries it once
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", noted)
    generate(base, [[1, 50, 60], [1, 70]], SamplingSettings(4, 1.0, 1.0, 0), "base")
    assert packed_memory(base) * MIB == sum(weight.nbytes for weight in made)
    assert bool(made) == able
    assert able == (dtype == "bfloat16" and not tiles and torch.ops.mkldnn._is_mkldnn_bf16_supported())

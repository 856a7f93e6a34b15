"""The chains that a GPU compiles, as plain functions: equal to what the models' own code computes."""

import sys

import pytest
import torch
import transformers
from torch import nn

from bases import CONFIGS, SHAPE
from posttrain.models.patch_modules import GatedMlp, replace_mlps, replace_rotary

GATED = [name for name in CONFIGS if not name.startswith("phi3")]  # phi3 keeps gate and up in one matrix


def model_of(name: str) -> nn.Module:
    kind, changes = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(kind(**{**SHAPE, **changes}), dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("name", GATED)
def test_a_models_mlps_are_replaced_by_their_equals(name: str) -> None:
    model = model_of(name)
    names = [n for n, _ in model.named_parameters()]
    ids = torch.arange(3, 20)[None]
    wanted = model(ids).logits
    assert replace_mlps(model) == SHAPE["num_hidden_layers"]
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in model.named_parameters()] == names


def test_an_mlp_that_computes_something_else_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    holder = nn.ModuleDict({"mlp": Odd()})
    assert replace_mlps(holder) == 0
    assert not any(isinstance(m, GatedMlp) for m in holder.modules())


@pytest.mark.parametrize("name", GATED)
def test_rotations_by_halves_are_recognised_and_unchanged_on_a_cpu(name: str) -> None:
    model = model_of(name)
    ids = torch.arange(3, 20)[None]
    wanted = model(ids).logits
    assert replace_rotary(model)
    assert torch.equal(model(ids).logits, wanted)
    assert replace_rotary(model), "a second call finds it replaced"


@pytest.mark.parametrize("name", GATED)
def test_a_second_model_in_the_process_keeps_its_own_rotation(name: str) -> None:
    """Its layers run the methods of their classes, and the function of their module is transformers' own."""
    first, second = model_of(name), model_of(name)
    module = sys.modules[type(second).__module__]
    own = vars(module)["apply_rotary_pos_emb"]
    assert replace_rotary(first)
    assert vars(module)["apply_rotary_pos_emb"] is own
    replaced = {type(layer).__name__ for layer in first.modules() if "forward" in vars(layer)}
    assert len(replaced) == 1
    assert not any("forward" in vars(layer) for layer in second.modules())


def test_nothing_is_found_where_nothing_rotates() -> None:
    assert not replace_rotary(nn.Linear(2, 2))

"""Layers that are computed again in the backward give the very gradients of layers that keep everything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bases import CONFIGS, SHAPE, make_base
from posttrain.errors import AdapterError, ModelError
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.batches import DeviceBatch, batch_logprobs, pack_trees
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.models.recompute import decoder_layers, recomputed


def trees(base: BaseModel) -> DeviceBatch:
    """Two prompts with three completions."""
    shapes = [(range(10, 40), [range(50, 90), range(60, 80)]), (range(90, 99), [range(100, 130)])]
    return pack_trees(((list(prompt), [list(c) for c in below]) for prompt, below in shapes), base.device)


def learned(base: BaseModel, parameters: dict[str, nn.Parameter], policy: str, *, on: bool) -> dict[str, Tensor]:
    """Log-probabilities and gradients of a forward with recomputation or without, and the random state behind both."""
    torch.manual_seed(7)
    for parameter in parameters.values():
        parameter.grad = None
    with recomputed(base, on):
        logprobs_N = batch_logprobs(base, trees(base), policy)
    logprobs_N.square().mean().backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert any(bool(gradient.any()) for gradient in found.values())
    return {**found, "log p": logprobs_N.detach(), "random": torch.get_rng_state()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_gives_the_same_bits(
    name: str, dropout: float, lively: Callable[..., LoraAdapter], tmp_path: Path
) -> None:
    base = make_base(name, tmp_path)
    adapter = lively(base, "a", dropout=dropout, token_ids=(12, 55))
    adapter.requires_grad_(True)
    assert len(decoder_layers(base.model)) == SHAPE["num_hidden_layers"]
    kept, again = (learned(base, adapter.parameters(), "a", on=on) for on in (False, True))
    assert differences(kept, again) == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bfloat16_gives_the_same_bits(dropout: float, lively: Callable[..., LoraAdapter], own_cache: None) -> None:
    base = load_base("random:tiny", template="gemma", dtype="bfloat16", device="cpu")
    adapter = lively(base, "a", dropout=dropout)
    adapter.requires_grad_(True)
    kept, again = (learned(base, adapter.parameters(), "a", on=on) for on in (False, True))
    assert differences(kept, again) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_weights_and_their_narrow_copies_give_the_same_bits(dtype: torch.dtype, own_cache: None) -> None:
    """In mixed precision the layers' weights are lent for the forward, and given back before the backward."""
    whole = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    base = BaseModel(whole.source, whole.model, whole.tokenizer, whole.chat, dtype)
    assert (base.narrow is not None) == (dtype == torch.bfloat16)
    base.model.requires_grad_(True)
    kept, again = (learned(base, dict(base.model.named_parameters()), "base", on=on) for on in (False, True))
    assert differences(kept, again) == []


@pytest.mark.parametrize("during", ["base", "other"])
def test_the_backward_sees_the_routing_of_its_forward(during: str, tiny: BaseModel, lively: Callable[..., LoraAdapter]) -> None:
    """Policy and value function take turns: whatever adapter is in force when the backward comes, none other is learned."""
    found = {}
    for on in (False, True):
        policy, other = lively(tiny, "policy", seed=1), lively(tiny, "other", seed=2)
        for adapter in (policy, other):
            adapter.requires_grad_(True)
        with recomputed(tiny, on):
            both = [batch_logprobs(tiny, trees(tiny), name).square().mean() for name in ("policy", "other")]
        with tiny.adapters.use(during):
            for loss in both:
                loss.backward()  # type: ignore[no-untyped-call]
            assert tiny.adapters.routing.whole is (other if during == "other" else None), "it was put back"
        found[on] = {f"{a.name} {n}": g.grad for a in (policy, other) for n, g in a.parameters().items() if g.grad is not None}
    assert len(found[True]) == 2 * 2 * 7 * 2, "adapters, layers, linear layers, matrices"
    assert differences(found[False], found[True]) == []


@contextmanager
def counted(base: BaseModel) -> Iterator[list[int]]:
    """How often the inside of the first layer was computed."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = base.model.model.layers[0].mlp.up_proj.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def test_only_a_backward_computes_a_layer_again(tiny: BaseModel, lively: Callable[..., LoraAdapter]) -> None:
    lively(tiny, "a").requires_grad_(True)
    with counted(tiny) as calls:
        with recomputed(tiny):
            with torch.no_grad():
                batch_logprobs(tiny, trees(tiny), "a")
            assert calls == [1]
            loss = batch_logprobs(tiny, trees(tiny), "a").mean()
            assert calls == [2]
            loss.backward()  # type: ignore[no-untyped-call]
            assert calls == [3]
        batch_logprobs(tiny, trees(tiny), "a").mean().backward()  # type: ignore[no-untyped-call]
        assert calls == [4], "after it layers keep what they compute"
        with recomputed(tiny, False):
            batch_logprobs(tiny, trees(tiny), "a").mean().backward()  # type: ignore[no-untyped-call]
        assert calls == [5]


def test_layers_are_themselves_again_after_an_error(tiny: BaseModel) -> None:
    with pytest.raises(AdapterError), recomputed(tiny):
        batch_logprobs(tiny, trees(tiny), "nobody")
    with counted(tiny) as calls:
        adapter = tiny.adapters.create("a", LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
        adapter.requires_grad_(True)
        batch_logprobs(tiny, trees(tiny), "a").mean().backward()  # type: ignore[no-untyped-call]
    assert calls == [1]


def test_an_architecture_without_known_layers_is_refused(tiny: BaseModel) -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    base = BaseModel(tiny.source, transformers.OpenAIGPTLMHeadModel(config), tiny.tokenizer, tiny.chat)
    wanted = r"\[base\] recompute = true · the layers of OpenAIGPTLMHeadModel are not known · leave recompute out"
    with pytest.raises(ModelError, match=wanted), recomputed(base):
        pass
    with recomputed(base, False):
        pass

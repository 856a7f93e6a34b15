"""Adapters: identities with the base, with each other, with PEFT, and with their parameter count."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from logits_of import our_logits, plain_logits
from torch import nn

from adapter_sizes import count_parameters
from bases import make_base
from posttrain.errors import RecipeError
from posttrain.models.adapter_files import load_adapter, save_adapter
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.lora import LoraSettings, LoraShape
from posttrain.models.segments import Segments, Span
from posttrain.models.token_adapters import TokenAdapters

# PEFT 0.21 asks transformers 5.23 in a way that the latter will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = [1, 30, 99, 3, 77, 140, 12, 4, 200, 11]
PLAIN = LoraSettings(4, 8.0, 0.0, "all", "standard")


def plain_model(base: BaseModel) -> nn.Module:
    """The base by transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.float32)


def test_a_new_adapter_is_the_base_exactly(tiny: BaseModel) -> None:
    adapter = tiny.adapters.create("new", PLAIN, seed=0, token_ids=(3, 4))
    new, base = our_logits(tiny, IDS, "new"), our_logits(tiny, IDS, "base")
    assert torch.equal(new[:, 5:], base[:, 5:])
    assert torch.allclose(new, base, atol=1e-6)  # rows of their own are a product of their own
    a = torch.cat([a.flatten() for a, _ in adapter.weights.values() if a.shape[1] == 64])
    assert a.abs().max() <= 1 / 8  # +-1/sqrt(64)
    assert a.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    same = tiny.adapters.create("same", PLAIN, seed=0)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(adapter.weights.values(), same.weights.values(), strict=True))


@pytest.mark.parametrize("token_ids", [(), (3, 99)])
def test_adapters_mixed_in_a_batch_answer_as_each_alone(tiny: BaseModel, lively: Callable, token_ids: tuple[int, ...]) -> None:
    lively(tiny, "a", seed=1, token_ids=token_ids)
    lively(tiny, "b", seed=2, rank=2, targets="attention")
    names = ["a", "base", "b", "a"]
    count = len(IDS)
    spans = tuple(Span(i * count, count) for i in range(4))
    routes = [(i * count, (i + 1) * count, name) for i, name in enumerate(names)]
    runs = [(count, None if name == "base" else tiny.adapters.get(name)) for name in names]
    tokens = TokenAdapters(runs, NarrowAdapters(tiny.dtype, tiny.device), tiny.device)
    with torch.no_grad(), tiny.adapters.use_tokens(tokens):
        mixed = tiny.forward(torch.tensor(IDS * 4), torch.arange(count).repeat(4), Segments(spans))
    for (start, stop, name), span in zip(routes, spans, strict=True):
        with torch.no_grad():
            single = tiny.hidden(torch.tensor(IDS), torch.arange(count), Segments((Span(0, count),)), name)
        assert torch.allclose(mixed[start:stop], single, atol=1e-5), (name, span)


def test_the_product_and_its_gradients_are_those_of_plain_autograd(tiny: BaseModel, lively: Callable) -> None:
    adapter = lively(tiny, "a")
    adapter.requires_grad_(True)
    layer = tiny.model.get_submodule("model.layers.0.mlp.down_proj")
    a, b = adapter.weights["model.layers.0.mlp.down_proj"]
    x = torch.randn(1, 9, layer.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    slope = torch.randn(1, 9, layer.out_features, generator=torch.Generator().manual_seed(1))
    with tiny.adapters.use("a"):
        ours = layer(x)
    wanted = x @ layer.weight.T + 2.0 * (x @ a.T) @ b.T
    assert torch.allclose(ours, wanted, atol=1e-5)
    found = torch.autograd.grad((ours * slope).sum(), [x, a, b])
    right = torch.autograd.grad((wanted * slope).sum(), [x, a, b])
    assert all(torch.allclose(f, r, atol=1e-5) for f, r in zip(found, right, strict=True))


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank() -> None:
    assert LoraSettings(16, 32.0, 0, "all", "standard").scale == 2
    assert LoraSettings(16, 32.0, 0, "all", "rslora").scale == 8


ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [("all", ATTENTION | MLP), ("attention", ATTENTION), ("mlp", MLP), (("q_proj", "up_proj"), {"q_proj", "up_proj"})],
)
def test_targets_choose_layers_and_never_the_head(tiny: BaseModel, targets: str, layers: set[str]) -> None:
    chosen = LoraShape.select(tiny.model, targets)
    assert {name.rsplit(".", 1)[-1] for name in chosen} == layers
    assert len(chosen) == 2 * len(layers)


@pytest.mark.parametrize("targets", [("q_proj", "w_pack"), ("lm_head",), ("self_attn",), ()])
def test_unknown_targets_are_refused_with_what_there_is(tiny: BaseModel, targets: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="there is: down_proj, gate_proj, k_proj"):
        LoraShape.select(tiny.model, targets)


def test_dropout_works_in_training_and_not_in_validation(tiny: BaseModel, lively: Callable) -> None:
    """Validation runs between steps, while the adapter is still the one in training, without gradients."""
    adapter = lively(tiny, "a", dropout=0.5)
    still = our_logits(tiny, IDS, "a")
    adapter.requires_grad_(True)
    row = (torch.tensor(IDS), torch.arange(len(IDS)), Segments((Span(0, len(IDS)),)), "a")
    first, second = tiny.hidden(*row), tiny.hidden(*row)
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.equal(our_logits(tiny, IDS, "a"), still)
    with torch.inference_mode():
        assert torch.equal(tiny.hidden(*row), tiny.hidden(*row))
    adapter.settings = adapter.settings._replace(dropout=0.0)
    assert torch.equal(tiny.hidden(*row), tiny.hidden(*row))


def test_70b_all_linear_layers_of_rank_8_train_103_5_million_parameters() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(70.55, abs=0.01)
    count = count_parameters(LoraShape.select(model, "all"), rank=8)
    # 80 layers * 8 * (q, o: 2 * 16384; k, v: 2 * 9216; gate, up, down: 3 * 36864)
    assert count == 80 * 8 * (2 * 16384 + 2 * 9216 + 3 * 36864) == 103_546_880


def test_the_count_is_what_an_adapter_holds(tiny: BaseModel) -> None:
    adapter = tiny.adapters.create("a", PLAIN, seed=0)
    held = sum(p.numel() for p in adapter.parameters().values())
    assert held == count_parameters(LoraShape.select(tiny.model, "all"), rank=4)


def test_a_copy_has_a_life_of_its_own(tiny: BaseModel, lively: Callable) -> None:
    lively(tiny, "a", token_ids=(3,))
    before = our_logits(tiny, IDS, "a")
    copy = tiny.adapters.copy("a", "b")
    assert torch.equal(our_logits(tiny, IDS, "b"), before)
    with torch.no_grad():
        for parameter in copy.parameters().values():
            parameter.add_(0.1)
    assert torch.equal(our_logits(tiny, IDS, "a"), before)
    assert not torch.allclose(our_logits(tiny, IDS, "b"), before, atol=1e-2)


# PEFT ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_ids", [(), (3, 4, 99)])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_peft_loads_ours_to_the_same_logits(
    tiny: BaseModel, lively: Callable, tmp_path: Path, scaling: str, token_ids: tuple[int, ...]
) -> None:
    save_adapter(tmp_path, lively(tiny, "a", scaling=scaling, token_ids=token_ids), tiny)
    theirs = peft.PeftModel.from_pretrained(plain_model(tiny), tmp_path)
    ours = our_logits(tiny, IDS, "a")
    assert torch.allclose(plain_logits(theirs, IDS), ours, atol=1e-5)
    assert not torch.allclose(our_logits(tiny, IDS, "base"), ours, atol=0.1)


@pytest.mark.parametrize("name", ["gemma3, sliding", "llama untied", "phi3, sliding", "qwen2"])
def test_peft_agrees_on_other_architectures_with_trained_rows(lively: Callable, tmp_path: Path, name: str) -> None:
    """Gemma scales its embeddings, an untied head keeps its own rows, Phi and Qwen name or bias their layers otherwise."""
    base = make_base(name, tmp_path / "base")
    save_adapter(tmp_path, lively(base, "a", token_ids=(3, 99)), base)
    theirs = peft.PeftModel.from_pretrained(plain_model(base), tmp_path)
    assert torch.allclose(plain_logits(theirs, IDS), our_logits(base, IDS, "a"), atol=2e-5)


@pytest.mark.parametrize("indices", [None, [3, 99], {"embed_tokens": [99, 3]}])
@pytest.mark.parametrize("rslora", [False, True])
def test_ours_loads_what_peft_saves_to_the_same_logits(
    tiny: BaseModel, tmp_path: Path, rslora: bool, indices: list[int] | None
) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rslora, task_type="CAUSAL_LM",
        trainable_token_indices=indices,
    )  # fmt: skip
    theirs = peft.get_peft_model(plain_model(tiny), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_B" in parameter_name or "trainable_tokens_delta" in parameter_name:
                parameter.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    load_adapter(tmp_path, "a", tiny, require_hash=False)
    assert torch.allclose(our_logits(tiny, IDS, "a"), plain_logits(theirs, IDS), atol=1e-5)


def test_saved_and_loaded_is_the_same_adapter(tiny: BaseModel, lively: Callable, tmp_path: Path) -> None:
    adapter = lively(tiny, "a", scaling="rslora", token_ids=(4, 3))
    save_adapter(tmp_path, adapter, tiny)
    loaded = load_adapter(tmp_path, "again", tiny)
    assert loaded.parameters().keys() == adapter.parameters().keys()
    for name, parameter in adapter.parameters().items():
        assert torch.equal(loaded.parameters()[name], parameter)
    assert torch.equal(our_logits(tiny, IDS, "again"), our_logits(tiny, IDS, "a"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [4, 3]}


# Trained embedding rows ------------------------------------------------------------------------------------------------


def test_trained_rows_stand_in_embedding_and_tied_head(tiny: BaseModel, lively: Callable) -> None:
    adapter = lively(tiny, "a", token_ids=(3, 4))
    assert adapter.tokens is not None
    hidden = torch.eye(tiny.head_VD.shape[1])  # logits of unit vectors are the head's columns
    head = tiny.logits(hidden, "a").T
    assert torch.equal(head[[3, 4]], adapter.tokens.rows)
    assert torch.equal(head[5:], tiny.head_VD[5:])
    assert torch.equal(tiny.logits(hidden, "base").T, tiny.head_VD)
    other = lively(tiny, "b", token_ids=(7,), seed=5)
    assert other.tokens is not None
    head = tiny.logits(hidden, "b").T
    assert torch.equal(head[7], other.tokens.rows[0])
    assert torch.equal(head[[3, 4]], tiny.head_VD[[3, 4]])  # nothing of the adapter before is left


@pytest.mark.parametrize("name", ["gemma3, sliding", "gemma2, soft-capped", "llama", "llama untied"])
def test_gradient_of_trained_rows_is_that_of_plain_autograd(lively: Callable, tmp_path: Path, name: str) -> None:
    base = make_base(name, tmp_path)
    adapter = lively(base, "a", token_ids=(3, 99, 7))
    adapter.requires_grad_(True)
    assert adapter.tokens is not None
    target = torch.tensor([*IDS[1:], 3])
    row = (torch.tensor(IDS), torch.arange(len(IDS)), Segments((Span(0, len(IDS)),)), "a")
    ours = base.logprobs(base.hidden(*row), target, "a")
    found = torch.autograd.grad(ours.mean(), adapter.tokens.rows)[0]

    theirs = plain_model(base)
    save_adapter(tmp_path, adapter, base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    logits = theirs(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    wanted = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ours, wanted, atol=2e-5)
    rows = next(p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n)
    assert torch.allclose(found, torch.autograd.grad(wanted.mean(), rows)[0], atol=2e-5)


def test_gradient_of_trained_rows_in_bfloat16_is_near_that_of_float32() -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        base = load_base("random:tiny", template="gemma", dtype=dtype, device="cpu")
        adapter = base.adapters.create("a", PLAIN, seed=0, token_ids=(3, 99))
        adapter.requires_grad_(True)
        assert adapter.tokens is not None
        hidden = base.hidden(torch.tensor(IDS), torch.arange(len(IDS)), Segments((Span(0, len(IDS)),)), "a")
        loss = base.logprobs(hidden, torch.tensor([*IDS[1:], 3]), "a").mean()
        found.append(torch.autograd.grad(loss, adapter.tokens.rows)[0])
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.03


def test_generated_logprobs_use_the_trained_rows(tiny: BaseModel, lively: Callable) -> None:
    from posttrain.generate.engine import SamplingSettings, generate

    lively(tiny, "a", token_ids=(3, 99, 30))
    for rollout in generate(tiny, [IDS, IDS[:4]], SamplingSettings(12, 1.0, seed=3), "a"):
        ids = [*rollout.prompt_ids, *rollout.completion_ids]
        full = torch.log_softmax(our_logits(tiny, ids, "a"), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(rollout.logprobs), full[-len(rollout.logprobs) :], atol=1e-5)

"""`recompute` changes what a stage holds in memory, and no bit of what comes out, wherever it is turned on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from full_recipes import recipe_of as full_recipe
from ppo_runs import random_adapter, random_reward_model, run_ppo
from tiny_stages import StopAt, demonstrations, digest, preferences, rows_of, run_stage

from posttrain.data.prepare import TrainRow
from posttrain.errors import Interrupted
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.batches import batch_logprobs, pack_rows
from posttrain.models.recompute import recomputed
from posttrain.models.source import locate_base
from posttrain.recipe import Recipe
from posttrain.train.memory import MIB, ActivationCounter
from posttrain.train.ppo import train_ppo
from posttrain.train.reward import train_reward
from posttrain.train.stage import StageContext


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal: everything but the memory that was counted."""
    found = digest(folder)
    found["rows"] = [{k: v for k, v in row.items() if k != "memory/activations"} for row in found["rows"]]
    return found


@contextmanager
def recorded_forwards(base: BaseModel) -> Iterator[list[int]]:
    """How often the inside of the first layer was computed with gradients."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += torch.is_grad_enabled()

    handle = base.model.model.layers[0].mlp.up_proj.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


FULL: dict[str, Any] = {"kind": "full"}
DROPOUT: dict[str, Any] = {"dropout": 0.3}
# The kind of stage, its adapter, and whether it recomputes until it is stopped, or from then on.
CASES = [("sft", DROPOUT, False), ("dpo", DROPOUT, True), ("reward", DROPOUT, False), ("sft", FULL, True)]


@pytest.mark.parametrize("kind, adapter, first", CASES, ids=str)
def test_a_stage_gives_the_same_bits(kind: str, adapter: dict[str, Any], first: bool, base: BaseModel, tmp_path: Path) -> None:
    data = demonstrations(tmp_path / "d.jsonl") if kind == "sft" else preferences(tmp_path / "p.jsonl")
    stage = {"data": str(data), "epochs": 1, "keep": "best", "validate_every": 2, "validation": 0.2, "adapter": adapter}
    counts = {}
    for recompute in (False, True):
        with recorded_forwards(base) as calls:
            run_stage(base, tmp_path / f"{recompute}", kind, recompute=recompute, **stage)
        counts[recompute] = calls[0]
    assert counts[True] == 2 * counts[False] > 0
    wanted = outcome(tmp_path / "False")
    assert outcome(tmp_path / "True") == wanted
    with pytest.raises(Interrupted):
        run_stage(base, tmp_path / "stopped", kind, recompute=first, stop_at=2, **stage)
    run_stage(base, tmp_path / "stopped", kind, recompute=not first, **stage)
    assert outcome(tmp_path / "stopped") == wanted


PPO = {"own value and a mix": {"ptx_coef": 0.5}, "shared value": {"value": "shared"}}


@pytest.mark.parametrize("kind", PPO)
def test_ppo_gives_the_same_bits(kind: str, base: BaseModel, tmp_path: Path) -> None:
    stage: dict[str, Any] = {"iterations": 2, "prompts": 2, "max_new_tokens": 4, **PPO[kind]}
    if "mix" in kind:
        stage["ptx_data"] = str(demonstrations(tmp_path / "d.jsonl"))
    run_ppo(base, tmp_path / "kept", **stage)
    run_ppo(base, tmp_path / "again", recompute=True, **stage)
    kept, again = rows_of(tmp_path / "kept"), rows_of(tmp_path / "again")
    assert all(b["memory/activations"] < 0.5 * a["memory/activations"] for a, b in zip(kept, again, strict=True))
    assert [row["ppo/ratio"] for row in again[::2]] == [1.0, 1.0], "before the first step of an iteration"
    wanted = outcome(tmp_path / "kept")
    assert outcome(tmp_path / "again") == wanted
    with pytest.raises(Interrupted):
        run_ppo(base, tmp_path / "stopped", stop_at=3, **stage)
    run_ppo(base, tmp_path / "stopped", recompute=True, **stage)
    assert outcome(tmp_path / "stopped") == wanted


def test_ppo_with_whole_weights_gives_the_same_bits(tmp_path: Path, own_cache: None) -> None:
    whole = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    recipe = full_recipe(tmp_path, iterations=1, prompts=2, max_new_tokens=4)
    (tmp_path / "rm").mkdir()
    train_reward(StageContext(whole, Policies(whole, tmp_path), recipe, tmp_path / "rm", StopAt(0).stop), recipe.stage[0])  # type: ignore[arg-type]
    for name, own in (("kept", recipe), ("again", with_recompute(recipe))):
        (tmp_path / name).mkdir()
        train_ppo(StageContext(whole, Policies(whole, tmp_path), own, tmp_path / name, StopAt(0).stop), own.stage[1])  # type: ignore[arg-type]
    assert outcome(tmp_path / "again") == outcome(tmp_path / "kept")


def with_recompute(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"recompute": True})})


LAYERS, WIDTH = 12, 64


@pytest.fixture
def deep(tmp_path: Path, own_cache: None) -> BaseModel:
    """A base of many thin layers."""
    config = transformers.LlamaConfig(
        vocab_size=263, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "deep"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in locate_base("random:tiny").folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return load_base(str(folder), template="gemma", dtype="float32", device="cpu")


def test_a_deep_model_keeps_less_than_a_tenth(deep: BaseModel, tmp_path: Path) -> None:
    random_reward_model(deep)
    found = {}
    for recompute in (False, True):
        run_ppo(deep, tmp_path / f"{recompute}", iterations=1, prompts=2, ppo_epochs=1, max_new_tokens=4, recompute=recompute)
        found[recompute] = max(row["memory/activations"] for row in rows_of(tmp_path / f"{recompute}"))
    assert found[True] < found[False] / 10


def test_what_is_kept_is_the_layers_inputs_and_what_lies_outside(deep: BaseModel) -> None:
    """Counted by hand: hidden states of T tokens before each layer and behind the last, the rotations, one target's slope."""
    random_adapter(deep, "a").requires_grad_(True)
    batch = pack_rows([TrainRow("r", list(range(10, 138)), [False] * 127 + [True])], deep.device)
    kept = ActivationCounter(deep)
    with recomputed(deep), kept.counted():
        out = batch_logprobs(deep, batch, "a")
    tokens, rotations = len(batch.ids_T), 2 * WIDTH // 4
    hidden = 4 * tokens * (WIDTH * (LAYERS + 1) + rotations)
    outside = 4 * (tokens + WIDTH)  # the last norm's number a token, the head's slope
    assert hidden + outside <= kept.largest * MIB < hidden + outside + 1024
    assert out.requires_grad  # what it keeps is there as long as it is

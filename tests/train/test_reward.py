"""The reward stage: it learns an order, its scores are measured against the demonstrations, bad settings are refused."""

from pathlib import Path

import pytest
import torch
from tiny_stages import demonstrations, preferences, rows_of, run_stage

from posttrain.data.formats import read_preferences
from posttrain.data.prepare import prepare_pairs
from posttrain.data.rankings import rank_prompts
from posttrain.errors import RecipeError
from posttrain.evaluate.pairs import measure
from posttrain.evaluate.reward_model import score_pairs
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import BaseModel
from posttrain.recipe import Recipe, parse_recipe
from posttrain.stop import StopSignal
from posttrain.train.reward import mean_score, train_reward
from posttrain.train.sft import train_sft
from posttrain.train.stage import StageContext


def pairs_of(base: BaseModel, path: Path) -> list:
    read = read_preferences(str(path), seed=0)
    keywords = {"max_tokens": 512, "validation": 0.0, "allow_dropped": 0.0, "evaluation_prompts": ()}
    return rank_prompts(prepare_pairs(read, base.chat, **keywords).train)


def test_it_learns_which_completion_is_preferred(base: BaseModel, tmp_path: Path) -> None:
    """Lower case over upper case, on pairs with words that it never saw: 0.5 by chance."""
    data = preferences(tmp_path / "p.jsonl", rows=40)
    run_stage(base, tmp_path / "rm", "reward", data=str(data), epochs=6, validation=0.2, batch=8)
    rows = rows_of(tmp_path / "rm")
    assert rows[0]["reward/loss"] > 0.5, "log 2 give or take what a random head says"
    assert rows[-1]["reward/validation_accuracy"] > 0.9
    assert rows[-1]["reward/loss"] < 0.3


def recipe_of(tmp_path: Path, *, init: str) -> Recipe:
    sft = {"kind": "sft", "name": "sft", "data": str(demonstrations(tmp_path / "d.jsonl")), "epochs": 1, "batch": 4}
    rm = {"kind": "reward", "name": "rm", "init": init, "data": str(preferences(tmp_path / "p.jsonl")), "batch": 4}
    return parse_recipe({"name": "t", "base": {"model": "random:tiny"}, "adapter": {"rank": 4}, "stage": [sft, rm]})


@pytest.mark.parametrize("init", ["sft", "base"])
def test_scores_are_shifted_to_a_mean_of_zero(init: str, base: BaseModel, tmp_path: Path) -> None:
    """Over the demonstrations of the sft stage behind, or over chosen completions where there is none."""
    from posttrain.data.formats import read_demonstrations
    from posttrain.data.prepare import TrainRow, prepare_demonstrations

    recipe = recipe_of(tmp_path, init=init)
    policies = Policies(base, tmp_path)
    for stage in recipe.stage:
        folder = tmp_path / stage.name
        folder.mkdir()
        context = StageContext(base, policies, recipe, folder, StopSignal())
        train_sft(context, stage) if stage.kind == "sft" else train_reward(context, stage)  # type: ignore[arg-type]
    adapter = policies.activate("rm") if (tmp_path / "rm/manifest.json").exists() else _load(base, tmp_path / "rm")
    keywords = {"max_tokens": 512, "validation": 0.0, "allow_dropped": 0.0, "evaluation_prompts": ()}
    if init == "sft":
        rows = prepare_demonstrations(read_demonstrations(str(tmp_path / "d.jsonl"), seed=0), base.chat, **keywords).train
    else:
        keywords["validation"] = recipe.stage[1].validation
        read = read_preferences(str(tmp_path / "p.jsonl"), seed=0)
        train = rank_prompts(prepare_pairs(read, base.chat, **keywords).train)
        whole = [[*p.prompt_ids, *p.completions[p.pairs[0].chosen]] for p in train]
        rows = [TrainRow("", ids, [False] * len(ids)) for ids in whole]
    assert mean_score(base, adapter, rows) == pytest.approx(0, abs=1e-5)
    head = base.adapters.get(adapter).head
    assert head is not None
    assert abs(head.shift) > 1e-4, "there was something to shift"


def _load(base: BaseModel, folder: Path) -> str:
    from posttrain.models.adapter_files import load_adapter

    return load_adapter(folder, "rm", base).name


def test_measures_of_a_reward_model(base: BaseModel, tmp_path: Path) -> None:
    data = preferences(tmp_path / "p.jsonl", rows=30)
    run_stage(base, tmp_path / "rm", "reward", data=str(data), epochs=6, validation=0, batch=8)
    adapter = _load(base, tmp_path / "rm")
    prompts = pairs_of(base, data)
    scored = score_pairs(base, adapter, prompts, label="pairs")
    assert [p.id for p in scored] == [f"pair-{i}" for i in range(30)]
    found = measure(scored)
    assert found["pairs"] == 30
    assert found["accuracy"]["value"] > 0.9
    assert sum(b["n"] for b in found["calibration"]) == 30
    assert 0 <= found["explained_by_length"] <= 1


def test_what_a_reward_stage_may_not_be(tmp_path: Path) -> None:
    sft = {"kind": "sft", "name": "sft", "data": "d.jsonl"}
    rm = {"kind": "reward", "name": "rm", "init": "sft", "data": "p.jsonl"}
    raw = {"name": "t", "base": {"model": "random:tiny"}, "stage": [sft, rm]}
    parse_recipe(raw)
    dpo = {"kind": "dpo", "name": "dpo", "init": "rm", "data": "p.jsonl"}
    with pytest.raises(RecipeError, match=r'init = "rm" is not an earlier policy stage · there is: base, sft'):
        parse_recipe({**raw, "stage": [sft, rm, dpo]})
    with pytest.raises(RecipeError, match=r'reference = "rm" is not an earlier policy stage'):
        parse_recipe({**raw, "stage": [sft, rm, {**dpo, "init": "sft", "reference": "rm"}]})


def test_the_head_starts_small_and_the_same_for_a_seed() -> None:
    from posttrain.models.heads import new_head

    first, again, other = (new_head(64, seed=s, device=torch.device("cpu")).weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(1 / 65**0.5, rel=0.3)

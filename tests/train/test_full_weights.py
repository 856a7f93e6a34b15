"""Reward models and PPO with full fine-tuning: one set of weights in memory, the roles in its place in turn."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from full_recipes import recipe_of
from rollout_kl import kl_of_rollouts
from safetensors.torch import load_file
from tiny_stages import StopAt, demonstrations, digest, preferences, rows_of

from posttrain.cli import main
from posttrain.data.prepare import TrainRow
from posttrain.errors import Interrupted, RecipeError
from posttrain.models.adapter_files import Policies, reload_base
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.batches import pack_rows, row_scores
from posttrain.pipeline import run_recipe
from posttrain.recipe import parse_recipe, to_toml
from posttrain.train.ppo import train_ppo
from posttrain.train.reward import train_reward
from posttrain.train.stage import StageContext


@pytest.fixture(scope="module")
def whole(own_cache: None) -> BaseModel:
    """The tiny base with weights that can be trained."""
    return load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)


@pytest.fixture(scope="module")
def run(whole: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a full reward model in it."""
    folder = tmp_path_factory.mktemp("full")
    recipe = recipe_of(folder)
    (folder / "rm").mkdir()
    train_reward(StageContext(whole, Policies(whole, folder), recipe, folder / "rm", StopAt(0).stop), recipe.stage[0])  # type: ignore[arg-type]
    return folder


def run_ppo(base: BaseModel, run: Path, name: str, *, stop_at: int = 0, **ppo: Any) -> Path:
    recipe = recipe_of(run, **ppo)
    (run / name).mkdir(exist_ok=True)
    stopper = StopAt(stop_at)
    train_ppo(StageContext(base, Policies(base, run), recipe, run / name, stopper.stop, (stopper,)), recipe.stage[1])  # type: ignore[arg-type]
    return run / name


def test_a_full_reward_model_learns_and_transformers_reads_it(whole: BaseModel, run: Path) -> None:
    """Its score is that of a sequence classifier with one label, less the shift."""
    assert rows_of(run / "rm")[-1]["reward/accuracy"] > 0.9
    name = Policies(whole, run).activate("rm")
    head = whole.adapters.get(name).head
    assert head is not None
    rows = [TrainRow(str(k), ids, [False] * len(ids)) for k, ids in enumerate(([40, 41, 42, 43], [90, 91], [60, 4, 61]))]
    with torch.no_grad():
        mine = row_scores(whole, pack_rows(rows, whole.device), name)
        kind = transformers.LlamaForSequenceClassification
        theirs = kind.from_pretrained(run / "rm", num_labels=1, dtype=torch.float32, attn_implementation="eager")
        found = torch.cat([theirs(torch.tensor([row.ids])).logits[0] for row in rows]) - head.shift
    assert torch.allclose(mine, found, atol=1e-5)
    assert float(mine.std()) > 0.01


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_full_ppo_is_exact_at_each_start_and_its_roles_do_not_disturb_it(estimator: str, whole: BaseModel, run: Path) -> None:
    """Reference and reward model were in the policy's place before each iteration's first step: 0 bits of it changed."""
    folder = run_ppo(whole, run, f"ppo-{estimator}", estimator=estimator, completions=1 if estimator == "gae" else 2)
    rows = rows_of(folder)
    assert [row["ppo/ratio"] for row in rows[::4]] == [1.0] * 3
    assert [row["ppo/approximate_kl"] for row in rows[::4]] == [0.0] * 3
    assert rows[0]["ppo/kl"] == 0.0, "the reference is the base"
    assert rows[-1]["ppo/kl"] != 0.0
    assert len({row["ppo/score"] for row in rows}) == 3
    published, base = load_file(folder / "model.safetensors"), load_file(whole.source.folder / "model.safetensors")
    assert "score.weight" not in published, "a value head is not published"
    assert all(not torch.equal(published[name], base[name]) for name in base)


def test_the_reference_of_full_ppo_is_the_policy_that_it_started_from(whole: BaseModel, run: Path) -> None:
    """Weights that were put in the policy's place three times: each iteration's KL is to the base as it lies on disk."""
    with pytest.raises(Interrupted):
        run_ppo(whole, run, "held", stop_at=6, checkpoint_every=1)
    rows = rows_of(run_ppo(whole, run, "held", checkpoint_every=1))
    reload_base(whole)
    for iteration in (1, 2):
        found = kl_of_rollouts(whole, "base", run / "held", iteration)
        assert found == pytest.approx(rows[iteration * 4]["ppo/kl"], rel=1e-4, abs=1e-5)
    assert abs(rows[-1]["ppo/kl"]) > 1e-3


def test_0_of_4_stops_change_a_full_run(whole: BaseModel, run: Path) -> None:
    wanted = digest(run_ppo(whole, run, "straight"))
    different = 0
    for k in random.Random(0).sample(range(1, 12), 4):
        with pytest.raises(Interrupted):
            run_ppo(whole, run, f"stopped-{k}", stop_at=k)
        different += digest(run_ppo(whole, run, f"stopped-{k}")) != wanted
    assert f"{different} of 4" == "0 of 4"


@pytest.mark.parametrize("change", [{"value": "own"}, {"value_init": "reward"}, {"value_init": "rm"}])
def test_a_value_function_of_its_own_needs_adapters(change: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'with \[adapter\] kind = "full" · value = "shared", a head on the policy'):
        recipe_of(tmp_path, **change)


def test_a_whole_recipe_runs_with_full_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sft, a reward model and PPO against it, each measured; a second run has nothing to do; the reward model by itself."""
    (tmp_path / "suite.toml").write_text('name = "one"\n[[task]]\nname = "q"\nanswer = "choices"\nitems = "q.jsonl"\n')
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "a", "choices": [" b", " c"], "answer": 0}\n')
    sft = {"kind": "sft", "name": "sft", "data": str(demonstrations(tmp_path / "d.jsonl")), "learning_rate": 1e-4}
    pairs = str(preferences(tmp_path / "p.jsonl", rows=40))
    rm = {"kind": "reward", "name": "rm", "init": "sft", "data": pairs, "learning_rate": 1e-4, "validation": 0.3}
    ppo = {
        "kind": "ppo", "name": "ppo", "init": "sft", "reward": "rm", "data": pairs, "iterations": 1, "prompts": 4,
        "max_new_tokens": 4, "learning_rate": 1e-4,
    }  # fmt: skip
    raw = {
        "name": "t", "base": {"model": "random:tiny", "template": "gemma", "dtype": "float32"}, "adapter": {"kind": "full"},
        "stage": [sft, rm, ppo],
        "evaluation": {"suites": [str(tmp_path / "suite.toml")], "samples": ["Hi"], "sample_tokens": 2},
    }  # fmt: skip
    recipe, run = parse_recipe(raw), tmp_path / "run"
    assert run_recipe(recipe, to_toml(recipe), run).worked == 7
    kinds = {name: json.loads((run / name / "manifest.json").read_text())["kind"] for name in ("sft", "rm", "ppo")}
    assert kinds == {"sft": "weights", "rm": "reward", "ppo": "weights"}
    assert json.loads((run / "evaluate/rm/manifest.json").read_text())["items"] > 0
    assert run_recipe(recipe, to_toml(recipe), run).worked == 0
    capsys.readouterr()
    assert main(["evaluate", str(run / "rm"), "--pairs", pairs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 40

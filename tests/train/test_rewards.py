"""What a ppo stage is paid by: functions in a process of their own, ensembles, weighted sums, and how to get them wrong."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import SMALL, random_reward_model, recipe_of, run_ppo
from tiny_stages import StopAt, digest, newest, preferences, rows_of, run_stage

from posttrain.errors import AdapterError, NonFiniteError, RecipeError, TrainingError
from posttrain.models.adapter_files import Policies, save_adapter
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import pack_trees
from posttrain.recipe import parse_recipe
from posttrain.stages.ppo import PpoStage
from posttrain.stages.reward_parts import RewardPart
from posttrain.stop import StopSignal
from posttrain.train.ppo import train_ppo
from posttrain.train.rewards import CompletionTexts, RewardScorer, combine
from posttrain.train.stage import StageContext


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward functions of tests are found as a user's are: by PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


# --- ensembles and sums -----------------------------------------------------------------------------------------------


def test_an_ensemble_by_hand() -> None:
    """Members say 1 and 3 of the first completion, 4 and 4 of the second: variance 1 and 0."""
    member_MB = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    for how, wanted in (("mean", [2.0, 4.0]), ("min", [1.0, 4.0]), ("mean_minus_variance", [1.5, 4.0])):
        part = RewardPart(models=("a", "b"), combine=how, variance_weight=0.5)  # type: ignore[arg-type]
        assert combine(member_MB, part).tolist() == wanted


def test_parts_are_weighted_and_added(base: BaseModel, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        random_reward_model(base, f"rm{seed}", seed=seed)
    parts = [
        RewardPart(models=("rm1", "rm2"), combine="min", weight=2.0), RewardPart(function="planted_rewards:short", weight=-0.5),
        RewardPart(models=("rm3",)),
    ]  # fmt: skip
    scorer = RewardScorer(parts, Policies(base, tmp_path), where="here", stop=StopSignal())
    ids = [5, 6, 7], [[8, 9], [10, 11, 12]]
    with torch.no_grad():
        model_MB = scorer.model_scores([pack_trees([ids], base.device)])
    try:
        found = scorer.score(model_MB, CompletionTexts(["p", "p"], ["ab", "abc"]), when="now")
    finally:
        scorer.close()
    worst_B = torch.minimum(model_MB[0], model_MB[1])
    torch.testing.assert_close(found.score_B, 2 * worst_B + torch.tensor([1.0, 1.5]) + model_MB[2])
    assert found.metrics() == pytest.approx({
        "ppo/score/rm1-rm2": float(worst_B.mean()), "ppo/score/planted_rewards.short": -2.5,
        "ppo/score/rm3": float(model_MB[2].mean()),
        "ppo/ensemble_spread/rm1-rm2": float((model_MB[0] - model_MB[1]).abs().mean() / 2),
    })  # fmt: skip


def test_one_part_is_the_model_itself_bit_for_bit(base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "name", iterations=1)
    run_ppo(base, tmp_path / "list", iterations=1, reward=[{"models": ["rm"]}])
    assert digest(tmp_path / "name") == digest(tmp_path / "list")


def test_a_function_may_pay_with_a_value_function_of_its_own(base: BaseModel, tmp_path: Path) -> None:
    run_ppo(
        base, tmp_path / "ppo", iterations=2, reward=[{"models": ["rm"]}, {"function": "planted_rewards:proxy", "weight": 3.0}]
    )
    row = rows_of(tmp_path / "ppo")[-1]
    total = row["ppo/score/rm"] + 3 * row["ppo/score/planted_rewards.proxy"]
    assert row["ppo/score"] == pytest.approx(total, abs=1e-6)
    run_ppo(base, tmp_path / "alone", iterations=1, reward="planted_rewards:proxy")
    assert "ppo/value_loss" in rows_of(tmp_path / "alone")[0]


def test_a_function_that_failed_loses_nothing(base: BaseModel, tmp_path: Path) -> None:
    """It fails in the third iteration, before the ninth step; mended, the run goes on there and ends as one undisturbed."""
    run_ppo(base, tmp_path / "straight", reward="planted_rewards:proxy", estimator="rloo", completions=2)
    with pytest.raises(
        TrainingError, match='stage "ppo", iteration 3 · the reward function "planted_rewards:third_time" raised'
    ):
        run_ppo(base, tmp_path / "ppo", reward="planted_rewards:third_time", estimator="rloo", completions=2)
    assert newest(tmp_path / "ppo").state["step"] == 8
    run_ppo(base, tmp_path / "ppo", reward="planted_rewards:third_time", estimator="rloo", completions=2)
    assert digest(tmp_path / "ppo") == digest(tmp_path / "straight")


@pytest.mark.parametrize("weight", [1e30, -1e36])
def test_scores_whose_squares_leave_float32_stop_before_anything_is_written(
    weight: float, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match=r'"ppo" · iteration 1 · ppo/.* not finite; no step was taken'):
        run_ppo(base, tmp_path / "ppo", reward=[{"function": "planted_rewards:short", "weight": weight}])
    assert not list(tmp_path.rglob("rollouts")), "no rollouts, no samples"


def test_members_of_an_ensemble_differ_by_their_seed(base: BaseModel, tmp_path: Path) -> None:
    data = str(preferences(tmp_path / "p.jsonl"))
    found = {}
    for name, seed in (("recipe's", None), ("same", 3), ("other", 4)):
        run_stage(base, tmp_path / name, "reward", data=data, seed=3, **({} if seed is None else {"own_seed": seed}))
        found[name] = digest(tmp_path / name)["published"]
    assert found["recipe's"] == found["same"]
    different = [name for name, value in found["other"].items() if value != found["same"][name]]
    assert "base_model.model.score.weight" in different
    assert len(different) == len(found["other"])


@pytest.mark.parametrize(
    "changed, found", [("base_weights_hash", "was trained on base 000"), ("tokenizer_hash", "another tokenizer")]
)
def test_a_reward_model_of_another_base_or_tokenizer_is_refused(
    changed: str, found: str, base: BaseModel, tmp_path: Path
) -> None:
    random_reward_model(base)
    (tmp_path / "rm").mkdir()
    save_adapter(tmp_path / "rm", base.adapters.get("rm"), base)
    base.adapters.remove("rm")
    path = tmp_path / "rm/adapter_model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][changed] = "0" * 64
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    recipe = recipe_of(preferences(tmp_path / "p.jsonl", rows=20))
    (tmp_path / "ppo").mkdir()
    context = StageContext(base, Policies(base, tmp_path), recipe, tmp_path / "ppo", StopAt(0).stop)
    with pytest.raises(AdapterError, match=found):
        train_ppo(context, recipe.stage[-1])  # type: ignore[arg-type]


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reward": []}, "reward has no part · a reward stage, a function or a list of parts"),
        ({"reward": ""}, "reward has no part"),
        ({"reward": [{}]}, "a part of reward with neither models nor function · one of the two · name one"),
        ({"reward": [{"models": ["rm"], "function": "a:b"}]}, "a part of reward with both models and function"),
        ({"reward": [{"models": ["rm", "rx"]}]}, 'reward = "rx" is not an earlier reward stage · there is: rm'),
        ({"reward": [{"models": ["rm", "rm"]}]}, 'reward names "rm" twice · each once'),
        ({"reward": [{"models": ["rm"]}, {"models": ["rm"]}]}, 'reward names "rm" twice'),
        ({"reward": [{"function": "a:b"}, {"function": "a:b"}]}, 'reward names "a:b" twice'),
        ({"reward": [{"models": ["rm"], "weight": float("inf")}]}, r"reward.weight = inf · a finite number"),
        ({"reward": [{"models": ["rm"], "weight": 0.0}]}, "a part of reward with weight = 0"),
        ({"reward": [{"models": ["rm"], "wieght": 1.0}]}, 'unknown setting "wieght" · .* did you mean "weight"'),
        ({"reward": [{"models": ["rm"], "combine": "min"}]}, 'combine = "min" of 1 models · two or more'),
        ({"reward": [{"models": ["rm"], "combine": "max"}]}, "reward.combine = 'max' · 'mean', 'min' or 'mean_minus_variance'"),
        ({"reward": [{"function": "a:b", "timeout": 0.0}]}, "reward.timeout = 0.0 · greater than 0"),
        ({"reward": "a.b:c:d"}, 'reward = "a.b:c:d" is not the name of a function · package.module:function'),
        ({"reward": "../x:f"}, 'reward = "../x:f" is not the name of a function'),
        ({"reward": 3}, "reward = 3"),
        ({"gold": "rmm"}, 'gold = "rmm" is not an earlier reward stage · there is: rm, rm2 · did you mean "rm"'),
        ({"gold": [{"models": ["rm"]}], "validation": 0.0}, "gold with validation = 0 · 0 < validation < 0.5"),
        ({"gold": "rm", "gold_every": 0}, "gold_every = 0 · greater than or equal to 1"),
        ({"gold": "rm", "gold_compare": ["dpo"]}, 'gold_compare = "dpo" is not an earlier policy stage'),
        ({"gold_compare": ["rm"]}, "gold_compare without gold"),
    ],
)  # fmt: skip
def test_what_a_reward_may_not_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path / "p.jsonl", **change)


def test_two_parts_that_metrics_would_call_the_same(tmp_path: Path) -> None:
    """Stages and functions are joined into one name: a and b with a-b, a.b with a:b."""
    for names, parts, called in (
        (("a", "b", "a-b"), [{"models": ["a", "b"]}, {"models": ["a-b"]}], "a-b"),
        (("a.b",), [{"function": "a:b"}, {"models": ["a.b"]}], "a.b"),
    ):
        rewards = [{"kind": "reward", "name": name, "data": "p.jsonl"} for name in names]
        ppo = {"kind": "ppo", "name": "ppo", "reward": parts, "data": "p.jsonl"}
        with pytest.raises(RecipeError, match=f'reward has two parts with the name "{called}" in metrics · different names'):
            parse_recipe({"name": "t", "base": {"model": "random:tiny"}, "stage": [*rewards, ppo]})


def test_a_reward_that_no_stage_can_give(tmp_path: Path) -> None:
    ppo = {"kind": "ppo", "name": "ppo", "reward": "rm", "data": "p.jsonl", **SMALL}
    with pytest.raises(RecipeError, match=r"there is none · add one above, or name a function as package\.module:function"):
        parse_recipe({"name": "t", "base": {"model": "random:tiny"}, "stage": [ppo]})
    found = parse_recipe({"name": "t", "base": {"model": "random:tiny"}, "stage": [{**ppo, "reward": "a.b:c"}]}).stage[0]
    assert isinstance(found, PpoStage), "a function needs no reward stage"

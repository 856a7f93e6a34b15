"""Gold on the tiny model: promise B12, the best policy is the one published, and a stopped run goes on as one undisturbed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_stages import StopAt, digest, preferences, rows_of

from posttrain.data.prompts import prepare_prompts
from posttrain.errors import DataError, Interrupted, TrainingError
from posttrain.evaluate.gain import GOLD, PUBLISHED
from posttrain.models.adapter_files import Policies, load_adapter
from posttrain.models.base_model import BaseModel
from posttrain.recipe import parse_recipe
from posttrain.stages.ppo import PpoStage
from posttrain.train.ppo import train_ppo
from posttrain.train.stage import StageContext, StageResult

LEARNS: dict[str, Any] = {
    "estimator": "grpo", "prompts": 8, "completions": 16, "minibatch": 4, "iterations": 20, "max_new_tokens": 8,
    "learning_rate": 0.02, "missing_eos_penalty": 0.0, "kl_coef": 0.0, "max_kl": 0.0, "validation": 0.45, "gold_prompts": 256,
}  # fmt: skip
SHORT: dict[str, Any] = {"iterations": 3, "completions": 2, "max_new_tokens": 4, "gold_prompts": 16, "rows": 60}


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward functions of tests are found as a user's are: by PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


def run_gold(
    base: BaseModel, folder: Path, *, seed: int = 0, stop_at: int = 0, rows: int = 600, compare: str = "", **stage: Any
) -> StageResult:  # fmt: skip
    """Train against the planted reward, resuming what is in the folder."""
    data = preferences(folder.parent / "p.jsonl", rows=rows)
    raw = {
        "kind": "ppo", "name": "ppo", "data": str(data), "reward": "planted_rewards:proxy", "gold": "planted_rewards:no_more",
        **LEARNS, **stage,
    }  # fmt: skip
    model = {"model": "random:tiny"}
    recipe = parse_recipe({"name": "t", "base": model, "adapter": {"rank": 4}, "stage": [raw], "seed": seed})
    (ppo,) = recipe.stage
    assert isinstance(ppo, PpoStage)
    ppo = ppo.model_copy(update={"gold_compare": (compare,) if compare else ()})
    folder.mkdir(parents=True, exist_ok=True)
    stopper = StopAt(stop_at)
    context = StageContext(base, Policies(base, folder.parent), recipe, folder, stopper.stop, (stopper,))
    return train_ppo(context, ppo)


def evaluations(folder: Path, name: str = GOLD) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def is_stopped_in_time(base: BaseModel, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The planted reward: gold rises, then falls; the run ends before it has lost a tenth of its best."""
    result = run_gold(base, folder, seed=seed)
    rows = evaluations(folder)
    gold = [row["gold"] for row in rows]
    best = gold.index(max(gold))
    assert best > 0, "at first the planted reward teaches what is wanted"
    assert rows[-1]["iteration"] < LEARNS["iterations"], f"stopped: {gold}"
    assert 0.9 * gold[best] < gold[-1] < gold[best], gold
    assert rows[-1]["score"] > rows[best]["score"]
    (warning,) = result.warnings
    assert warning.startswith("over-optimisation: gold fell by 0.0")
    assert warning.endswith(f"published is the policy after iteration {best}")
    start, published = evaluations(folder, PUBLISHED)
    assert [(row["policy"], row["iteration"]) for row in (start, published)] == [("base", 0), ("ppo", best)]
    assert (start["kl"], result.fit.metrics["ppo/gold"]) == (0.0, published["gold"]), "reported is what chose nothing"
    assert start["gold_B"] != rows[0]["gold_B"], "the answers are fresh"
    assert published["gold_B"] != rows[best]["gold_B"]
    return rows


def is_not_stopped(base: BaseModel, folder: Path, seed: int, **stage: Any) -> None:
    """A clean reward: gold goes along with it and then stands still."""
    result = run_gold(base, folder, seed=seed, gold="planted_rewards:enough", **stage)
    rows = evaluations(folder)
    assert [row["iteration"] for row in rows] == list(range(1 + stage.get("iterations", LEARNS["iterations"])))
    assert rows[-1]["gold"] > rows[0]["gold"] + 0.02
    assert result.warnings == ()


def test_b12_a_planted_reward_is_stopped_before_gold_falls_10_percent(base: BaseModel, tmp_path: Path) -> None:
    """1 of 1 here, 5 of 5 in the slow test. What is published is the best by gold: it gives the very same answers again."""
    rows = is_stopped_in_time(base, tmp_path / "ppo", 4)
    assert rows[0]["kl"] == 0.0, "policy and init are the same"
    assert rows[-1]["kl"] > rows[1]["kl"] > 0
    best = max(rows, key=lambda row: row["gold"])
    load_adapter(tmp_path / "ppo", "earlier", base)
    run_gold(base, tmp_path / "other", seed=4, iterations=1, compare="earlier")
    (again,) = [row for row in evaluations(tmp_path / "other") if row["policy"] == "earlier"]
    assert (again["gold_B"], again["score_B"]) == (best["gold_B"], best["score_B"])
    assert again["kl_B"] == pytest.approx(best["kl_B"], abs=1e-4)


def test_b12_a_clean_run_is_not_stopped(base: BaseModel, tmp_path: Path) -> None:
    """0 of 1 here, 0 of 5 in the slow test."""
    is_not_stopped(base, tmp_path / "ppo", 4, iterations=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_b12_0_of_5_clean_runs_stopped_and_planted_ones_before_gold_falls_10_percent(
    seed: int, base: BaseModel, tmp_path: Path
) -> None:
    """0 of 5 clean runs stopped; 5 of 5 planted ones stopped before gold falls 10 %."""
    is_not_stopped(base, tmp_path / "clean/ppo", seed)
    is_stopped_in_time(base, tmp_path / "planted/ppo", seed)


def test_stopped_runs_go_on_as_one_undisturbed(base: BaseModel, tmp_path: Path) -> None:
    """Inside of an iteration, and after its last step, where gold is measured."""
    run_gold(base, tmp_path / "straight", **SHORT)
    wanted, gold = digest(tmp_path / "straight"), (tmp_path / "straight/gold.jsonl").read_bytes()
    for step in (2, 8):
        with pytest.raises(Interrupted):
            run_gold(base, tmp_path / f"at-{step}", stop_at=step, **SHORT)
        run_gold(base, tmp_path / f"at-{step}", **SHORT)
        assert digest(tmp_path / f"at-{step}") == wanted
        assert (tmp_path / f"at-{step}/gold.jsonl").read_bytes() == gold
        assert evaluations(tmp_path / f"at-{step}", PUBLISHED) == evaluations(tmp_path / "straight", PUBLISHED)
    assert [row.get("ppo/gold") is not None for row in wanted["rows"]] == [False, False, False, True] * 3


def test_gold_that_fails_loses_nothing(base: BaseModel, tmp_path: Path) -> None:
    """It fails when it is asked after the second iteration, whose steps are kept, and again on the fresh answers of the start,
    when every step was taken; mended, it is asked again."""
    run_gold(base, tmp_path / "straight", gold="planted_rewards:proxy", **SHORT)
    with pytest.raises(
        TrainingError, match='"ppo", evaluation after iteration 2 · the reward function "planted_rewards:third_'
    ):
        run_gold(base, tmp_path / "ppo", gold="planted_rewards:third_time", **SHORT)
    with pytest.raises(TrainingError, match='"ppo", evaluation after iteration 0 · the reward function'):
        run_gold(base, tmp_path / "ppo", gold="planted_rewards:third_time", **SHORT)
    run_gold(base, tmp_path / "ppo", gold="planted_rewards:third_time", **SHORT)
    assert evaluations(tmp_path / "ppo", PUBLISHED) == evaluations(tmp_path / "straight", PUBLISHED)
    assert digest(tmp_path / "ppo") == digest(tmp_path / "straight")
    assert [row["iteration"] for row in evaluations(tmp_path / "ppo")] == [0, 1, 2, 3]


def test_gold_is_measured_where_it_is_due(base: BaseModel, tmp_path: Path) -> None:
    run_gold(base, tmp_path / "ppo", gold_every=2, **SHORT)
    rows = evaluations(tmp_path / "ppo")
    assert [row["iteration"] for row in rows] == [0, 2, 3], "the last one always"
    assert all(len(row[f"{key}_B"]) == 16 for row in rows for key in ("kl", "score", "gold"))
    assert [row["step"] for row in rows_of(tmp_path / "ppo") if "ppo/gold_se" in row] == [8, 12]


def test_gold_that_pays_is_told(base: BaseModel, tmp_path: Path) -> None:
    """What is the same, or a part of it, cannot fall while the score rises: the rule would never stop anything."""
    result = run_gold(base, tmp_path / "ppo", gold="planted_rewards:proxy", **{**SHORT, "iterations": 1})
    (warning,) = result.warnings
    assert warning.startswith("gold is also part of the reward: planted_rewards:proxy; ")
    assert run_gold(base, tmp_path / "other", **{**SHORT, "iterations": 1}).warnings == ()


def test_gold_needs_prompts_that_are_held_out(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='stage "ppo" · 0 prompts held out for gold · at least 2 · raise validation'):
        run_gold(base, tmp_path / "ppo", **{**SHORT, "validation": 0.001})
    data = str(preferences(tmp_path / "q.jsonl", rows=60))
    keywords: dict[str, Any] = {"seed": 0, "max_prompt_tokens": 90, "evaluation_prompts": ()}
    whole = prepare_prompts(data, base.chat, **keywords)
    some = prepare_prompts(data, base.chat, validation=0.3, **keywords)
    assert whole.validation == []
    assert {row.id for row in some.train}.isdisjoint(row.id for row in some.validation)
    assert len(some.train) + len(some.validation) == len(whole.train) == 60
    assert some.report["validation_rows"] == len(some.validation) > 5
    assert whole.train[0].text == "red 0?"


def test_evaluations_that_are_gone_are_told(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_gold(base, tmp_path / "ppo", stop_at=8, **SHORT)
    (tmp_path / "ppo/gold.jsonl").write_text("{}")
    with pytest.raises(TrainingError, match=r"rows of gold\.jsonl are missing · remove the stage's unfinished folder"):
        run_gold(base, tmp_path / "ppo", **SHORT)

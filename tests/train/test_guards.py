"""What ends a ppo stage early, what it leaves then, and what must not go on: ceilings, equal samples, numbers that are none."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import random_reward_model, run_ppo
from tiny_stages import newest, rows_of

from posttrain.errors import Interrupted, NonFiniteError
from posttrain.models.base_model import BaseModel
from posttrain.stages.ppo import PpoStage
from posttrain.train.checkpoint import load_newest, save_checkpoint
from posttrain.train.guards import check_sampled, why_ended
from posttrain.train.rollouts import ScoredSamples

FAST: dict[str, Any] = {"iterations": 9, "learning_rate": 2e-2}


def test_the_kl_ceiling_ends_the_stage_which_publishes_what_it_has(base: BaseModel, tmp_path: Path) -> None:
    folder = tmp_path / "ppo"
    result = run_ppo(base, folder, **FAST, max_kl=0.5)
    assert result.fit.steps % 4 == 0, "before the first step of an iteration"
    assert 4 <= result.fit.steps < 36
    assert newest(folder).state["finished"]
    assert (folder / "adapter_model.safetensors").exists()
    (why,) = result.warnings
    assert why.startswith(f"ended after {result.fit.steps // 4} of 9 iterations: KL to the reference is ")
    assert why.endswith("nats a completion, above max_kl = 0.5; lower learning_rate or raise kl_coef")
    assert run_ppo(base, folder, **FAST, max_kl=0.5) == result, "a finished stage says it again"


def test_equal_samples_end_the_stage(base: BaseModel, tmp_path: Path) -> None:
    """The random base is unsure of every token: a floor of 5.5 nats (of at most log 263 = 5.57) is passed soon."""
    result = run_ppo(base, tmp_path / "ppo", **FAST, kl_coef=0.0, min_entropy=5.2)
    (why,) = result.warnings
    assert "nats a token, below min_entropy = 5.2; lower" in why
    assert result.fit.steps < 36
    assert all(row["ppo/entropy"] >= 5.2 for row in rows_of(tmp_path / "ppo"))


def test_a_stage_may_end_before_its_first_step(base: BaseModel, tmp_path: Path) -> None:
    result = run_ppo(base, tmp_path / "ppo", min_entropy=6.0)
    assert result.fit.steps == 0
    assert result.warnings[0].startswith("ended after 0 of 3 iterations: the samples' entropy is 5.")
    assert (tmp_path / "ppo/adapter_model.safetensors").exists()


def test_a_stage_that_runs_to_its_end_warns_of_nothing(base: BaseModel, tmp_path: Path) -> None:
    assert run_ppo(base, tmp_path / "ppo", iterations=1).warnings == ()


def test_passes_that_would_go_too_far_are_left_out(base: BaseModel, tmp_path: Path) -> None:
    """With a bound that every pass breaks, each iteration takes its first pass alone; a row counts the steps that follow it."""
    result = run_ppo(base, tmp_path / "ppo", ppo_epochs=3, max_update_kl=1e-9)
    assert [row["step"] for row in rows_of(tmp_path / "ppo")] == [1, 6, 7, 12, 13, 18], (
        "a row counts the steps left out after it"
    )
    assert result.fit.steps == 6
    whole = run_ppo(base, tmp_path / "whole", ppo_epochs=3, max_update_kl=1e9)
    assert whole.fit.steps == 18


def figures(**changes: float) -> dict[str, float]:
    return {"ppo/kl": 1.0, "ppo/entropy": 1.0, **changes}


def test_guards_that_are_turned_off_end_nothing() -> None:
    stage = PpoStage(kind="ppo", name="p", reward="rm", data="x", max_kl=0.0, min_entropy=0.0)
    assert why_ended({"ppo/kl": 1e9, "ppo/entropy": 0.0}, stage) == ""
    stage = PpoStage(kind="ppo", name="p", reward="rm", data="x")
    assert why_ended({"ppo/kl": 49.0, "ppo/entropy": 0.02}, stage) == ""
    assert "max_kl" in why_ended({"ppo/kl": 51.0, "ppo/entropy": 1.0}, stage)
    assert "min_entropy" in why_ended({"ppo/kl": 1.0, "ppo/entropy": 0.009}, stage)


@pytest.mark.parametrize(
    "what, place, told",
    [
        ("score_B", 1, "the score of 1 of 3 completions is not finite; no step was taken on them · their prompts: b"),
        ("old_N", 0, "the log-probability of 1 of 3 completions .* their prompts: a"),
        ("reference_N", 5, "the reference's log-probability of 1 of 3 completions .* their prompts: c"),
        ("value_N", 3, "the value of 1 of 3 completions .* their prompts: b"),
    ],
)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_none_names_its_prompt(what: str, place: int, told: str, number: float) -> None:
    """Completions of 2, 2 and 2 tokens."""
    flat, whole = torch.zeros(6), torch.zeros(3)
    sampled = ScoredSamples([[1], [1], [1]], [[[3, 4]], [[3, 4]], [[3, 4]]], whole, whole, flat, flat, flat, flat)
    check_sampled(sampled, ("a", "b", "c"), where="x")
    bad = getattr(sampled, what).clone()
    bad[place] = number
    with pytest.raises(NonFiniteError, match=told):
        check_sampled(sampled._replace(**{what: bad}), ("a", "b", "c"), where="x")


def test_a_reward_model_that_answers_no_number_stops_before_anything_is_written(base: BaseModel, tmp_path: Path) -> None:
    random_reward_model(base)
    head = base.adapters.get("rm").head
    assert head is not None
    head.weight.data[0, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r'stage "ppo" · iteration 1 · the score of 6 of 6 .* their prompts: pair-'):
        run_ppo(base, tmp_path / "ppo")
    assert rows_of(tmp_path / "ppo") == []
    assert not list(tmp_path.rglob("rollouts")), "no rollouts, no samples"
    assert not (tmp_path / "ppo/samples.jsonl").exists()


@pytest.mark.parametrize("tensor", ["advantage", "return", "old"])
def test_a_number_that_is_none_in_the_update_stops_before_the_step(tensor: str, base: BaseModel, tmp_path: Path) -> None:
    folder = tmp_path / "ppo"
    with pytest.raises(Interrupted):
        run_ppo(base, folder, stop_at=1)
    kept = load_newest(folder / "checkpoints/rollouts")
    assert kept is not None
    kept.tensors[tensor][-1] = math.nan
    save_checkpoint(folder / "checkpoints/rollouts", 0, kept)
    with pytest.raises(
        NonFiniteError, match=r"step 2 · the loss is not finite; the step was not taken · rows .*pair-\d+ \(iteration 1\)"
    ):
        run_ppo(base, folder)
    assert newest(folder).state["step"] == 1

"""An iteration's rollouts judged: hand-worked figures; rows that are empty, never end, repeat themselves or score the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.stages.ppo import PpoStage
from posttrain.train.rollouts import ScoredSamples, estimate_advantages, from_tensors, repetition, to_tensors


def sampled(completions: list[list[list[int]]], score: list[float], **changes: Tensor) -> ScoredSamples:
    """Completions whose log-probabilities are all -1, from a policy at its reference, with values of 0."""
    flat = torch.zeros(sum(len(c) for group in completions for c in group))
    ended = torch.ones(len(score), dtype=torch.bool)
    found = ScoredSamples([[1]] * len(completions), completions, ended, torch.tensor(score), flat - 1, flat - 1, flat - 1, flat)
    return found._replace(**changes)


def stage_of(**changes: Any) -> PpoStage:
    return PpoStage(kind="ppo", name="p", reward="rm", data="x", **{"gamma": 1.0, "lam": 1.0, **changes})


@pytest.mark.parametrize(
    "completion, share",
    [
        ([], 0.0), ([1, 2, 3, 4], 0.0), ([1] * 5, 0.5), ([1] * 13, 0.9), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),
        (list(range(40)), 0.0),
    ],
)  # fmt: skip
def test_repetition_is_the_share_of_runs_of_four_seen_before(completion: list[int], share: float) -> None:
    assert repetition(completion) == pytest.approx(share)


def test_figures_of_an_iteration_are_those_worked_by_hand() -> None:
    """Two completions of 2 and 1 tokens that score 3 and 0; without discount and KL each token of the first is worth 3."""
    found = estimate_advantages(sampled([[[7, 8]], [[9]]], [3.0, 0.0]), stage_of(), 0.0)
    stats = found.stats
    assert stats["ppo/advantage"] == pytest.approx(2.0)
    assert stats["ppo/advantage_spread"] == pytest.approx(2**0.5)
    assert found.return_N.tolist() == [3.0, 3.0, 0.0]
    assert stats["ppo/entropy"] == 1.0
    assert stats["ppo/length"] == 1.5
    assert stats["ppo/explained_variance"] == 0.0, "values of 0 explain nothing"
    exact = estimate_advantages(sampled([[[7, 8]], [[9]]], [3.0, 0.0], value_N=torch.tensor([3.0, 3.0, 0.0])), stage_of(), 0.0)
    assert exact.stats["ppo/explained_variance"] == 1.0
    assert exact.advantage_N.tolist() == [0.0] * 3
    restored = from_tensors(*to_tensors(found))
    assert restored.stats == stats
    assert torch.equal(restored.advantage_N, found.advantage_N)


@pytest.mark.parametrize("whiten", [False, True])
def test_an_empty_completion_takes_part_in_no_token_and_disturbs_none(whiten: bool) -> None:
    stage = stage_of(whiten_rewards=whiten)
    alone = estimate_advantages(sampled([[[7, 8]], [[9]]], [3.0, 1.0]), stage, 0.1)
    beside = estimate_advantages(sampled([[[7, 8]], [[]], [[9]]], [3.0, 50.0, 1.0]), stage, 0.1)
    assert torch.equal(alone.advantage_N, beside.advantage_N)
    assert torch.equal(alone.return_N, beside.return_N)
    assert beside.stats["ppo/length"] == 1.0


def test_one_token_alone_is_no_division_by_zero() -> None:
    found = estimate_advantages(sampled([[[7]]], [3.0]), stage_of(), 0.1)
    assert all(torch.tensor(value).isfinite() for value in found.stats.values())
    assert found.advantage_N.isfinite().all()


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_equal_scores_teach_nothing_and_a_missing_end_costs(estimator: str) -> None:
    stage = PpoStage(kind="ppo", name="p", reward="rm", data="x", estimator=estimator, completions=2, missing_eos_penalty=0.5)
    equal = estimate_advantages(sampled([[[7, 8], [9]]], [3.0, 3.0]), stage, 0.1)
    assert equal.advantage_N.tolist() == [0.0] * 3
    endless = estimate_advantages(sampled([[[7, 8], [9]]], [3.0, 3.0], ended_B=torch.tensor([False, True])), stage, 0.1)
    assert (endless.advantage_N[:2] < 0).all()
    assert endless.advantage_N[2] > 0
    assert endless.stats["ppo/score"] == 3.0, "the score is shown before the penalty, the reward after it"
    assert endless.stats["ppo/reward"] == 2.75

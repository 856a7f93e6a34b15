"""The reward loss against hand-worked values and float64."""

from math import exp, isclose, log, log1p

import pytest
import torch
from torch import Tensor

from posttrain.losses.output import LossOutput
from posttrain.losses.reward import ScoredPairs, reward_loss


def pairs(
    chosen: list[float], rejected: list[float], *, margin: float = 0.0, label: float = 1.0, share: list[float] | None = None
) -> ScoredPairs:
    n = len(chosen)
    return ScoredPairs(
        torch.tensor(chosen), torch.tensor(rejected), torch.full((n,), margin), torch.full((n,), label),
        torch.tensor(share or [1.0] * n),
    )  # fmt: skip


def value(out: LossOutput) -> float:
    return float(out.loss)


def test_equal_scores_cost_log_two() -> None:
    out = reward_loss(pairs([0.3, -2.0], [0.3, -2.0]))
    assert isclose(value(out), log(2), rel_tol=1e-6)
    assert float(out.metrics["reward/accuracy"]) == 0, "a tie is not right"


def test_hand_worked_pair() -> None:
    assert isclose(value(reward_loss(pairs([1.5], [-0.5]))), log1p(exp(-2)), rel_tol=1e-6)
    assert isclose(value(reward_loss(pairs([1.5], [-0.5], margin=0.5))), log1p(exp(-1.5)), rel_tol=1e-6)


def test_a_label_of_one_half_asks_for_equal_scores() -> None:
    chosen = torch.tensor([0.0], requires_grad=True)
    given = pairs([0.0], [0.0], label=0.5)._replace(chosen_B=chosen)
    reward_loss(given).loss.backward()
    assert float(chosen.grad) == 0.0
    assert value(reward_loss(pairs([2.0], [0.0], label=0.5))) > log(2)


def test_the_minimum_of_a_soft_label_is_its_probability() -> None:
    """q = 0.8: the gap that costs least is log(0.8 / 0.2)."""
    gaps = torch.linspace(0, 3, 3001)
    costs = [value(reward_loss(pairs([float(g)], [0.0], label=0.8))) for g in gaps]
    assert isclose(float(gaps[costs.index(min(costs))]), log(4), abs_tol=2e-3)


def test_a_ranking_weighs_as_much_as_one_pair() -> None:
    """A prompt with three pairs and one with a single pair: mean of (mean of three, one)."""
    out = reward_loss(pairs([1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], share=[1 / 3] * 3 + [1.0]))
    three = (log1p(exp(-1)) + log1p(exp(-2)) + log1p(exp(-3))) / 3
    assert isclose(value(out), (three + log(2)) / 2, rel_tol=1e-6)


def test_centring_costs_the_square_of_the_sum() -> None:
    assert isclose(value(reward_loss(pairs([3.0], [1.0]), center=0.01)), log1p(exp(-2)) + 0.16, rel_tol=1e-6)


@pytest.mark.parametrize("center", [0.0, 0.02])
def test_values_and_gradients_match_float64_and_do_not_depend_on_the_cut(center: float) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(40, generator=generator, dtype=torch.float64) * 3 for _ in range(3)]
    label, share = torch.rand(40, generator=generator).double(), torch.rand(40, generator=generator).double()
    chosen, rejected = (x.clone().requires_grad_() for x in numbers[:2])
    gap = chosen - rejected - numbers[2]
    p = torch.sigmoid(gap)
    cost = -label * p.log() - (1 - label) * (1 - p).log() + center * (chosen + rejected) ** 2
    wanted = (share * cost).sum() / share.sum()
    in_chosen, in_rejected = torch.autograd.grad(wanted, [chosen, rejected])

    narrow = [x.detach().float().requires_grad_() for x in (chosen, rejected)]
    rest: list[Tensor] = [x.float() for x in (numbers[2], label, share)]
    total = torch.tensor(0.0)
    for rows in (slice(0, 7), slice(7, 40)):
        part = ScoredPairs(*(x[rows] for x in (*narrow, *rest)))
        total = total + reward_loss(part, center=center, step_prompts=float(share.sum())).loss
    total.backward()
    assert isclose(total.item(), wanted.item(), rel_tol=1e-5)
    assert torch.allclose(narrow[0].grad.double(), in_chosen, atol=1e-6)
    assert torch.allclose(narrow[1].grad.double(), in_rejected, atol=1e-6)

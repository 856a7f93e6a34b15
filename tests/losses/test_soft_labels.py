"""DPO with the probability of each label: L = q l(h) + (1 - q) l(-h), by hand, against float64, and its limits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.losses.dpo import PairLogprobs, dpo_loss

FAMILY = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)]


def random_pairs(seed: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[PairLogprobs, Tensor]:
    """Completions of -80 to 0 nats with log-ratios of some ten nats, and probabilities of their labels."""
    random = np.random.default_rng(seed)
    reference = random.uniform(-80, 0, (2, count))
    policy = reference + random.normal(0, 15, (2, count))
    columns = PairLogprobs(*(torch.tensor(x, dtype=dtype) for x in (*policy, *reference)))
    return columns, torch.tensor(random.uniform(0, 1, count), dtype=dtype)


def swapped(columns: PairLogprobs) -> PairLogprobs:
    return PairLogprobs(columns.rejected_B, columns.chosen_B, columns.reference_rejected_B, columns.reference_chosen_B)


def numpy_pair(h: float, beta: float, loss: str, smoothing: float) -> tuple[float, float]:
    """Loss of a hard label and its slope in h, written from the papers."""
    m = beta * h
    win, lose = 1 / (1 + np.exp(-m)), 1 / (1 + np.exp(m))
    if loss == "sigmoid":
        value = (1 - smoothing) * np.logaddexp(0, -m) + smoothing * np.logaddexp(0, m)
        return value, beta * (smoothing * win - (1 - smoothing) * lose)
    if loss == "robust":
        value = ((1 - smoothing) * np.logaddexp(0, -m) - smoothing * np.logaddexp(0, m)) / (1 - 2 * smoothing)
        return value, -beta * ((1 - smoothing) * lose + smoothing * win) / (1 - 2 * smoothing)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    return max(0.0, 1 - m), -beta if m < 1 else 0.0


def test_hand_worked_values() -> None:
    pair = PairLogprobs(*(torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -2.0)))  # h = 4, margin 2
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    wanted = {
        ("sigmoid", 0.0): 0.75 * right + 0.25 * wrong,
        ("robust", 0.1): (0.75 * (0.9 * right - 0.1 * wrong) + 0.25 * (0.9 * wrong - 0.1 * right)) / 0.8,
        ("ipo", 0.0): 0.75 * (4 - 1) ** 2 + 0.25 * (-4 - 1) ** 2,
        ("hinge", 0.0): 0.75 * 0 + 0.25 * 3,
    }
    label = torch.tensor([0.75], dtype=torch.float64)
    for (loss, smoothing), value in wanted.items():
        out = dpo_loss(pair, beta=0.5, loss=loss, label_smoothing=smoothing, label_B=label)
        assert out.loss.item() == pytest.approx(value, rel=1e-12), loss
        assert float(out.metrics["dpo/loss"]) == pytest.approx(value, rel=1e-12)
        assert float(out.metrics["dpo/margin"]) == 2, "a label changes what is learned, and not what is measured"


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_values_and_gradients_match_the_float64_reference_to_1e_6(loss: str, smoothing: float, beta: float) -> None:
    for seed in range(10):
        columns, label_B = random_pairs(seed, 7)
        columns = columns._replace(chosen_B=columns.chosen_B.requires_grad_(), rejected_B=columns.rejected_B.requires_grad_())
        out = dpo_loss(columns, beta=beta, loss=loss, label_smoothing=smoothing, label_B=label_B)
        chosen, rejected = torch.autograd.grad(out.loss, [columns.chosen_B, columns.rejected_B])
        gap_B = (columns.chosen_B - columns.reference_chosen_B) - (columns.rejected_B - columns.reference_rejected_B)
        value, slopes = 0.0, []
        for h, q in zip(gap_B.tolist(), label_B.tolist(), strict=True):
            right, wrong = numpy_pair(h, beta, loss, smoothing), numpy_pair(-h, beta, loss, smoothing)
            value += (q * right[0] + (1 - q) * wrong[0]) / 7
            slopes.append((q * right[1] - (1 - q) * wrong[1]) / 7)
        assert out.loss.item() == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(chosen, slopes, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(rejected, [-slope for slope in slopes], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
def test_labels_of_1_change_no_bit(loss: str, smoothing: float) -> None:
    different = 0
    for seed in range(20):
        columns, _ = random_pairs(seed, 9, torch.float32)
        results = []
        for label_B in (None, torch.ones(9)):
            chosen = columns.chosen_B.clone().requires_grad_()
            out = dpo_loss(columns._replace(chosen_B=chosen), beta=0.1, loss=loss, label_smoothing=smoothing, label_B=label_B)
            results.append([out.loss, torch.autograd.grad(out.loss, chosen)[0], *out.metrics.values()])
        different += sum(not torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert different == 0


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
def test_a_label_of_one_half_prefers_nothing(loss: str, smoothing: float) -> None:
    """At h = 0 the gradient is exactly 0, and on both sides it leads back there."""
    rest = torch.zeros(3, dtype=torch.float64)
    gap = torch.tensor([0.0, 20.0, -20.0], dtype=torch.float64, requires_grad=True)
    out = dpo_loss(
        PairLogprobs(gap, rest, rest, rest), beta=0.1, loss=loss, label_smoothing=smoothing, label_B=torch.full_like(rest, 0.5)
    )
    slope = torch.autograd.grad(out.loss, gap)[0].tolist()
    assert slope[0] == 0
    assert slope[1] > 0 > slope[2]


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
def test_swapped_sides_with_the_opposite_probability_are_the_same_pair(loss: str, smoothing: float) -> None:
    columns, label_B = random_pairs(5, 12)
    straight = dpo_loss(columns, beta=0.1, loss=loss, label_smoothing=smoothing, label_B=label_B)
    crossed = dpo_loss(swapped(columns), beta=0.1, loss=loss, label_smoothing=smoothing, label_B=1 - label_B)
    assert crossed.loss.item() == pytest.approx(straight.loss.item(), rel=1e-14)
    assert float(crossed.metrics["dpo/margin"]) == -float(straight.metrics["dpo/margin"])


def test_for_the_sigmoid_a_soft_label_is_label_smoothing_of_its_pair() -> None:
    columns, _ = random_pairs(3, 8)
    for q in (0.9, 0.6, 0.51):
        soft = dpo_loss(columns, beta=0.1, label_B=torch.full((8,), q, dtype=torch.float64))
        smoothed = dpo_loss(columns, beta=0.1, label_smoothing=1 - q)
        assert soft.loss.item() == pytest.approx(smoothed.loss.item(), rel=1e-14)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7, 0.95])
def test_the_least_value_is_where_the_policy_agrees_with_the_label(q: float) -> None:
    """sigma(beta h) = q for the sigmoid, h = (2 q - 1) / (2 beta) for IPO."""
    rest, beta = torch.zeros(1, dtype=torch.float64), 0.3
    for loss, gap in (("sigmoid", math.log(q / (1 - q)) / beta), ("ipo", (2 * q - 1) / (2 * beta))):
        chosen = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
        out = dpo_loss(PairLogprobs(chosen, rest, rest, rest), beta=beta, loss=loss, label_B=torch.full_like(rest, q))
        assert torch.autograd.grad(out.loss, chosen)[0].item() == pytest.approx(0, abs=1e-14), loss


@pytest.mark.parametrize("cuts", [(1,) * 11, (4, 4, 3), (10, 1)])
def test_one_batch_equals_its_micro_batches_also_where_one_of_them_has_hard_labels(cuts: tuple[int, ...]) -> None:
    columns, label_B = random_pairs(11, 11)
    label_B[-1] = 1.0
    whole = dpo_loss(columns, beta=0.1, label_B=label_B).loss
    parts = zip(*(c.split(list(cuts)) for c in (*columns, label_B)), strict=True)
    total = sum(
        dpo_loss(PairLogprobs(*p[:4]), beta=0.1, step_pairs=11, label_B=None if bool((p[4] == 1).all()) else p[4]).loss
        for p in parts
    )
    assert float(total) == pytest.approx(whole.item(), rel=1e-12)


def test_no_margin_is_too_large() -> None:
    for sign in (1.0, -1.0):
        columns = PairLogprobs(*(torch.tensor([x], requires_grad=True) for x in (sign * 1e5, 0.0, 0.0, 0.0)))
        for loss, smoothing in FAMILY:
            out = dpo_loss(columns, beta=0.1, loss=loss, label_smoothing=smoothing, label_B=torch.tensor([0.7]))
            assert torch.isfinite(out.loss), loss
            assert torch.isfinite(torch.autograd.grad(out.loss, columns.chosen_B)[0]).all(), loss

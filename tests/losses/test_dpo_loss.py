"""The DPO family against hand-worked values, a float64 reference and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.losses.dpo import PairLogprobs, dpo_loss, log_ratio_divergence

# (loss, label smoothing), each with a beta in the range that people use
FAMILY = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)]


def pairs(*columns: list[float]) -> PairLogprobs:
    """Float64 pairs from the four columns chosen, rejected, reference chosen, reference rejected."""
    return PairLogprobs(*(torch.tensor(c, dtype=torch.float64) for c in columns))


def random_pairs(seed: int, count: int) -> PairLogprobs:
    """Completions of -80 to 0 nats whose log-ratios reach both tails of the sigmoid."""
    random = np.random.default_rng(seed)
    reference = random.uniform(-80, 0, (2, count))
    policy = reference + random.normal(0, 15, (2, count))
    return PairLogprobs(*(torch.tensor(x) for x in (*policy, *reference)))


def numpy_reference(columns: PairLogprobs, beta: float, loss: str, smoothing: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean loss and its gradients in chosen and rejected, written from the papers: float64, one pair at a time."""
    chosen, rejected, reference_chosen, reference_rejected = (np.asarray(c, dtype=np.float64) for c in columns)
    total, slopes = 0.0, []
    for h in (chosen - reference_chosen) - (rejected - reference_rejected):
        m = beta * h
        win, lose = 1 / (1 + np.exp(-m)), 1 / (1 + np.exp(m))
        cost_true, cost_flipped = np.logaddexp(0, -m), np.logaddexp(0, m)
        if loss == "sigmoid":
            total += (1 - smoothing) * cost_true + smoothing * cost_flipped
            slope = beta * (smoothing * win - (1 - smoothing) * lose)
        elif loss == "robust":
            total += ((1 - smoothing) * cost_true - smoothing * cost_flipped) / (1 - 2 * smoothing)
            slope = -beta * ((1 - smoothing) * lose + smoothing * win) / (1 - 2 * smoothing)
        elif loss == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
            slope = 2 * (h - 1 / (2 * beta))
        else:
            total += max(0.0, 1 - m)
            slope = -beta if m < 1 else 0.0
        slopes.append(slope)
    slope_B = np.array(slopes) / len(slopes)
    return total / len(slopes), slope_B, -slope_B


def test_policy_at_its_reference_costs_ln_2() -> None:
    rest = pairs([-12.0, -3.0], [-9.0, -30.0], [-12.0, -3.0], [-9.0, -30.0])
    out = dpo_loss(rest, beta=0.1)
    assert out.loss.item() == pytest.approx(0.693147, abs=5e-7)
    assert float(out.metrics["dpo/accuracy"]) == 0  # a tie is no win
    assert float(out.metrics["dpo/gradient_weight"]) == 2 * 0.5


def test_hand_worked_pair() -> None:
    # margin = 0.5 * ((-1 + 3) - (-4 + 2)) = 2;  -log sigmoid(2) = log(1 + e^-2)
    out = dpo_loss(pairs([-1.0], [-4.0], [-3.0], [-2.0]), beta=0.5)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-12)
    assert float(out.metrics["dpo/margin"]) == 2
    assert float(out.metrics["dpo/accuracy"]) == 1
    assert float(out.metrics["dpo/chosen_log_ratio"]) == 2
    assert float(out.metrics["dpo/rejected_log_ratio"]) == -2
    assert float(out.metrics["dpo/chosen_logprob"]) == -1
    assert float(out.metrics["dpo/gradient_weight"]) == pytest.approx(1 / (1 + math.exp(2)), rel=1e-12)


def test_hand_worked_relatives() -> None:
    pair = pairs([-1.0], [-4.0], [-3.0], [-2.0])  # h = 4, margin 2
    cost, flipped = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    value = {
        ("sigmoid", 0.1): 0.9 * cost + 0.1 * flipped,
        ("robust", 0.1): (0.9 * cost - 0.1 * flipped) / 0.8,
        ("ipo", 0.0): (4 - 1) ** 2,  # 1 / (2 * 0.5) = 1
        ("hinge", 0.0): 0.0,  # margin 2 is past the hinge
    }
    for (loss, smoothing), wanted in value.items():
        found = dpo_loss(pair, beta=0.5, loss=loss, label_smoothing=smoothing).loss.item()
        assert found == pytest.approx(wanted, rel=1e-12), loss
    assert dpo_loss(pair, beta=0.125, loss="hinge").loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_values_and_gradients_match_the_float64_reference_to_1e_6(loss: str, smoothing: float, beta: float) -> None:
    for seed in range(10):
        columns = PairLogprobs(*(c.requires_grad_() for c in random_pairs(seed, 7)))
        out = dpo_loss(columns, beta=beta, loss=loss, label_smoothing=smoothing)
        gradients = torch.autograd.grad(out.loss, columns)
        value, chosen, rejected = numpy_reference(PairLogprobs(*(c.detach() for c in columns)), beta, loss, smoothing)
        assert out.loss.item() == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(gradients[0], chosen, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(gradients[1], rejected, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(gradients[2], -chosen, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
def test_gradients_match_finite_differences(loss: str, smoothing: float) -> None:
    columns = random_pairs(3, 5)

    def value(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = columns._replace(chosen_B=chosen, rejected_B=rejected)
        return dpo_loss(moved, beta=0.3, loss=loss, label_smoothing=smoothing).loss

    leaves = [columns.chosen_B.requires_grad_(), columns.rejected_B.requires_grad_()]
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_swapped_labels_flip_the_sign_of_margin_and_gradient(loss: str) -> None:
    columns = random_pairs(5, 6)
    swapped = PairLogprobs(columns.rejected_B, columns.chosen_B, columns.reference_rejected_B, columns.reference_chosen_B)
    straight, crossed = (dpo_loss(c, beta=0.1, loss=loss) for c in (columns, swapped))
    assert float(crossed.metrics["dpo/margin"]) == -float(straight.metrics["dpo/margin"])
    point = torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)  # at the reference, on either side of the pair
    rest = torch.tensor([-5.0], dtype=torch.float64)
    pulls = [
        torch.autograd.grad(dpo_loss(PairLogprobs(*sides, rest, rest), beta=0.1, loss=loss).loss, point)[0].item()
        for sides in ((point, rest), (rest, point))
    ]
    assert pulls[0] == -pulls[1] < 0


def test_label_smoothing_is_really_applied_to_the_sigmoid() -> None:
    """cDPO: half the labels wrong means no preference at all; the minimum lies at the odds of a right label."""
    sure = pairs([0.0], [-1000.0], [0.0], [0.0])
    assert dpo_loss(sure, beta=0.1).loss.item() == pytest.approx(0, abs=1e-12)
    assert dpo_loss(sure, beta=0.1, label_smoothing=0.1).loss.item() == pytest.approx(0.1 * 100)
    best = math.log(0.8 / 0.2) / 0.1  # sigmoid(beta h) = 1 - e
    chosen = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    out = dpo_loss(PairLogprobs(chosen, zero, zero, zero), beta=0.1, label_smoothing=0.2)
    assert torch.autograd.grad(out.loss, chosen)[0].item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("flipped", [0.05, 0.2, 0.45])
def test_robust_loss_under_flipped_labels_is_the_clean_loss_on_average(flipped: float) -> None:
    columns = random_pairs(7, 20)
    crossed = PairLogprobs(columns.rejected_B, columns.chosen_B, columns.reference_rejected_B, columns.reference_chosen_B)
    right, wrong = (dpo_loss(c, beta=0.1, loss="robust", label_smoothing=flipped).loss.item() for c in (columns, crossed))
    clean = dpo_loss(columns, beta=0.1).loss.item()
    assert (1 - flipped) * right + flipped * wrong == pytest.approx(clean, rel=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_least_where_the_gap_is_half_of_one_over_beta(beta: float) -> None:
    gap = 1 / (2 * beta)
    chosen = torch.tensor([-10 + gap], dtype=torch.float64, requires_grad=True)
    rest = torch.tensor([-10.0], dtype=torch.float64)
    out = dpo_loss(PairLogprobs(chosen, rest, rest, rest), beta=beta, loss="ipo")
    assert out.loss.item() == 0
    assert torch.autograd.grad(out.loss, chosen)[0].item() == 0


def test_hinge_pulls_with_beta_up_to_margin_one_and_not_beyond() -> None:
    chosen = torch.tensor([9.0, 11.0], dtype=torch.float64, requires_grad=True)  # margins 0.9 and 1.1
    zero = torch.zeros(2, dtype=torch.float64)
    out = dpo_loss(PairLogprobs(chosen, zero, zero, zero), beta=0.1, loss="hinge")
    assert out.loss.item() == pytest.approx(0.1 / 2)
    assert torch.autograd.grad(out.loss, chosen)[0].tolist() == pytest.approx([-0.05, 0.0])


def test_no_margin_is_too_large() -> None:
    """A margin of ten thousand nats overflows e^m; neither loss nor gradient may."""
    for sign in (1.0, -1.0):
        columns = PairLogprobs(*(torch.tensor([x], requires_grad=True) for x in (sign * 1e5, 0.0, 0.0, 0.0)))
        for loss, smoothing in FAMILY:
            out = dpo_loss(columns, beta=0.1, loss=loss, label_smoothing=smoothing)
            gradient = torch.autograd.grad(out.loss, columns.chosen_B)[0]
            assert torch.isfinite(out.loss), loss
            assert torch.isfinite(gradient).all(), loss


@pytest.mark.parametrize(("loss", "smoothing"), FAMILY)
@pytest.mark.parametrize("cuts", [(1,) * 11, (4, 4, 3), (10, 1)])
def test_one_batch_equals_its_micro_batches_also_with_a_ragged_last_one(
    loss: str, smoothing: float, cuts: tuple[int, ...]
) -> None:
    columns = random_pairs(11, 11)

    def gradient(sizes: tuple[int, ...], step_pairs: int) -> tuple[Tensor, Tensor]:
        chosen = columns.chosen_B.detach().float().requires_grad_()
        parts = zip(*(c.split(list(sizes)) for c in (chosen, *(x.float() for x in columns[1:]))), strict=True)
        total = sum(
            dpo_loss(PairLogprobs(*p), beta=0.1, loss=loss, label_smoothing=smoothing, step_pairs=step_pairs).loss
            for p in parts
        )
        return total.detach(), torch.autograd.grad(total, chosen)[0]

    whole, whole_gradient = gradient((11,), 0)
    split, split_gradient = gradient(cuts, 11)
    assert torch.allclose(split, whole, rtol=1e-6, atol=0)
    assert torch.allclose(split_gradient, whole_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_never_negative_and_zero_only_at_rest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(2000, generator=generator) * 4
    for spread in (1e-6, 1e-2, 1.0, 10.0):
        policy = reference + spread * torch.randn(2000, generator=generator)
        each = torch.stack([log_ratio_divergence(p[None], r[None]) for p, r in zip(policy, reference, strict=True)])
        assert (each < 0).sum() == 0  # 0 of 2000
        assert torch.allclose(each.sum(), log_ratio_divergence(policy, reference), rtol=1e-12)
    assert float(log_ratio_divergence(reference, reference)) == 0


def test_divergence_of_samples_of_the_reference_is_the_kl() -> None:
    # reference (0.5, 0.25, 0.25), policy (0.25, 0.25, 0.5); every token as often as the reference writes it
    reference, policy = torch.tensor([0.5, 0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.25, 0.5]).log()
    wanted = 0.5 * math.log(2) + 0 + 0.25 * math.log(0.5)  # KL(reference || policy)
    assert float(log_ratio_divergence(policy, reference)) / 4 == pytest.approx(wanted, rel=1e-6)


def test_divergence_survives_a_token_pushed_far_down() -> None:
    far = log_ratio_divergence(torch.tensor([-1000.0]), torch.tensor([-1.0]))
    assert float(far) == pytest.approx(998.0)


def bandit(loss: str, beta: float, steps: int, rate: float) -> float:
    """Probability of the preferred one of two answers after gradient steps on the one pair, from a uniform reference."""
    reference = torch.full((2,), -math.log(2), dtype=torch.float64)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        chosen, rejected = torch.log_softmax(logits, 0)
        dpo_loss(PairLogprobs(chosen[None], rejected[None], reference[:1], reference[1:]), beta=beta, loss=loss).loss.backward()
        optimiser.step()
    return float(torch.softmax(logits.detach(), 0)[0])


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_on_a_bandit_of_two_answers_dpo_goes_to_one_and_ipo_to_its_fixed_point(beta: float) -> None:
    """One answer always wins. DPO goes to probability 1 whatever beta is, IPO to sigmoid(1 / (2 beta)) (Azar et al. 2023)."""
    early, late = bandit("sigmoid", beta, 100, 1.0), bandit("sigmoid", beta, 400, 1.0)
    assert late > early
    assert late > 1 - 1e-4
    assert bandit("ipo", beta, 600, 0.1) == pytest.approx(1 / (1 + math.exp(-1 / (2 * beta))), abs=1e-6)


def test_dpo_reaches_the_tilted_optimum() -> None:
    """Six answers, labels of a Bradley-Terry rater in expectation: the optimum is pi_ref exp(r / beta) / Z."""
    random = torch.Generator().manual_seed(0)
    reference = torch.log_softmax(torch.randn(6, generator=random, dtype=torch.float64), 0)
    reward, beta = torch.randn(6, generator=random, dtype=torch.float64), 0.7
    wanted = torch.softmax(reference + reward / beta, 0)
    better, worse = torch.combinations(reward.argsort(descending=True)).unbind(1)
    flipped = torch.sigmoid(reward[worse] - reward[better])  # how often the rater prefers the worse one
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        now = torch.log_softmax(logits, 0)
        pair = PairLogprobs(now[better], now[worse], reference[better], reference[worse])
        total = sum(
            dpo_loss(PairLogprobs(*(x[k : k + 1] for x in pair)), beta=beta, label_smoothing=float(flipped[k])).loss
            for k in range(len(better))
        )
        assert isinstance(total, Tensor)
        total.backward()
        return total

    optimiser.step(loss)
    distance = 0.5 * float((torch.softmax(logits.detach(), 0) - wanted).abs().sum())
    assert distance < 1e-2, f"total variation {distance:.1e}"

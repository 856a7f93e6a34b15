"""SFT's loss against hand-worked values and float64; the normaliser belongs to the optimiser step."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.losses.sft import sft_loss


def test_hand_worked_value() -> None:
    out = sft_loss(torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).log(), step_targets=3)
    assert out.loss.item() == pytest.approx(2 * math.log(2), rel=1e-12)  # (1 + 2 + 3) log 2 / 3
    assert float(out.metrics["sft/nll"]) == pytest.approx(6 * math.log(2), rel=1e-12)
    assert float(out.metrics["sft/targets"]) == 3


def test_a_uniform_model_costs_the_log_of_its_vocabulary() -> None:
    logprobs = torch.log_softmax(torch.zeros(7, 100, dtype=torch.float64), -1)[:, 42]
    assert sft_loss(logprobs, step_targets=7).loss.item() == pytest.approx(math.log(100), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_in_the_logits_match_float64(seed: int) -> None:
    """d L / d z = (p - onehot) / N, worked in numpy."""
    random = np.random.default_rng(seed)
    logits, targets = random.normal(0, 3, (9, 13)), random.integers(0, 13, 9)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    value = -np.log(shares[np.arange(9), targets]).mean()
    slope = (shares - np.eye(13)[targets]) / 9
    leaf = torch.tensor(logits, requires_grad=True)
    loss = sft_loss(torch.log_softmax(leaf, -1)[range(9), targets.tolist()], step_targets=9).loss
    assert loss.item() == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(torch.autograd.grad(loss, leaf)[0], slope, rtol=1e-6, atol=1e-12)


def test_gradient_matches_finite_differences() -> None:
    leaf = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def value(z: Tensor) -> Tensor:
        return sft_loss(torch.log_softmax(z, -1)[:, 3], step_targets=6).loss

    assert torch.autograd.gradcheck(value, leaf, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("cuts", [(1,) * 17, (5, 5, 5, 2), (16, 1)])
def test_one_batch_equals_its_micro_batches_also_with_a_ragged_last_one(cuts: tuple[int, ...]) -> None:
    """Token-weighted: a mean of means would weigh the tokens of a short micro-batch more."""
    start = torch.log_softmax(torch.randn(17, 50, generator=torch.Generator().manual_seed(1)), -1)[:, 7]

    def gradient(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        leaf = start.clone().requires_grad_()
        total = sum(sft_loss(part, step_targets=17).loss for part in leaf.split(list(sizes)))
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    whole, whole_gradient = gradient((17,))
    split, split_gradient = gradient(cuts)
    assert torch.allclose(split, whole, rtol=1e-6, atol=0)
    assert torch.allclose(split_gradient, whole_gradient, rtol=1e-6, atol=0)

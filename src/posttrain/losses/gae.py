"""Advantages: how much better a sampled token, or a whole completion, is than expected.

    gae    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = sum_k (gamma lambda)^k delta_{t+k},   return_t = A_t + V_t
           (Schulman et al. 2016, eq. 11 and 16); after the last real token V is 0
    rloo   A_i = r_i - mean_{j != i} r_j                   of G completions of a prompt (Kool et al. 2019; Ahmadian et al. 2024)
    grpo   A_i = (r_i - mean r) / (std r + eps)            of G completions of a prompt (Shao et al. 2024, section 4.1.2)

    whiten (x - mean) / sqrt(var + 1e-8), over real tokens alone; the variance with n - 1 below

B: completions, L: longest completion, P: prompts, G: completions a prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8
GROUP_EPSILON = 1e-4


class Advantages(NamedTuple):
    """Advantages and the returns that the value function learns, both [B, L], zero where no token is."""

    advantage_BL: Tensor
    return_BL: Tensor


def gae(*, reward_BL: Tensor, value_BL: Tensor, mask_BL: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation. `mask_BL` is 1 at real tokens, which begin each row without a gap."""
    mask_BL = mask_BL.to(reward_BL.dtype)
    value_BL = value_BL * mask_BL
    advantage_BL = torch.zeros_like(reward_BL)
    after_B = reward_BL.new_zeros(len(reward_BL))
    next_value_B = reward_BL.new_zeros(len(reward_BL))
    for place in range(reward_BL.shape[1] - 1, -1, -1):
        delta_B = reward_BL[:, place] + gamma * next_value_B - value_BL[:, place]
        after_B = (delta_B + gamma * lam * after_B) * mask_BL[:, place]
        advantage_BL[:, place] = after_B
        next_value_B = value_BL[:, place]
    return Advantages(advantage_BL, (advantage_BL + value_BL) * mask_BL)


def rloo(score_PG: Tensor) -> Tensor:
    """Each completion against the mean of the others of its prompt [P, G]. Needs two completions a prompt."""
    count = score_PG.shape[1]
    assert count > 1, "one completion has no others"
    return (score_PG - score_PG.mean(1, keepdim=True)) * count / (count - 1)


def grpo(score_PG: Tensor) -> Tensor:
    """Each completion in standard deviations from its prompt's mean [P, G]. Needs two completions a prompt."""
    assert score_PG.shape[1] > 1, "one completion has no spread"
    spread_P1 = score_PG.std(1, keepdim=True)
    return (score_PG - score_PG.mean(1, keepdim=True)) / (spread_P1 + GROUP_EPSILON)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over real tokens; without `shift_mean` the mean stays. Zero where no token is. Same shape."""
    real = mask.bool()
    values = x[real]
    if len(values) < 2:
        return torch.where(real, x - values.sum() if shift_mean else x, 0.0)
    mean, variance = values.mean(), values.var(unbiased=True)
    whitened = (x - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return torch.where(real, whitened if shift_mean else whitened + mean, 0.0)

"""KL between policy and reference, from samples of the policy (Schulman 2020), and its coefficient in PPO's reward.

    d = log pi - log ref                   of a sampled token
    k1 = d                                 unbiased for KL(pi || ref); what the reward subtracts
    k3 = exp(-d) - 1 + d >= 0              unbiased too, and never negative; logged
    KL of a sequence = sum_t k1            in nats a completion: the KL that is shown

    adaptive coefficient: beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)      (Ziegler et al. 2019, eq. 4)

N: tokens, B: completions.
"""

import torch
from torch import Tensor

LARGEST_ERROR = 0.2


def k1(policy_N: Tensor, reference_N: Tensor) -> Tensor:
    """log pi - log ref of each sampled token [N]."""
    return policy_N - reference_N


def k3(policy_N: Tensor, reference_N: Tensor) -> Tensor:
    """exp(-d) - 1 + d of each sampled token [N], never negative."""
    d_N = policy_N - reference_N
    return torch.expm1(-d_N) + d_N


def adapted(coefficient: float, *, kl: float, target: float, completions: int, horizon: int) -> float:
    """The KL coefficient after an iteration of so many completions with a mean KL of `kl` nats."""
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1 + error * completions / horizon)

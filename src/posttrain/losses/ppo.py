"""Proximal policy optimisation (Schulman et al. 2017): the clipped policy and value losses, over real tokens alone.

    ratio = exp(log pi - log pi_old)
    L_policy = mean max(-A ratio, -A clip(ratio, 1 - e, 1 + e))                                            (eq. 7)
    L_value  = 1/2 mean max((V - R)^2, (V_old + clip(V - V_old, -e_v, e_v) - R)^2)                         (released code)
    entropy bonus: L_policy + c mean ratio [log pi],  [.] without gradient: its gradient is that of -c H(pi), by sampled tokens
    approximate KL(old || new) = mean (exp(d) - 1 - d),  d = log pi - log pi_old                           (Schulman 2020, k3)

Before the first update of an iteration ratio is 1 and the approximate KL 0, exactly: policy and sampler are the same.

N: tokens of the minibatch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.losses.kl import k3
from posttrain.losses.output import LossOutput


class PolicyTokens(NamedTuple):
    """Log-probabilities under the policy in training and under the one that sampled, and advantages [N]."""

    logprob_N: Tensor
    old_logprob_N: Tensor
    advantage_N: Tensor


class ValueTokens(NamedTuple):
    """Values now, values when the tokens were sampled, and the returns they should have been [N]."""

    value_N: Tensor
    old_value_N: Tensor
    return_N: Tensor


def policy_loss(tokens: PolicyTokens, *, clip: float, step_tokens: int = 0, entropy_coef: float = 0.0) -> LossOutput:
    """The clipped surrogate, less the entropy bonus. Mean over the tokens of the optimiser step.

    `step_tokens` is the number of tokens of the whole step when this is one of its micro-batches; 0 means this is all.
    Metrics are sums over the micro-batch's tokens.
    """
    log_ratio_N = tokens.logprob_N - tokens.old_logprob_N
    ratio_N = log_ratio_N.exp()
    plain_N = -tokens.advantage_N * ratio_N
    clipped_N = -tokens.advantage_N * ratio_N.clamp(1 - clip, 1 + clip)
    total = torch.maximum(plain_N, clipped_N).sum()
    if entropy_coef:
        total = total + entropy_coef * (ratio_N * tokens.logprob_N.detach()).sum()
    sums = {
        "ppo/policy_loss": total, "ppo/clip_fraction": (clipped_N > plain_N).float().sum(),
        "ppo/approximate_kl": k3(tokens.old_logprob_N, tokens.logprob_N).sum(), "ppo/ratio": ratio_N.sum(),
    }  # fmt: skip
    return LossOutput(total / (step_tokens or len(ratio_N)), {name: value.detach() for name, value in sums.items()})


def value_loss(tokens: ValueTokens, *, clip: float, step_tokens: int = 0) -> LossOutput:
    """Squared error of the values, clipped around what they were. Mean over the tokens of the optimiser step.

    `step_tokens` as in `policy_loss`; a `clip` of 0 does not clip.
    """
    error_N = (tokens.value_N - tokens.return_N) ** 2
    worst_N = error_N
    if clip:
        moved_N = tokens.old_value_N + (tokens.value_N - tokens.old_value_N).clamp(-clip, clip)
        worst_N = torch.maximum(error_N, (moved_N - tokens.return_N) ** 2)
    total = 0.5 * worst_N.sum()
    sums = {"ppo/value_loss": total, "ppo/value_clip_fraction": (worst_N > error_N).float().sum()}
    return LossOutput(total / (step_tokens or len(error_N)), {name: value.detach() for name, value in sums.items()})

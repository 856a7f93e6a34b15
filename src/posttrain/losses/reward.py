"""Reward modelling: a score for completions, learned from pairs of completions of a prompt of which one was preferred.

    p(a over b) = s(r_a - r_b - m)                          Bradley and Terry 1952; margin m: Touvron et al. 2023 eq. 2
    L_pair = -q log p - (1 - q) log(1 - p)                  q: probability of the label (1 for human choices; Bai et al. 2022)
    L = mean over prompts of the mean of L_pair over the prompt's pairs       Ouyang et al. 2022 eq. 1, K completions a prompt
        + c mean over prompts of the mean of (r_a + r_b)^2                    centring, Eisenstein et al. 2023

All pairs of a prompt together have the weight of a single pair, so a ranking of nine completions does not dominate the loss.

B: pairs.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.output import LossOutput


class ScoredPairs(NamedTuple):
    """Scores of both completions of each pair, the required margin, the probability of the label, and the pair's share of its
    prompt (1 / pairs of that prompt), all [B]."""

    chosen_B: Tensor
    rejected_B: Tensor
    margin_B: Tensor
    label_B: Tensor
    share_B: Tensor


def reward_loss(pairs: ScoredPairs, *, center: float = 0.0, step_prompts: float = 0.0) -> LossOutput:
    """Raise the chosen completion's score above the rejected one's. Mean over the prompts of the optimiser step.

    `step_prompts` is the number of prompts of the whole step when this is one of its micro-batches; 0 means this is all.
    Metrics are sums over the micro-batch's pairs, each counted by its share.
    """
    gap_B = pairs.chosen_B - pairs.rejected_B
    logit_B = gap_B - pairs.margin_B
    loss_B = -pairs.label_B * logsigmoid(logit_B) - (1 - pairs.label_B) * logsigmoid(-logit_B)
    sum_B = pairs.chosen_B + pairs.rejected_B
    total = (pairs.share_B * (loss_B + center * sum_B**2)).sum()
    prompts = step_prompts or float(pairs.share_B.sum())
    sums = {
        "reward/loss": loss_B, "reward/accuracy": (gap_B > 0).float(), "reward/gap": gap_B,
        "reward/chosen_score": pairs.chosen_B, "reward/rejected_score": pairs.rejected_B, "reward/center": sum_B / 2,
    }  # fmt: skip
    return LossOutput(total / prompts, {name: (pairs.share_B * value).detach().sum() for name, value in sums.items()})

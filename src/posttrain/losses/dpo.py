"""Direct preference optimisation and its close relatives; log-probabilities are sums over a completion's tokens.

    h = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) - log ref(rejected)],   margin = beta * h

    sigmoid   -(1 - e) log s(margin) - e log s(-margin)                    DPO, Rafailov et al. 2023 eq. 7; e > 0: cDPO, Mitchell 2023
    robust    [-(1 - e) log s(margin) + e log s(-margin)] / (1 - 2 e)      rDPO, Chowdhury et al. 2024 eq. 9
    ipo       (h - 1 / (2 beta))^2                                         IPO, Azar et al. 2023 eq. 17
    hinge     max(0, 1 - margin)                                           SLiC-HF, Zhao et al. 2023, on log-ratios

IPO here takes the summed h of the paper and of its derivation: 1 / (2 beta) is then a gap in nats of whole completions.
Libraries that average per token solve another problem with another beta; a beta does not carry over.

B: preference pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.output import LossOutput


class PairLogprobs(NamedTuple):
    """Summed log-probabilities [B] of both completions under policy and reference."""

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor


def dpo_loss(pairs: PairLogprobs, *, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0, step_pairs: int = 0) -> LossOutput:
    """Raise the chosen completion's log-ratio above the rejected one's. Mean over the pairs of the optimiser step.

    `step_pairs` is the number of pairs of the whole step when this is one of its micro-batches; 0 means this is all.
    """
    gap_B = (pairs.chosen_B - pairs.reference_chosen_B) - (pairs.rejected_B - pairs.reference_rejected_B)
    margin_B = beta * gap_B
    loss_B = _losses(margin_B, gap_B, beta=beta, loss=loss, smoothing=label_smoothing)
    return LossOutput(loss_B.sum() / (step_pairs or len(loss_B)), _metrics(pairs, margin_B, loss_B))


def _losses(margin_B: Tensor, gap_B: Tensor, *, beta: float, loss: str, smoothing: float) -> Tensor:  # noqa: N803
    if loss == "sigmoid":
        return -(1 - smoothing) * logsigmoid(margin_B) - smoothing * logsigmoid(-margin_B)
    if loss == "robust":
        return (-(1 - smoothing) * logsigmoid(margin_B) + smoothing * logsigmoid(-margin_B)) / (1 - 2 * smoothing)
    if loss == "ipo":
        return (gap_B - 1 / (2 * beta)) ** 2
    assert loss == "hinge", loss
    return torch.relu(1 - margin_B)


def _metrics(pairs: PairLogprobs, margin_B: Tensor, loss_B: Tensor) -> dict[str, Tensor]:  # noqa: N803
    """Sums over the micro-batch's pairs; the loop divides by the pairs of the step."""
    chosen_ratio_B = pairs.chosen_B - pairs.reference_chosen_B
    rejected_ratio_B = pairs.rejected_B - pairs.reference_rejected_B
    sums = {
        "dpo/loss": loss_B,
        "dpo/margin": margin_B,
        "dpo/accuracy": (margin_B > 0).float(),
        # sigma(-margin): how surprising the preference still is; the weight of the pair in the gradient of `sigmoid`
        "dpo/gradient_weight": torch.sigmoid(-margin_B),
        "dpo/chosen_logprob": pairs.chosen_B,
        "dpo/rejected_logprob": pairs.rejected_B,
        "dpo/chosen_log_ratio": chosen_ratio_B,
        "dpo/rejected_log_ratio": rejected_ratio_B,
        # accuracy without the reference: whether the policy itself finds the chosen completion likelier
        "dpo/ranking_accuracy": (pairs.chosen_B > pairs.rejected_B).float(),
    }
    return {name: value.detach().sum() for name, value in sums.items()}

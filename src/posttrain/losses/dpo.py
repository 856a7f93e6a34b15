"""Direct preference optimisation and its close relatives; log-probabilities are sums over a completion's tokens, in nats.

    h = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) - log ref(rejected)],   margin m = beta h,   e: smoothing

    sigmoid   -(1 - e) log s(m) - e log s(-m)               DPO, Rafailov et al. 2023 eq. 7; e > 0: cDPO, Mitchell 2023
    robust    [-(1 - e) log s(m) + e log s(-m)] / (1 - 2 e) rDPO, Chowdhury et al. 2024 eq. 9: unbiased under flips
    ipo       (h - 1 / (2 beta))^2                          IPO, Azar et al. 2023 eq. 17
    hinge     max(0, 1 - m)                                 SLiC-HF, Zhao et al. 2023, on log-ratios

IPO takes the summed h of the paper and of its derivation: 1 / (2 beta) is then a gap in nats of whole completions.
Libraries that average h per token (TRL does) solve another problem with another beta; a beta does not carry over.
TRL reads label smoothing for `robust` only and drops it for `sigmoid`; here it is applied to both.

B: preference pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.kl import k3
from posttrain.losses.output import LossOutput


class PairLogprobs(NamedTuple):
    """Summed log-probabilities [B] of both completions under policy and reference."""

    chosen_B: Tensor
    rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor


def dpo_loss(
    pairs: PairLogprobs, *, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0, step_pairs: int = 0
) -> LossOutput:
    """Raise the chosen completion's log-ratio above the rejected one's. Mean over the pairs of the optimiser step.

    `step_pairs` is the number of pairs of the whole step when this is one of its micro-batches; 0 means this is all.
    Metrics are sums over the micro-batch's pairs.
    """
    gap_B = (pairs.chosen_B - pairs.reference_chosen_B) - (pairs.rejected_B - pairs.reference_rejected_B)
    margin_B = beta * gap_B
    loss_B = _losses(margin_B, gap_B, beta=beta, loss=loss, smoothing=label_smoothing)
    return LossOutput(loss_B.sum() / (step_pairs or len(loss_B)), _metrics(pairs, margin_B, loss_B))


def _losses(margin_B: Tensor, gap_B: Tensor, *, beta: float, loss: str, smoothing: float) -> Tensor:
    assert not smoothing or loss in ("sigmoid", "robust"), "label smoothing has no meaning here"
    if loss == "sigmoid":
        return -(1 - smoothing) * logsigmoid(margin_B) - smoothing * logsigmoid(-margin_B)
    if loss == "robust":
        return (-(1 - smoothing) * logsigmoid(margin_B) + smoothing * logsigmoid(-margin_B)) / (1 - 2 * smoothing)
    if loss == "ipo":
        return (gap_B - 1 / (2 * beta)) ** 2
    assert loss == "hinge", loss
    return torch.relu(1 - margin_B)


def _metrics(pairs: PairLogprobs, margin_B: Tensor, loss_B: Tensor) -> dict[str, Tensor]:
    """Sums over the micro-batch's pairs; the loop divides by the pairs of the step."""
    sums = {
        "dpo/loss": loss_B,
        "dpo/margin": margin_B,
        # strict, so that a policy at its reference scores 0 and not 1
        "dpo/accuracy": (margin_B > 0).float(),
        # sigma(-margin): how surprising the preference still is; the weight of the pair in the gradient of `sigmoid`
        "dpo/gradient_weight": torch.sigmoid(-margin_B),
        "dpo/chosen_logprob": pairs.chosen_B,
        "dpo/rejected_logprob": pairs.rejected_B,
        "dpo/chosen_log_ratio": pairs.chosen_B - pairs.reference_chosen_B,
        "dpo/rejected_log_ratio": pairs.rejected_B - pairs.reference_rejected_B,
        # accuracy without the reference: whether the policy itself finds the chosen completion likelier
        "dpo/ranking_accuracy": (pairs.chosen_B > pairs.rejected_B).float(),
    }
    return {name: value.detach().sum() for name, value in sums.items()}


def log_ratio_divergence(policy_N: Tensor, reference_N: Tensor) -> Tensor:
    """KL(reference || policy) in nats, summed over tokens, as if the reference had written the completions [N].

        d = log pi - log ref,   k3 = exp(d) - 1 - d >= 0          (Schulman 2020, samples from the reference)

    The completions are data, not samples, so this is a distance to the reference where the data lies. The other
    direction, exp(-d), explodes as soon as a rejected token is pushed far down; this one grows linearly there. float64.
    """
    return k3(reference_N.detach().double(), policy_N.detach().double()).sum()

"""Direct preference optimisation and its close relatives; log-probabilities are sums over a completion's tokens, in nats.

    h = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) - log ref(rejected)],   margin m = beta h

`dpo_variants.py` has what each variant makes of h.

B: preference pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.losses.dpo_variants import VARIANTS, Gaps
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
    variant, gaps = VARIANTS[loss], Gaps(gap_B, beta, label_smoothing)
    assert not label_smoothing or variant.smoothing != "none", "label smoothing has no meaning here"
    loss_B = variant.loss(gaps)
    return LossOutput(loss_B.sum() / (step_pairs or len(loss_B)), _metrics(pairs, gaps.margin_B, loss_B))


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

"""Direct preference optimisation and its close relatives; log-probabilities are sums over a completion's tokens, in nats.

    h = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) - log ref(rejected)],   margin m = beta h
    L = q l(h) + (1 - q) l(-h)                                                         q: probability of the label

`dpo_variants.py` has l, which each variant makes of h. With q = 1, as for a choice of people, L = l(h). A soft label gives the
expected loss under the label: the cross-entropy with soft targets that Bai et al. 2022 (arXiv 2212.08073, section 4) train
preference models with. For `sigmoid` it is cDPO (Mitchell 2023) with label smoothing 1 - q for each pair, least at s(m) = q.
For `ipo` it is least at h = (2 q - 1) / (2 beta). At q = 1/2 neither completion is preferred, and L is least at h = 0.

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
    pairs: PairLogprobs, *, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0, step_pairs: int = 0,
    label_B: Tensor | None = None,
) -> LossOutput:  # fmt: skip
    """Raise the chosen completion's log-ratio above the rejected one's. Mean over the pairs of the optimiser step.

    `step_pairs` is the number of pairs of the whole step when this is one of its micro-batches; 0 means this is all.
    `label_B` is the probability q of each label [B]; None means that all are 1, and then l(-h) is not computed. Metrics are
    sums over the micro-batch's pairs.
    """
    gap_B = (pairs.chosen_B - pairs.reference_chosen_B) - (pairs.rejected_B - pairs.reference_rejected_B)
    variant, gaps = VARIANTS[loss], Gaps(gap_B, beta, label_smoothing)
    assert not label_smoothing or variant.smoothing != "none", "label smoothing has no meaning here"
    loss_B = variant.loss(gaps)
    if label_B is not None:
        loss_B = label_B * loss_B + (1 - label_B) * variant.loss(gaps._replace(gap_B=-gap_B))
    return LossOutput(loss_B.sum() / (step_pairs or len(loss_B)), _metrics(pairs, gaps.margin_B, loss_B))


def _metrics(pairs: PairLogprobs, margin_B: Tensor, loss_B: Tensor) -> dict[str, Tensor]:
    """Sums over the micro-batch's pairs; the loop divides by the pairs of the step."""
    sums = {
        "dpo/loss": loss_B,
        "dpo/margin": margin_B,
        # strict, so that a policy at its reference scores 0 and not 1
        "dpo/accuracy": (margin_B > 0).float(),
        # sigma(-margin): how surprising the preference still is; for a label of probability 1, the weight of the pair in the
        # gradient of `sigmoid`
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

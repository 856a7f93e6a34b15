"""Supervised fine-tuning: the negative log-likelihood of the demonstrations' tokens.

    L = - (1 / N) sum_i log p(t_i),   N = targets of the whole optimiser step, over all its micro-batches

The normaliser belongs to the step, not to the micro-batch: a mean of means would weight a token by the size of its
micro-batch. TRL's SFTTrainer has the same normaliser (`num_items_in_batch`); its DFT weight is left out.

N: targets.
"""

from torch import Tensor

from posttrain.losses.output import LossOutput


def sft_loss(logprobs_N: Tensor, *, step_targets: int) -> LossOutput:
    """Sum of -log p [N], nats, over the micro-batch's targets divided by the targets of the whole step.

    Metrics are sums over the micro-batch: `sft/nll` in nats, `sft/targets` in tokens.
    """
    total = -logprobs_N.sum()
    targets = total.new_tensor(len(logprobs_N))
    return LossOutput(total / step_targets, {"sft/nll": total.detach(), "sft/targets": targets})

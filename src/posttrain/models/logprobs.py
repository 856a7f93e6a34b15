"""Log-probabilities of target tokens, with the logits of only a few rows in memory at a time.

    log p(t | h) = z_t - log sum_v exp z_v,   z = W h + b          d log p / d h = W_t - sum_v p_v W_v

The head runs only at positions that predict a target, in chunks of rows. With a frozen head the forward pass computes the
gradient with respect to the hidden state while the chunk's logits are in memory; backward multiplies each row by a number. With
a trained head backward computes the chunk again.

On a CPU with bfloat16 weights the sum over v of the gradient includes, for each row, only tokens with a probability of at least
1e-5: gathering a thousand rows of W costs a tenth of a product with all of them. The rest is 1 % of the mass before fine-tuning
and less after, about the effect of rounding p to bfloat16 (Wijmans et al. 2024, "Cut your losses", filter at 2.4e-4). The
log-probability itself is exact, and so is everything in float32.

N: targets, D: width, V: vocabulary. Log-sum-exp in float32.
"""

from typing import Any

import torch
from torch import Tensor

from posttrain import kernels
from posttrain.kernels import HeadRows
from posttrain.models.embedding_rows import capped


def target_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, *, softcap: float | None = None, rows: HeadRows | None = None,
    bias_V: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """log p of each target [N], float32, differentiable in the hidden states, and in head and bias if they are trained.

    `rows` replace some rows of a frozen head; they get no gradient here.
    """
    if softcap is not None:
        return _plain(hidden_ND, head_VD, target_N, softcap, rows, bias_V)
    if head_VD.requires_grad:
        assert rows is None, "a trained head has no replaced rows"
        return _TrainedHead.apply(hidden_ND, head_VD, target_N, bias_V)  # type: ignore[no-any-return, no-untyped-call]
    return _FrozenHead.apply(hidden_ND, head_VD, target_N, rows, bias_V)  # type: ignore[no-any-return, no-untyped-call]


def _plain(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, softcap: float, rows: HeadRows | None, bias_V: Tensor | None
) -> Tensor:
    """Chunks by PyTorch operations, for soft-capped heads."""
    parts = []
    for chunk in kernels.head_chunks(target_N, head_VD):
        logits = capped(kernels.head_logits(hidden_ND[chunk], head_VD, rows, bias_V).float(), softcap)
        parts.append(torch.log_softmax(logits, -1).gather(1, target_N[chunk, None])[:, 0])
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
    ) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return kernels.head_values(hidden_ND, head_VD, target_N, rows, bias_V).logprobs_N
        logprobs_N, slope_ND = kernels.head_slopes(hidden_ND, head_VD, target_N, rows, bias_V)
        ctx.save_for_backward(slope_ND)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grads[0].to(slope_ND.dtype)[:, None], None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, bias_V: Tensor | None) -> Tensor:
        logprobs_N, total_N = kernels.head_values(hidden_ND, head_VD, target_N, None, bias_V)
        ctx.save_for_backward(hidden_ND, head_VD, target_N, total_N, bias_V)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden_ND, head_VD, target_N, total_N, bias_V = ctx.saved_tensors
        grad_hidden, grad_head = torch.zeros_like(hidden_ND), torch.zeros_like(head_VD)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        for rows in kernels.head_chunks(target_N, head_VD):
            logits_nV = kernels.head_logits(hidden_ND[rows], head_VD, None, bias_V)
            slope = kernels.logit_gradient(logits_nV, total_N[rows], target_N[rows], grads[0][rows])
            grad_hidden[rows] = slope @ head_VD
            grad_head.addmm_(slope.T, hidden_ND[rows])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_head, None, grad_bias

"""Log-probabilities under a head on a GPU: the passes over a chunk's logits are compiled ones (`kernels/reference_head.py`)."""

import torch
from torch import Tensor

from posttrain.kernels import reference_head
from posttrain.kernels.cuda.compiled import log_sum_exp, probabilities
from posttrain.kernels.head_rows import HeadRows, head_logits, target_rows
from posttrain.kernels.reference_head import HeadSlopes, HeadValues, at_target, head_chunks


def head_values(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadValues:
    """log p of each target and log sum exp of its logits, without gradient."""
    return reference_head.head_values(hidden_ND, head_VD, target_N, rows, bias_V, log_sum_exp=log_sum_exp)


def head_slopes(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadSlopes:
    """log p of each target and its slope in the hidden state; no gradient of the head."""
    logprobs_N, slope_ND = hidden_ND.new_empty(len(target_N), dtype=torch.float32), torch.empty_like(hidden_ND)
    for chunk in head_chunks(target_N, head_VD):
        logits_nV = head_logits(hidden_ND[chunk], head_VD, rows, bias_V)
        total_n = log_sum_exp(logits_nV)
        logprobs_N[chunk] = at_target(logits_nV, target_N[chunk], total_n)
        share_nV = probabilities(logits_nV, total_n)
        mean_nD = share_nV @ head_VD
        if rows is not None:
            rows.mean_(mean_nD, head_VD, share_nV[:, rows.ids_K])
        slope_ND[chunk] = target_rows(head_VD, target_N[chunk], rows) - mean_nD
    return HeadSlopes(logprobs_N, slope_ND)

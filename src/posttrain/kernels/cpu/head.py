"""Log-probabilities under a bfloat16 head on a CPU: the passes over the logits are C (`c/head.c`).

Logits are computed as W h^T, so that the product reads the head in its layout; h W^T would reorder it first. The
sum over v is filtered as in `kernels/reference_head.py`, which computes heads of other dtypes.

N: targets, n: targets of a chunk, D: width, V: vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels import reference_head
from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.linear import linear, tiled
from posttrain.kernels.head_rows import HeadRows, target_rows
from posttrain.kernels.reference_head import SMALLEST_PROBABILITY, HeadSlopes, HeadValues, head_chunks

_LEAST = math.log(SMALLEST_PROBABILITY)


def _compiled(head_VD: Tensor) -> bool:
    return bindings.able(head_VD) and head_VD.is_contiguous()


def head_values(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadValues:
    """log p of each target and log sum exp of its logits, without gradient."""
    if not _compiled(head_VD):
        return reference_head.head_values(hidden_ND, head_VD, target_N, rows, bias_V)
    return _in_c(hidden_ND, head_VD, target_N, rows, bias_V, None)


def head_slopes(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadSlopes:
    """log p of each target and its gradient with respect to the hidden state; no gradient of the head."""
    if not _compiled(head_VD):
        return reference_head.head_slopes(hidden_ND, head_VD, target_N, rows, bias_V)
    slope_ND = torch.empty_like(hidden_ND)
    return HeadSlopes(_in_c(hidden_ND, head_VD, target_N, rows, bias_V, slope_ND).logprobs_N, slope_ND)


def _in_c(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None,
    slope_ND: Tensor | None,
) -> HeadValues:  # fmt: skip
    """Compute the values, and write d log p / d h to `slope_ND` unless it is None."""
    logprobs_N = hidden_ND.new_empty(len(target_N), dtype=torch.float32)
    total_N = torch.empty_like(logprobs_N)
    buffer = head_VD.new_empty(0)  # shared by all chunks: allocating it per chunk would cost a quarter of the product
    for chunk in head_chunks(target_N, head_VD):
        target_n = target_N[chunk]
        size = len(head_VD) * (len(target_n) + -len(target_n) % bindings.LANES)
        buffer = buffer if len(buffer) >= size else head_VD.new_empty(size)
        logits_Vn = buffer[:size].view(len(head_VD), -1)
        _fill_logits(logits_Vn, hidden_ND[chunk], head_VD, rows, bias_V)
        if slope_ND is None:
            total_n = bindings.log_sum_exp(logits_Vn)[: len(target_n)]
        else:
            total_n, mean_nD = (x[: len(target_n)] for x in bindings.head_mean(logits_Vn, head_VD, _LEAST))
            if rows is not None:
                share_nK = logits_Vn[rows.ids_K].T[: len(target_n)].float() - total_n[:, None]
                rows.mean_(mean_nD, head_VD, share_nK.exp() * (share_nK > _LEAST))
            slope_ND[chunk] = target_rows(head_VD, target_n, rows) - mean_nD
        total_N[chunk] = total_n
        logprobs_N[chunk] = logits_Vn[target_n, torch.arange(len(target_n))].float() - total_n
    return HeadValues(logprobs_N, total_N)


def _fill_logits(logits_Vn: Tensor, hidden_nD: Tensor, head_VD: Tensor, rows: HeadRows | None, bias_V: Tensor | None) -> None:
    """Write W h^T + b, with the tokens padded to whole vectors."""
    count = len(hidden_nD)
    if tiled(hidden_nD, head_VD):
        bindings.turned_products(hidden_nD, head_VD, logits_Vn)
        if rows is not None:
            logits_Vn[rows.ids_K, :count] = linear(hidden_nD, rows.rows_KD).T
    else:
        turned_Dn = functional.pad(hidden_nD, (0, 0, 0, -count % bindings.LANES)).T.contiguous()
        torch.mm(head_VD, turned_Dn, out=logits_Vn)
        if rows is not None:
            logits_Vn[rows.ids_K] = rows.rows_KD @ turned_Dn
    if bias_V is not None:
        logits_Vn += bias_V[:, None]

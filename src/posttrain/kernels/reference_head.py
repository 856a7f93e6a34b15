"""Log-probabilities of targets under a head, and their gradients with respect to the hidden states, in chunks of rows.

    log p(t | h) = z_t - log sum_v exp z_v,   z = W h + b          d log p / d h = W_t - sum_v p_v W_v

The filter of bfloat16 weights on a CPU: the sum over v takes, for each row, the tokens with a probability of at least 1e-5.
Gathering a thousand rows of W costs a tenth of a product with all of them. `models/logprobs.py` says what is left out.

N: targets, n: targets of a chunk, D: width, V: vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels.head_rows import HeadRows, head_logits, target_rows

# Logits in memory at a time: 32 Mi float32 numbers, 128 MiB, enough to use all cores at a vocabulary of 262k. A GPU needs
# 512 MiB of bfloat16.
CHUNK_LOGITS = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Rows converted to float32 at a time, so that they stay in the processor's cache for all passes over them.
BLOCK_ROWS = 4
SMALLEST_PROBABILITY = 1e-5


class HeadValues(NamedTuple):
    """log p of each target and log sum exp of its logits [N], float32."""

    logprobs_N: Tensor
    total_N: Tensor


class HeadSlopes(NamedTuple):
    """log p of each target [N], float32, and d log p / d h [N, D]."""

    logprobs_N: Tensor
    slope_ND: Tensor


def head_chunks(target_N: Tensor, head_VD: Tensor) -> list[slice]:
    """Slices of the targets whose logits are computed together."""
    size, total = max(16, CHUNK_LOGITS[head_VD.device.type] // head_VD.shape[0]), len(target_N)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """log sum_v exp z_v [N], float32."""
    return torch.logsumexp(logits_NV.float(), 1)


def logit_gradient(logits_NV: Tensor, total_N: Tensor, target_N: Tensor, grad_N: Tensor) -> Tensor:
    """d sum_n g_n log p_n / d z = g (onehot - p) [N, V], in the dtype of the logits."""
    hit = torch.arange(logits_NV.shape[1], device=logits_NV.device)[None] == target_N[:, None]
    slope = hit.float() - torch.exp(logits_NV.float() - total_N[:, None])
    return (slope * grad_N[:, None].float()).to(logits_NV.dtype)


def at_target(logits_nV: Tensor, target_n: Tensor, total_n: Tensor) -> Tensor:
    """log p of each target [n]."""
    return logits_nV.gather(1, target_n[:, None])[:, 0].float() - total_n


def head_values(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None, *,
    log_sum_exp: Callable[[Tensor], Tensor] = log_sum_exp,
) -> HeadValues:  # fmt: skip
    """log p of each target and log sum exp of its logits, without gradient. A GPU has its own `log_sum_exp`."""
    logprobs_N = hidden_ND.new_empty(len(target_N), dtype=torch.float32)
    total_N = torch.empty_like(logprobs_N)
    for chunk in head_chunks(target_N, head_VD):
        logits_nV = head_logits(hidden_ND[chunk], head_VD, rows, bias_V)
        total_N[chunk] = log_sum_exp(logits_nV)
        logprobs_N[chunk] = at_target(logits_nV, target_N[chunk], total_N[chunk])
    return HeadValues(logprobs_N, total_N)


def head_slopes(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadSlopes:
    """log p of each target and its gradient with respect to the hidden state; no gradient of the head."""
    logprobs_N, slope_ND = hidden_ND.new_empty(len(target_N), dtype=torch.float32), torch.empty_like(hidden_ND)
    chunk_of = _filtered_chunk if head_VD.dtype == torch.bfloat16 else _whole_chunk
    for chunk in head_chunks(target_N, head_VD):
        logprobs_N[chunk], slope_ND[chunk] = chunk_of(hidden_ND[chunk], head_VD, target_N[chunk], rows, bias_V)
    return HeadSlopes(logprobs_N, slope_ND)


def _filtered_chunk(
    hidden_nD: Tensor, head_VD: Tensor, target_n: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadSlopes:
    """The slopes of a chunk with bfloat16 weights, filtered as the module's docstring says."""
    logits_nV = head_logits(hidden_nD, head_VD, rows, bias_V)
    logprobs, places, tokens, filtered, shares = [], [], [], [], []
    for start in range(0, len(target_n), BLOCK_ROWS):
        block = torch.log_softmax(logits_nV[start : start + BLOCK_ROWS], -1, dtype=torch.float32)
        logprobs.append(block.gather(1, target_n[start : start + BLOCK_ROWS, None])[:, 0])
        place, token = (block > math.log(SMALLEST_PROBABILITY)).nonzero(as_tuple=True)
        places.append(place + start)
        tokens.append(token)
        filtered.append(block[place, token])
        if rows is not None:
            shares.append(block[:, rows.ids_K])
    first_n = torch.searchsorted(torch.cat(places), torch.arange(len(target_n)))
    probability = torch.cat(filtered).exp_().to(head_VD.dtype)
    mean_nD = functional.embedding_bag(torch.cat(tokens), head_VD, first_n, mode="sum", per_sample_weights=probability)
    if rows is not None:
        share_nK = torch.cat(shares)
        rows.mean_(mean_nD, head_VD, share_nK.exp() * (share_nK > math.log(SMALLEST_PROBABILITY)))
    return HeadSlopes(torch.cat(logprobs), target_rows(head_VD, target_n, rows) - mean_nD)


def _whole_chunk(
    hidden_nD: Tensor, head_VD: Tensor, target_n: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> HeadSlopes:
    """The slopes of a chunk, with products over the whole vocabulary."""
    share_nV = head_logits(hidden_nD, head_VD, rows, bias_V).float()
    logprobs_n = _log_softmax_(share_nV, target_n)
    share_nV = share_nV.to(head_VD.dtype)
    mean_nD = share_nV @ head_VD
    if rows is not None:
        rows.mean_(mean_nD, head_VD, share_nV[:, rows.ids_K])
    return HeadSlopes(logprobs_n, target_rows(head_VD, target_n, rows) - mean_nD)


def _log_softmax_(logits: Tensor, target_n: Tensor) -> Tensor:
    """Turn float32 logits [n, V] into probabilities in place; return log p of the targets [n]."""
    at_target_n = logits.gather(1, target_n[:, None])[:, 0]
    top_n1 = logits.amax(1, keepdim=True)
    total_n1 = logits.sub_(top_n1).exp_().sum(1, keepdim=True)
    logits.div_(total_n1)
    return at_target_n - (top_n1 + total_n1.log())[:, 0]

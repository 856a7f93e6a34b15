"""Log-probabilities of target tokens, without ever holding logits for more than a few rows.

    log p(t | h) = z_t - log sum_v exp z_v,   z = W h + b          d log p / d h = W_t - sum_v p_v W_v

The head runs only at positions that predict a target, in chunks of rows. With a frozen head the gradient with respect to
the hidden state is formed in the forward pass, while the chunk's logits are there: backward is a multiplication by a
number a row. With a trained head the chunk is computed again in backward. On a GPU the passes over a chunk are compiled ones.

On a CPU with bfloat16 weights the sum over v takes, for each row, the tokens with a probability of at least 1e-5: gathering a
thousand rows of W costs a tenth of a product with all of them. What is left out is 1 % of the mass before fine-tuning and less
after, about what rounding p to bfloat16 changes (Wijmans et al. 2024, "Cut your losses", filter at 2.4e-4). The log-probability
itself and all of float32 are exact. Where there is a compiler the passes are C (`native/head.c`).

N: targets, D: width, V: vocabulary. Log-sum-exp in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.linear import linear, tiled
from posttrain.kernels.cuda.compiled import log_sum_exp, logit_gradient, probabilities
from posttrain.models.embedding_rows import HeadRows, capped, head_logits

# Logits held at once: 32 Mi float32 numbers, 128 MiB; a chunk then still fills the cores at a vocabulary of 262k. On a GPU
# 512 MiB of bfloat16 fill it.
CHUNK_LOGITS = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Rows whose logits are in float32 at the same time: they stay in the cache for all passes over them.
BLOCK_ROWS = 4
SMALLEST_PROBABILITY = 1e-5


def target_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, *, softcap: float | None = None, rows: HeadRows | None = None,
    bias_V: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """log p of each target [N], float32, differentiable in the hidden states and, where they are trained, in head and bias.

    `rows` take the places of some rows of a frozen head; they get no gradient here.
    """
    if softcap is not None:
        return _plain(hidden_ND, head_VD, target_N, softcap, rows, bias_V)
    if head_VD.requires_grad:
        assert rows is None, "a head that is trained whole has no rows of its own"
        return _TrainedHead.apply(hidden_ND, head_VD, target_N, bias_V)  # type: ignore[no-any-return, no-untyped-call]
    return _FrozenHead.apply(hidden_ND, head_VD, target_N, rows, bias_V)  # type: ignore[no-any-return, no-untyped-call]


def _plain(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, softcap: float, rows: HeadRows | None, bias_V: Tensor | None
) -> Tensor:
    """For soft-capped heads: chunks by plain operations."""
    parts = []
    for chunk in _chunks(target_N, head_VD):
        logits = capped(head_logits(hidden_ND[chunk], head_VD, rows, bias_V).float(), softcap)
        parts.append(torch.log_softmax(logits, -1).gather(1, target_N[chunk, None])[:, 0])
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)


def _chunks(target_N: Tensor, head_VD: Tensor) -> list[slice]:
    size, total = max(16, CHUNK_LOGITS[head_VD.device.type] // head_VD.shape[0]), len(target_N)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _value(logits_nV: Tensor, target_n: Tensor, total_n: Tensor) -> Tensor:
    return logits_nV.gather(1, target_n[:, None])[:, 0].float() - total_n


def _log_softmax_(logits: Tensor, target_n: Tensor) -> Tensor:
    """Turn float32 logits [n, V] into probabilities in place; return log p of the targets [n]."""
    at_target_n = logits.gather(1, target_n[:, None])[:, 0]
    top_n1 = logits.amax(1, keepdim=True)
    total_n1 = logits.sub_(top_n1).exp_().sum(1, keepdim=True)
    logits.div_(total_n1)
    return at_target_n - (top_n1 + total_n1.log())[:, 0]


def _targets(head_VD: Tensor, target_n: Tensor, rows: HeadRows | None) -> Tensor:
    return head_VD[target_n] if rows is None else rows.replace(head_VD[target_n], target_n)


def _filtered_chunk(
    hidden_nD: Tensor, head_VD: Tensor, target_n: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p [n] and d log p / d h [n, D] of a chunk with bfloat16 weights; see the filter in the module's docstring."""
    logits_nV = head_logits(hidden_nD, head_VD, rows, bias_V)
    logprobs, places, tokens, kept, shares = [], [], [], [], []
    for start in range(0, len(target_n), BLOCK_ROWS):
        block = torch.log_softmax(logits_nV[start : start + BLOCK_ROWS], -1, dtype=torch.float32)
        logprobs.append(block.gather(1, target_n[start : start + BLOCK_ROWS, None])[:, 0])
        place, token = (block > math.log(SMALLEST_PROBABILITY)).nonzero(as_tuple=True)
        places.append(place + start)
        tokens.append(token)
        kept.append(block[place, token])
        if rows is not None:
            shares.append(block[:, rows.ids_K])
    first_n = torch.searchsorted(torch.cat(places), torch.arange(len(target_n)))
    probability = torch.cat(kept).exp_().to(head_VD.dtype)
    mean_nD = functional.embedding_bag(torch.cat(tokens), head_VD, first_n, mode="sum", per_sample_weights=probability)
    if rows is not None:
        share_nK = torch.cat(shares)
        rows.mean_(mean_nD, head_VD, share_nK.exp() * (share_nK > math.log(SMALLEST_PROBABILITY)))
    return torch.cat(logprobs), _targets(head_VD, target_n, rows) - mean_nD


def _compiled(head_VD: Tensor) -> bool:
    return bindings.able(head_VD) and head_VD.is_contiguous()


def _in_c(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, slope_ND: Tensor | None,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log p of each target and log sum exp of its logits [N]; `slope_ND` is filled with d log p / d h as by `_filtered_chunk`.

    Logits are made as W h^T, so that the product reads the head as it lies; h W^T would bring it into another order first.
    """
    tiles = tiled(hidden_ND, head_VD)
    logprobs_N = hidden_ND.new_empty(len(target_N), dtype=torch.float32)
    total_N, least = torch.empty_like(logprobs_N), math.log(SMALLEST_PROBABILITY)
    room = head_VD.new_empty(0)  # of all chunks: fresh memory each time would cost a quarter of the product
    for chunk in _chunks(target_N, head_VD):
        target_n = target_N[chunk]
        size = len(head_VD) * (len(target_n) + -len(target_n) % bindings.LANES)
        room = room if len(room) >= size else head_VD.new_empty(size)
        logits_Vn = room[:size].view(len(head_VD), -1)
        if tiles:
            bindings.turned_products(hidden_ND[chunk], head_VD, logits_Vn)
            if rows is not None:
                logits_Vn[rows.ids_K, : len(target_n)] = linear(hidden_ND[chunk], rows.rows_KD).T
        else:
            turned_Dn = functional.pad(hidden_ND[chunk], (0, 0, 0, -len(target_n) % bindings.LANES)).T.contiguous()
            torch.mm(head_VD, turned_Dn, out=logits_Vn)
            if rows is not None:
                logits_Vn[rows.ids_K] = rows.rows_KD @ turned_Dn
        if bias_V is not None:
            logits_Vn += bias_V[:, None]
        if slope_ND is None:
            total_n = bindings.log_sum_exp(logits_Vn)[: len(target_n)]
        else:
            total_n, mean_nD = (x[: len(target_n)] for x in bindings.head_mean(logits_Vn, head_VD, least))
            if rows is not None:
                share_nK = logits_Vn[rows.ids_K].T[: len(target_n)].float() - total_n[:, None]
                rows.mean_(mean_nD, head_VD, share_nK.exp() * (share_nK > least))
            slope_ND[chunk] = _targets(head_VD, target_n, rows) - mean_nD
        total_N[chunk] = total_n
        logprobs_N[chunk] = logits_Vn[target_n, torch.arange(len(target_n))].float() - total_n
    return logprobs_N, total_N


def _whole_chunk(
    hidden_nD: Tensor, head_VD: Tensor, target_n: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p [n] and d log p / d h [n, D] of a chunk, by whole products."""
    logits_nV = head_logits(hidden_nD, head_VD, rows, bias_V)
    if head_VD.is_cuda:
        total_n = log_sum_exp(logits_nV)
        logprobs_n, share_nV = _value(logits_nV, target_n, total_n), probabilities(logits_nV, total_n)
    else:
        share_nV = logits_nV.float()
        logprobs_n = _log_softmax_(share_nV, target_n)
        share_nV = share_nV.to(head_VD.dtype)
    mean_nD = share_nV @ head_VD
    if rows is not None:
        rows.mean_(mean_nD, head_VD, share_nV[:, rows.ids_K])
    return logprobs_n, _targets(head_VD, target_n, rows) - mean_nD


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
    ) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return _values(hidden_ND, head_VD, target_N, rows, bias_V)[0]
        slope_ND = torch.empty_like(hidden_ND)
        if _compiled(head_VD):
            ctx.save_for_backward(slope_ND)
            return _in_c(hidden_ND, head_VD, target_N, rows, slope_ND, bias_V)[0]
        logprobs_N = hidden_ND.new_empty(len(target_N), dtype=torch.float32)
        filtered = head_VD.dtype == torch.bfloat16 and not head_VD.is_cuda
        chunk_of = _filtered_chunk if filtered else _whole_chunk
        for chunk in _chunks(target_N, head_VD):
            logprobs_N[chunk], slope_ND[chunk] = chunk_of(hidden_ND[chunk], head_VD, target_N[chunk], rows, bias_V)
        ctx.save_for_backward(slope_ND)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grads[0].to(slope_ND.dtype)[:, None], None, None, None, None


def _values(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, rows: HeadRows | None, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p of each target and log sum exp of its logits [N], no gradient."""
    if _compiled(head_VD):
        return _in_c(hidden_ND, head_VD, target_N, rows, None, bias_V)
    logprobs_N = hidden_ND.new_empty(len(target_N), dtype=torch.float32)
    total_N = torch.empty_like(logprobs_N)
    for chunk in _chunks(target_N, head_VD):
        logits_nV = head_logits(hidden_ND[chunk], head_VD, rows, bias_V)
        total_N[chunk] = log_sum_exp(logits_nV)
        logprobs_N[chunk] = _value(logits_nV, target_N[chunk], total_N[chunk])
    return logprobs_N, total_N


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, bias_V: Tensor | None) -> Tensor:
        logprobs_N, total_N = _values(hidden_ND, head_VD, target_N, None, bias_V)
        ctx.save_for_backward(hidden_ND, head_VD, target_N, total_N, bias_V)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden_ND, head_VD, target_N, total_N, bias_V = ctx.saved_tensors
        grad_hidden, grad_head = torch.zeros_like(hidden_ND), torch.zeros_like(head_VD)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        for rows in _chunks(target_N, head_VD):
            logits_nV = head_logits(hidden_ND[rows], head_VD, None, bias_V)
            slope = logit_gradient(logits_nV, total_N[rows], target_N[rows], grads[0][rows])
            grad_hidden[rows] = slope @ head_VD
            grad_head.addmm_(slope.T, hidden_ND[rows])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_head, None, grad_bias

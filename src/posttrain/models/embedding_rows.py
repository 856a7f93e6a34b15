"""Embedding rows trained together with an adapter, for template tokens that the base never saw in training.

The rows replace the base's rows (they are not differences), as with PEFT's `trainable_token_indices`: in the input embedding,
and also in the head if it shares its weight with the embedding:

    e(t) = s r_k   for t = id_k, s the model's embedding scale;      z_k = r_k . h

    d log p(t) / d r_k = ([t = id_k] - p_k) h,      p_k = exp(z_k - log sum_v exp z_v),   log sum = z_t - log p(t)

A head with a bias adds it to z.

The gradient from the head is computed from the existing log-probabilities, without a gradient of the whole head.

T: tokens, N: targets, K: trained rows, D: width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.kernels import HeadRows


class TokenRows(NamedTuple):
    """Rows [K, D], float32, that replace the rows `ids` of the embedding layer named `layer`."""

    layer: str
    ids: tuple[int, ...]
    rows: nn.Parameter

    def copy(self) -> "TokenRows":
        """An independent copy."""
        return self._replace(rows=nn.Parameter(self.rows.detach().clone()))


def replace_rows(embedded: Tensor, ids: Tensor, tokens: TokenRows, scale: Tensor | None) -> Tensor:
    """Embedded tokens [..., D] of ids [...], with trained rows in place of the base's."""
    match = ids[..., None] == torch.tensor(tokens.ids, device=ids.device)
    rows_KD = tokens.rows.to(embedded.dtype)
    if scale is not None:
        rows_KD = rows_KD * scale.to(embedded.dtype)
    return torch.where(match.any(-1, keepdim=True), rows_KD[match.int().argmax(-1)], embedded)


def head_rows(tokens: TokenRows, head_VD: Tensor) -> HeadRows:
    """The trained rows as rows of the head."""
    return HeadRows(torch.tensor(tokens.ids, device=head_VD.device), tokens.rows.detach().to(head_VD.dtype))


class RowGradient(torch.autograd.Function):
    """Identity on log p [N] that adds its gradient with respect to the trained rows of the head."""

    @staticmethod
    def forward(
        ctx: Any, logprobs_N: Tensor, hidden_ND: Tensor, head_VD: Tensor, rows_KD: Tensor, ids_K: Tensor, target_N: Tensor,
        softcap: float | None, bias_V: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows = HeadRows(ids_K, rows_KD.to(head_VD.dtype))
        picked_ND = rows.replace(head_VD[target_N], target_N)
        target_logit_N, logits_NK = (hidden_ND.float() * picked_ND.float()).sum(-1), hidden_ND.float() @ rows.rows_KD.float().T
        if bias_V is not None:
            target_logit_N, logits_NK = target_logit_N + bias_V[target_N], logits_NK + bias_V[ids_K]
        target_logit_N, logits_NK = capped(target_logit_N, softcap), capped(logits_NK, softcap)
        share_NK = (logits_NK - (target_logit_N - logprobs_N)[:, None]).exp().clamp_(max=1)
        slope_NK = (target_N[:, None] == ids_K).float() - share_NK
        if softcap is not None:
            slope_NK *= 1 - (logits_NK / softcap) ** 2
        ctx.save_for_backward(slope_NK, hidden_ND)
        return logprobs_N.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        slope_NK, hidden_ND = ctx.saved_tensors
        grad_rows = (slope_NK * grads[0][:, None]).T @ hidden_ND.float()
        return grads[0], None, None, grad_rows, None, None, None, None


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits, soft-capped unless `softcap` is None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap

"""The rows of a language-model head that an adapter trained, and logits with them.

K: trained rows, N: targets, D: width, V: vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadRows(NamedTuple):
    """Rows [K, D], in the head's type and detached, that stand for those of ids [K] in a head: no copy of the head is made."""

    ids_K: Tensor
    rows_KD: Tensor

    def replace(self, picked_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Rows of the head picked by ids [N], with these in their places."""
        match_NK = ids_N[:, None] == self.ids_K
        return torch.where(match_NK.any(1, keepdim=True), self.rows_KD[match_NK.int().argmax(1)], picked_ND)

    def mean_(self, mean_ND: Tensor, head_VD: Tensor, share_NK: Tensor) -> Tensor:
        """What probabilities [N, K] of these rows change in a mean over the rows of the head."""
        return mean_ND.add_(share_NK.to(head_VD.dtype) @ (self.rows_KD - head_VD[self.ids_K]))


def head_logits(hidden_ND: Tensor, head_VD: Tensor, rows: HeadRows | None, bias_V: Tensor | None = None) -> Tensor:
    """Logits [N, V] of a head, in its type."""
    logits_NV = hidden_ND @ head_VD.T
    if rows is not None:
        logits_NV[:, rows.ids_K] = hidden_ND @ rows.rows_KD.T
    return logits_NV if bias_V is None else logits_NV.add_(bias_V)


def target_rows(head_VD: Tensor, target_n: Tensor, rows: HeadRows | None) -> Tensor:
    """The head's rows of some targets [n, D]."""
    return head_VD[target_n] if rows is None else rows.replace(head_VD[target_n], target_n)

"""Logits of one row: by a transformers model, and by ours under a policy."""

import torch

from posttrain.models.base_model import BaseModel
from posttrain.models.segments import Segments, Span


def plain_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of a transformers model, or of a PEFT model around one."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def our_logits(base: BaseModel, ids: list[int], policy: str) -> torch.Tensor:
    """Logits [T, V] of one row under a policy."""
    with torch.no_grad():
        row = torch.tensor(ids)
        hidden = base.hidden(row, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), policy)
        return base.logits(hidden, policy)

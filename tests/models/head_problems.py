"""Hidden states, a head and targets, with log-probabilities and gradients in float64."""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Hidden states, head, targets, and the gradient that comes in."""

    hidden_ND: Tensor
    head_VD: Tensor
    target_N: Tensor
    slope_N: Tensor


def problem(rows: int = 37, vocabulary: int = 151, width: int = 24, *, sharp: float = 0.5, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator) * sharp
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    return Problem(hidden, head, target, torch.randn(rows, generator=generator))


def exact(given: Problem, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log p, and the gradients in hidden and head, by float64 autograd."""
    hidden, head = given.hidden_ND.double().requires_grad_(), given.head_VD.double().requires_grad_()
    logits = hidden @ head.T
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    value = torch.log_softmax(logits, -1).gather(1, given.target_N[:, None])[:, 0]
    return value.detach(), *torch.autograd.grad((value * given.slope_N.double()).sum(), [hidden, head])

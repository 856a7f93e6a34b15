"""The scalar head of a reward model, used with an adapter on the frozen base.

    score = w . h - shift,   h: the last hidden state at the last real token of a completion

The shift is not a parameter: it is set after training, so that the scores of demonstrations have mean 0. In PEFT's
format the head is the module `score` of a sequence classifier with one label (`modules_to_save`), which has no shift.

D: width, N: completions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

SCORE_NAME = "base_model.model.score.weight"


class ScoreHead(NamedTuple):
    """w [1, D], float32, and the shift, which is subtracted."""

    weight: nn.Parameter
    shift: float = 0.0

    def score(self, hidden_ND: Tensor) -> Tensor:
        """Scores [N], float32."""
        return hidden_ND.float() @ self.weight[0] - self.shift

    def copy(self) -> "ScoreHead":
        """An independent copy."""
        return self._replace(weight=nn.Parameter(self.weight.detach().clone()))


def new_head(width: int, *, seed: int, device: torch.device) -> ScoreHead:
    """A head with small random weights: normal with variance 1 / (D + 1) (Stiennon et al. 2020)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(1, width).normal_(std=1 / math.sqrt(width + 1), generator=generator)
    return ScoreHead(nn.Parameter(weight.to(device)))


def zero_head(width: int, *, device: torch.device) -> ScoreHead:
    """A head that scores everything 0."""
    return ScoreHead(nn.Parameter(torch.zeros(1, width, device=device)))

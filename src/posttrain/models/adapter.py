"""One low-rank adapter (Hu et al. 2021): its settings, its matrices, and what else was trained beside them.

R: rank.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from posttrain.models.embedding_rows import TokenRows
from posttrain.models.heads import SCORE_NAME, ScoreHead


class LoraSettings(NamedTuple):
    """The shape of an adapter."""

    rank: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]
    scaling: str

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


class LoraAdapter:
    """One adapter: for each adapted layer its A and B, float32, and what else was trained beside them.

    That is the embedding rows of some tokens, and the head of a reward model.
    """

    def __init__(
        self, name: str, settings: LoraSettings, weights: dict[str, tuple[nn.Parameter, nn.Parameter]],
        tokens: TokenRows | None = None, head: ScoreHead | None = None,
    ) -> None:  # fmt: skip
        self.name, self.settings, self.weights, self.tokens, self.head = name, settings, weights, tokens, head
        self.training = False
        # A hash of what it was read from; None for one that is made or trained here.
        self.fingerprint: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by PEFT's names, in a fixed order."""
        named: dict[str, nn.Parameter] = {}
        for layer, (a, b) in self.weights.items():
            named[f"base_model.model.{layer}.lora_A.weight"] = a
            named[f"base_model.model.{layer}.lora_B.weight"] = b
        if self.tokens is not None:
            named[f"base_model.model.{self.tokens.layer}.token_adapter.trainable_tokens_delta"] = self.tokens.rows
        if self.head is not None:
            named[SCORE_NAME] = self.head.weight
        return named

    @property
    def drops(self) -> bool:
        """Whether dropout is in force: while gradients are recorded, and so not in validation."""
        return self.training and self.settings.dropout > 0 and torch.is_grad_enabled()

    def requires_grad_(self, on: bool) -> None:
        """Make the adapter trainable, or freeze it."""
        self.training = on
        for parameter in self.parameters().values():
            parameter.requires_grad_(on)

    def without_dropout(self) -> None:
        """A policy that drops inputs while it learns is not the one that sampled."""
        self.settings = self.settings._replace(dropout=0.0)

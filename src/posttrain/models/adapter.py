"""One low-rank adapter (Hu et al. 2021): its settings, its matrices, trained embedding rows and a reward model's head.

R: rank.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from posttrain.models.embedding_rows import TokenRows
from posttrain.models.heads import SCORE_NAME, ScoreHead


class LoraSettings(NamedTuple):
    """Hyperparameters of an adapter."""

    rank: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]
    scaling: str

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


class LoraAdapter:
    """One adapter: A and B of each adapted layer, float32; optionally embedding rows of some tokens and a score head."""

    def __init__(
        self, name: str, settings: LoraSettings, weights: dict[str, tuple[nn.Parameter, nn.Parameter]],
        tokens: TokenRows | None = None, head: ScoreHead | None = None,
    ) -> None:  # fmt: skip
        self.name, self.settings, self.weights, self.tokens, self.head = name, settings, weights, tokens, head
        self.training = False
        # Hash of the files that it was read from; None for an adapter that was made or trained in this process.
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
        """Whether dropout is active: only while gradients are recorded, so never in validation."""
        return self.training and self.settings.dropout > 0 and torch.is_grad_enabled()

    def requires_grad_(self, on: bool) -> None:
        """Make the adapter trainable (`on`) or freeze it."""
        self.training = on
        for parameter in self.parameters().values():
            parameter.requires_grad_(on)

    def without_dropout(self) -> None:
        """Switch dropout off, so that the trained policy is the one that sampled."""
        self.settings = self.settings._replace(dropout=0.0)

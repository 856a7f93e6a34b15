"""Which prompts an iteration of PPO samples, and how a pass over them is cut into minibatches.

Both are functions of (seed, iteration, epoch), so a resumed stage needs no state beyond the number of its optimiser step.
"""

from collections.abc import Sequence

import torch

from posttrain.data.prompts import PromptRow
from posttrain.stages.ppo import PpoStage


class PpoSchedule:
    """`minibatches`: optimiser steps of a pass; `steps`: of an iteration; `total_steps`: of the stage."""

    def __init__(self, stage: PpoStage, prompts: Sequence[PromptRow], seed: int) -> None:
        self.prompts, self.seed, self.minibatch = prompts, seed, stage.minibatch
        self.count = min(stage.prompts, len(prompts))
        self.minibatches = -(-self.count // stage.minibatch)
        self.steps = stage.ppo_epochs * self.minibatches
        self.total_steps = stage.iterations * self.steps

    def prompts_of(self, iteration: int) -> list[PromptRow]:
        """The prompts of an iteration, in order."""
        order = torch.randperm(len(self.prompts), generator=self._generator(iteration, 0)).tolist()
        return [self.prompts[i] for i in order[: self.count]]

    def minibatches_of(self, iteration: int, epoch: int) -> list[list[int]]:
        """One pass over an iteration's prompts, by their positions. The first pass keeps the order of sampling, so its batches
        are those that the log-probabilities of the sampling policy were computed in.
        """
        order = list(range(self.count))
        if epoch:
            order = torch.randperm(self.count, generator=self._generator(iteration, epoch)).tolist()
        return [order[start : start + self.minibatch] for start in range(0, self.count, self.minibatch)]

    def _generator(self, iteration: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + iteration * 1009 + epoch) % (2**31 - 1))

"""The rollouts of PPO's iterations on disk. They are written before the first step on them, so a stage that was stopped in the
middle of an iteration goes on with the same tokens.
"""

from pathlib import Path

from posttrain.errors import TrainingError
from posttrain.train.checkpoint import CHECKPOINTS, Checkpoint, Owner, load_newest, load_step, oldest_step, save_checkpoint
from posttrain.train.rollouts import Rollouts, from_tensors, to_tensors


class RolloutStore:
    """The iterations on disk. The last one that was saved or loaded is kept in memory."""

    def __init__(self, stage_folder: Path, owner: Owner | None, *, steps: int, where: str) -> None:
        """`steps`: optimiser steps of an iteration. `where`: what errors name."""
        self.checkpoints, self.owner, self.steps, self.where = stage_folder / CHECKPOINTS, owner, steps, where
        self.folder = self.checkpoints / "rollouts"
        self._newest: tuple[int, Rollouts] | None = None

    def save(self, iteration: int, rollouts: Rollouts) -> None:
        """Write the rollouts of an iteration. Raises ArtifactError when the disk refuses."""
        tensors, state = to_tensors(rollouts)
        # Kept are iterations back to the oldest checkpoint, and the one before it, whose KL moves the coefficient.
        oldest = oldest_step(self.checkpoints) // self.steps
        checkpoint = Checkpoint(tensors, {**state, "iteration": iteration})
        save_checkpoint(self.folder, iteration, checkpoint, keep=iteration - oldest + 2, owner=self.owner)
        self._newest = iteration, rollouts

    def load(self, iteration: int) -> Rollouts:
        """The rollouts of an iteration. Raises TrainingError where they are missing or damaged."""
        if self._newest is not None and self._newest[0] == iteration:
            return self._newest[1]
        saved = load_step(self.folder, iteration, self.owner)
        if saved is None:
            raise TrainingError(
                self.where, f"the rollouts of iteration {iteration + 1} are missing or damaged",
                do="remove the stage's unfinished folder to begin it again",
            )  # fmt: skip
        self._newest = iteration, from_tensors(*saved)
        return self._newest[1]

    def newest(self) -> tuple[int, Rollouts]:
        """The last iteration that was sampled, and its rollouts."""
        if self._newest is None:
            saved = load_newest(self.folder, self.owner)
            assert saved is not None, "a stage that has begun has rollouts"
            self._newest = int(saved.state["iteration"]), from_tensors(*saved)
        return self._newest

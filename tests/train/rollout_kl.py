"""The KL of rollouts from their reference."""

from pathlib import Path

import torch

from posttrain.models.base_model import BaseModel
from posttrain.models.batches import batch_logprobs, pack_trees
from posttrain.train.checkpoint import load_step


@torch.no_grad()
def kl_of_rollouts(base: BaseModel, reference: str, folder: Path, iteration: int) -> float:
    """KL in nats a completion of an iteration's rollouts, from what lies on disk and a reference that this test brings."""
    saved = load_step(folder / "checkpoints/rollouts", iteration)
    assert saved is not None
    prompts, completions = saved.state["prompts"], saved.state["completions"]
    trees = zip(prompts, completions, strict=True)
    reference_N = torch.cat([batch_logprobs(base, pack_trees([tree], base.device), reference) for tree in trees])
    return float((saved.tensors["old"] - reference_N).sum()) / sum(map(len, completions))

"""Checks of a ppo stage: what ends it before its last iteration, and what is an error.

A policy that is too far from its reference, or whose samples are all the same, ends the stage before it learns from that
iteration: the policy so far is published, and the manifest says why. A number that is not finite, or a sampler that differs
from the policy in training, is an error. Both depend on what is on disk alone, so a resumed stage decides the same.
"""

import math
from collections.abc import Sequence

import torch

from posttrain.errors import NonFiniteError, TrainingError
from posttrain.stages.ppo import PpoStage
from posttrain.train.rollouts import ScoredSamples

# Prompts that an error names.
SHOWN = 8


def why_ended(stats: dict[str, float], stage: PpoStage) -> str:
    """Why the stage does not learn from an iteration with these figures; empty where it does."""
    kl, entropy = stats["ppo/kl"], stats["ppo/entropy"]
    if stage.max_kl and kl > stage.max_kl:
        return f"KL to the reference is {kl:.1f} nats a completion, above max_kl = {stage.max_kl:g}"
    if stage.min_entropy and entropy < stage.min_entropy:
        return f"the samples' entropy is {entropy:.4f} nats a token, below min_entropy = {stage.min_entropy:g}"
    return ""


def check_sampled(samples: ScoredSamples, names: Sequence[str], *, where: str) -> None:
    """Refuse rollouts with a number that is not finite. `names`: the prompt of every completion.

    Raises NonFiniteError before anything is learned or written.
    """
    lengths = torch.tensor([len(completion) for group in samples.completions for completion in group])
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    bad = {"score": (~samples.score_B.isfinite()).nonzero().flatten()}
    of_tokens = {"log-probability": samples.old_N, "reference's log-probability": samples.reference_N, "value": samples.value_N}
    bad |= {what: torch.unique(row_N[~values_N.isfinite()]) for what, values_N in of_tokens.items()}
    for what, rows in bad.items():
        if len(rows):
            shown = ", ".join(names[i] for i in rows[:SHOWN].tolist())
            more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
            raise NonFiniteError(
                where, f"the {what} of {len(rows)} of {len(lengths)} completions is not finite; no step was taken on them",
                allowed=f"their prompts: {shown}{more}",
                do="look at what scores them, or lower learning_rate; the last checkpoint is whole",
            )  # fmt: skip


def check_figures(stats: dict[str, float], *, where: str) -> None:
    """Refuse an iteration whose statistics are not finite, as where the squares of its scores overflow float32.

    Raises NonFiniteError before anything is learned or written.
    """
    bad = [name for name, value in stats.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            where, f"{', '.join(bad)} not finite; no step was taken",
            do="make what scores smaller: its numbers, a weight or kl_coef",
        )  # fmt: skip


def check_sampler(mismatch: float, stage: PpoStage) -> None:
    """Refuse rollouts of a sampler whose probabilities differ from those of the policy in training. Raises TrainingError."""
    if mismatch > stage.max_mismatch:
        raise TrainingError(
            f'stage "{stage.name}"', f"{mismatch:.1%} of the sampled tokens have another probability in training",
            allowed=f"at most {stage.max_mismatch:.0%} (max_mismatch)", do='use [base] dtype = "float32"',
        )  # fmt: skip

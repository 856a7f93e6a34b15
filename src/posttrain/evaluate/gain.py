"""The gain of a PPO stage on fresh answers: score and gold of the published policy minus those of its start.

The published policy is the one with the highest gold of several evaluations, so that value is biased upwards. The start and the
published policy therefore answer the same held-out prompts again, with new random numbers:

    gain = mean over prompts of (published - start),   with the 95 % interval of stats.mean

`train/gold.py` writes the rows; the scorecard contains the gains; the terminal table and the report print them. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.artifacts import read_jsonl, verify_files
from posttrain.evaluate import stats

# Files of a PPO stage: the evaluations that choose the policy, and those of the start and the chosen policy on fresh answers.
GOLD, PUBLISHED = "gold.jsonl", "gold_published.jsonl"


def published_gains(stages: Iterable[Path]) -> list[dict[str, Any]]:
    """The gains of PPO stages, from the evaluations in their folders. Stages without them are skipped.

    Raises ArtifactError for a file that was changed after the stage wrote it.
    """
    gains = []
    for folder in stages:
        verify_files(folder, (GOLD, PUBLISHED))
        if (folder / PUBLISHED).is_file():
            fresh, chosen = (list(read_jsonl(folder / name)) for name in (PUBLISHED, GOLD))
            gains.append(published_gain(folder.name, fresh, chosen))
    return gains


def published_gain(name: str, fresh: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score and gold of the published policy minus those of the start, over the same prompts, with 95 % intervals.

    `fresh` has the rows of the start and of the published policy, `chosen` the evaluations that chose it.
    """
    start, published = fresh
    evaluations = sum(row["policy"] == name for row in chosen)
    gain = {"stage": name, "start": start["policy"], "iteration": published["iteration"], "evaluations": evaluations}
    gain |= {"prompts": len(published["gold_B"]), "kl": published["kl"]}
    for key in ("score", "gold"):
        change = stats.difference(start[f"{key}_B"], published[f"{key}_B"], "nats")
        rounded = {end: round(getattr(change, end), 6) for end in ("value", "low", "high")}
        verdict = stats.verdict(change, "higher", "nats")
        gain[key] = {"start": start[key], "published": published[key], "change": {**rounded, "verdict": verdict}}
    return gain

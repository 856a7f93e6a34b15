"""What a ppo stage gained, on answers that chose nothing: score and gold of the published policy less those of its start.

A policy that is published because its gold is the highest of several has a gold that is too high on average: luck helped to
choose it. So start and published policy answer the same held-out prompts once more, with fresh random numbers, and

    gain = mean over prompts of (published - start),   with the 95 % interval of stats.mean

Where it stands: `train/gold.py` writes the rows, the scorecard has the gains, the terminal and the report tell them. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.artifacts import read_jsonl, verify_files
from posttrain.evaluate import stats

# Of a ppo stage's folder: the evaluations that choose a policy, and those of the start and the chosen one on fresh answers.
GOLD, PUBLISHED = "gold.jsonl", "gold_published.jsonl"


def published_gains(stages: Iterable[Path]) -> list[dict[str, Any]]:
    """What ppo stages gained, from the evaluations in their folders; a stage that has none is left out.

    Raises ArtifactError for a file that is not the one that was made.
    """
    gains = []
    for folder in stages:
        verify_files(folder, (GOLD, PUBLISHED))
        if (folder / PUBLISHED).is_file():
            fresh, chosen = (list(read_jsonl(folder / name)) for name in (PUBLISHED, GOLD))
            gains.append(published_gain(folder.name, fresh, chosen))
    return gains


def published_gain(name: str, fresh: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score and gold of the published policy less those of the start, over the same prompts, with 95 % intervals.

    `fresh` are the rows of the start and of the published policy, `chosen` the evaluations that chose it.
    """
    start, published = fresh
    evaluations = sum(row["policy"] == name for row in chosen)
    found = {"stage": name, "start": start["policy"], "iteration": published["iteration"], "evaluations": evaluations}
    found |= {"prompts": len(published["gold_B"]), "kl": published["kl"]}
    for key in ("score", "gold"):
        change = stats.difference(start[f"{key}_B"], published[f"{key}_B"], "nats")
        rounded = {end: round(getattr(change, end), 6) for end in ("value", "low", "high")}
        verdict = stats.verdict(change, "higher", "nats")
        found[key] = {"start": start[key], "published": published[key], "change": {**rounded, "verdict": verdict}}
    return found

"""A reward model measured by itself, on pairs that it was not trained on.

    accuracy      share of pairs with r(chosen) > r(rejected), Wilson's interval
    calibration   how often the model is right where it says s(|gap|): ten bins, and the expected calibration error
                  sum_bins n_bin / n |share right - mean s(|gap|)|                     (Guo et al. 2017, eq. 3)
    length        accuracy where the chosen completion is the longer one and where it is the shorter one; share of the
                  gap's variance that a straight line in the difference of lengths explains (Singhal et al. 2023)

Where it stands: `pipeline.py` calls it for every reward stage, `posttrain evaluate RUN/rm --pairs FILE` for other pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from posttrain.artifacts import write_json, write_jsonl
from posttrain.data.packing import split_by_tokens
from posttrain.data.rankings import RankedPrompt
from posttrain.errors import Interrupted
from posttrain.evaluate.run import Stop
from posttrain.evaluate.stats import wilson
from posttrain.models.batches import MICRO_TOKENS, pack_trees, row_scores
from posttrain.models.load import BaseModel
from posttrain.progress import Progress

BINS = 10


class ScoredPair(NamedTuple):
    """A pair with the scores and lengths in tokens of both completions."""

    id: str
    chosen_score: float
    rejected_score: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def gap(self) -> float:
        """Score of the chosen completion minus that of the rejected one."""
        return self.chosen_score - self.rejected_score


class Measured(NamedTuple):
    """What is said of a reward model, and the scored pairs that say it."""

    found: dict[str, Any]
    pairs: list[ScoredPair]


def measure_reward_model(
    base: BaseModel, adapter: str, prompts: Sequence[RankedPrompt], *, label: str, stop: Stop | None = None
) -> Measured:
    """Score the pairs of prompts and measure; without a pair there is nothing but their number."""
    pairs = score_pairs(base, adapter, prompts, label=label, stop=stop) if prompts else []
    return Measured(measure(pairs) if pairs else {"pairs": 0}, pairs)


def write_measured(folder: Path, measured: Measured) -> None:
    """`reward.json`, and `pairs.jsonl` with the scores of every pair."""
    write_json(folder / "reward.json", measured.found)
    write_jsonl(folder / "pairs.jsonl", (pair._asdict() for pair in measured.pairs))


def describe(found: dict[str, Any]) -> str:
    """One line: `61.2 % of 240 held-out pairs right (54.9 to 67.1), calibration error 0.043`."""
    accuracy = found["accuracy"]
    interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
    error = f"calibration error {found['calibration_error']:.3f}"
    return f"{100 * accuracy['value']:.1f} % of {found['pairs']} pairs right ({interval}), {error}"


@torch.no_grad()
def score_pairs(
    base: BaseModel, adapter: str, prompts: Sequence[RankedPrompt], *, label: str, stop: Stop | None = None
) -> list[ScoredPair]:
    """Scores of all pairs of prompts, in their order. Raises Interrupted when `stop` asks."""
    progress = Progress(label, len(prompts))
    found: list[ScoredPair] = []
    for group in split_by_tokens([p.tokens for p in prompts], MICRO_TOKENS[base.device.type]):
        chosen = [prompts[i] for i in group]
        batch = pack_trees((prompt.tree for prompt in chosen), base.device)
        scores = row_scores(base, batch, adapter).tolist()
        for prompt in chosen:
            own = [scores.pop(0) for _ in prompt.completions]
            lengths = [len(c) for c in prompt.completions]
            found += [
                ScoredPair(p.id, own[p.chosen], own[p.rejected], lengths[p.chosen], lengths[p.rejected]) for p in prompt.pairs
            ]
        progress.update(len(chosen), tokens=batch.tokens)
        if stop is not None and stop.asked:
            raise Interrupted("stopped while measuring the reward model; run the same command to go on")
    return found


def measure(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """What the scores say of the reward model; see the module's equations. Needs at least one pair."""
    right = [pair.gap > 0 for pair in pairs]
    unequal = [pair for pair in pairs if pair.chosen_tokens != pair.rejected_tokens]
    bins = calibration([pair.gap for pair in pairs])
    error = sum(b["n"] / len(pairs) * abs(b["right"] - b["said"]) for b in bins)
    scores = [s for p in pairs for s in (p.chosen_score, p.rejected_score)]
    return {
        "pairs": len(pairs),
        "accuracy": _share(right),
        "chosen_longer": _share([p.gap > 0 for p in unequal if p.chosen_tokens > p.rejected_tokens]),
        "chosen_shorter": _share([p.gap > 0 for p in unequal if p.chosen_tokens < p.rejected_tokens]),
        "longer_preferred": _share([(p.gap > 0) == (p.chosen_tokens > p.rejected_tokens) for p in unequal]),
        "calibration": bins,
        "calibration_error": error,
        "mean_gap": float(numpy.mean([pair.gap for pair in pairs])),
        "score_spread": float(numpy.std(scores)),
        "explained_by_length": explained_by_length(pairs),
    }


def calibration(gaps: Sequence[float]) -> list[dict[str, float]]:
    """Bins of equal width over s(|gap|) from 0.5 to 1 that hold any pair: share right, mean of what was said, n."""
    said = 1 / (1 + numpy.exp(-numpy.abs(numpy.asarray(gaps, dtype=float))))
    right = numpy.asarray(gaps) > 0
    place = numpy.minimum(((said - 0.5) * 2 * BINS).astype(int), BINS - 1)
    found = []
    for index in range(BINS):
        inside = place == index
        if inside.any():
            found.append({"said": float(said[inside].mean()), "right": float(right[inside].mean()), "n": int(inside.sum())})
    return found


def explained_by_length(pairs: Sequence[ScoredPair]) -> float | None:
    """Squared correlation of the gap with the difference of lengths; None where either does not vary."""
    gaps = numpy.asarray([pair.gap for pair in pairs], dtype=float)
    lengths = numpy.asarray([pair.chosen_tokens - pair.rejected_tokens for pair in pairs], dtype=float)
    if len(pairs) < 3 or gaps.std() == 0 or lengths.std() == 0:
        return None
    return float(numpy.corrcoef(gaps, lengths)[0, 1] ** 2)


def _share(hits: Sequence[bool]) -> dict[str, float] | None:
    if not hits:
        return None
    found = wilson(sum(hits), len(hits))
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n}

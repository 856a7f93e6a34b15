"""A reward model asked for its scores: of preference pairs, and of completions.

What the scores of pairs say of it stands in `evaluate/pairs.py`. Where it stands: `pipeline.py` measures every reward stage,
`posttrain evaluate RUN/rm --pairs FILE` one on other pairs; best-of-n scores completions here.

P: prompts, N: completions of a prompt.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posttrain.artifacts import write_json, write_jsonl
from posttrain.data.packing import split_by_tokens
from posttrain.data.rankings import RankedPrompt
from posttrain.evaluate.pairs import ScoredPair, measure
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, pack_trees, row_scores
from posttrain.progress import Progress
from posttrain.stop import StopSignal


class Measured(NamedTuple):
    """What is said of a reward model, and the scored pairs that say it."""

    found: dict[str, Any]
    pairs: list[ScoredPair]


def measure_reward_model(
    base: BaseModel, adapter: str, prompts: Sequence[RankedPrompt], *, label: str, stop: StopSignal | None = None
) -> Measured:
    """Score the pairs of prompts and measure; without a pair there is nothing but their number."""
    pairs = score_pairs(base, adapter, prompts, label=label, stop=stop) if prompts else []
    return Measured(measure(pairs) if pairs else {"pairs": 0}, pairs)


def write_measured(folder: Path, measured: Measured) -> None:
    """`reward.json`, and `pairs.jsonl` with the scores of every pair."""
    write_json(folder / "reward.json", measured.found)
    write_jsonl(folder / "pairs.jsonl", (pair._asdict() for pair in measured.pairs))


@torch.no_grad()
def score_pairs(
    base: BaseModel, adapter: str, prompts: Sequence[RankedPrompt], *, label: str, stop: StopSignal | None = None
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
                ScoredPair(p.id, own[p.chosen], own[p.rejected], lengths[p.chosen], lengths[p.rejected], p.category)
                for p in prompt.pairs
            ]
        progress.update(len(chosen), tokens=batch.tokens)
        if stop is not None:
            stop.check("measuring the reward model")
    return found


@torch.no_grad()
def score_completions(
    base: BaseModel, adapter: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Scores [P][N] of the completions (ids) of each prompt. Equal completions of a prompt are scored once and score alike."""
    found: list[dict[tuple[int, ...], float]] = [{} for _ in prompts]
    trees: list[tuple[int, list[tuple[int, ...]]]] = []
    limit = MICRO_TOKENS[base.device.type]
    for index, own in enumerate(completions):
        different = list(dict.fromkeys(map(tuple, own)))
        # Many completions of one prompt are more than is computed at once: they hang below copies of it.
        trees += [(index, [different[i] for i in group]) for group in split_by_tokens(list(map(len, different)), limit)]
    for group in split_by_tokens([len(prompts[i]) + sum(map(len, own)) for i, own in trees], limit):
        chosen = [trees[k] for k in group]
        batch = pack_trees(((prompts[i], own) for i, own in chosen), base.device)
        scores = row_scores(base, batch, adapter).tolist()
        for index, own in chosen:
            found[index] |= {completion: scores.pop(0) for completion in own}
    return [[scores[tuple(c)] for c in own] for scores, own in zip(found, completions, strict=True)]

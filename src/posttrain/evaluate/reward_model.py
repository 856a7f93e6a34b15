"""Score preference pairs and completions with a reward model.

`evaluate/pairs.py` computes the measures of pairs. `pipeline.py` measures every reward stage; `posttrain evaluate RUN/rm
--pairs FILE` measures one on other pairs; best-of-n scores completions.

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
    """The measures of a reward model (`found`) and its scored pairs."""

    found: dict[str, Any]
    pairs: list[ScoredPair]


def measure_reward_model(
    base: BaseModel, adapter: str, prompts: Sequence[RankedPrompt], *, label: str, stop: StopSignal | None = None
) -> Measured:
    """Score the pairs of prompts and compute the measures. Without pairs the result is {"pairs": 0}."""
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
    """Scores of all pairs of prompts, in order. Raises Interrupted if a stop is requested."""
    progress = Progress(label, len(prompts))
    scored_pairs: list[ScoredPair] = []
    for group in split_by_tokens([p.tokens for p in prompts], MICRO_TOKENS[base.device.type]):
        group_prompts = [prompts[i] for i in group]
        batch = pack_trees((prompt.tree for prompt in group_prompts), base.device)
        scores = row_scores(base, batch, adapter).tolist()
        for prompt in group_prompts:
            scores_of_prompt = [scores.pop(0) for _ in prompt.completions]
            lengths = [len(c) for c in prompt.completions]
            scored_pairs += [
                ScoredPair(
                    p.id,
                    scores_of_prompt[p.chosen],
                    scores_of_prompt[p.rejected],
                    lengths[p.chosen],
                    lengths[p.rejected],
                    p.category,
                )
                for p in prompt.pairs
            ]
        progress.update(len(group_prompts), tokens=batch.tokens)
        if stop is not None:
            stop.check("measuring the reward model")
    return scored_pairs


@torch.no_grad()
def score_completions(
    base: BaseModel, adapter: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Scores [P][N] of the completions (ids) of each prompt. Equal completions of a prompt are scored once."""
    scores_by_prompt: list[dict[tuple[int, ...], float]] = [{} for _ in prompts]
    trees: list[tuple[int, list[tuple[int, ...]]]] = []
    limit = MICRO_TOKENS[base.device.type]
    for index, completions_of_prompt in enumerate(completions):
        distinct = list(dict.fromkeys(map(tuple, completions_of_prompt)))
        # Completions of one prompt that exceed the limit are split over several copies of the prompt.
        trees += [(index, [distinct[i] for i in group]) for group in split_by_tokens(list(map(len, distinct)), limit)]
    for group in split_by_tokens(
        [len(prompts[i]) + sum(map(len, completions_of_prompt)) for i, completions_of_prompt in trees], limit
    ):
        group_trees = [trees[k] for k in group]
        batch = pack_trees(((prompts[i], completions_of_prompt) for i, completions_of_prompt in group_trees), base.device)
        scores = row_scores(base, batch, adapter).tolist()
        for index, completions_of_prompt in group_trees:
            scores_by_prompt[index] |= {completion: scores.pop(0) for completion in completions_of_prompt}
    return [
        [scores[tuple(c)] for c in completions_of_prompt]
        for scores, completions_of_prompt in zip(scores_by_prompt, completions, strict=True)
    ]

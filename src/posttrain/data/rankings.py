"""Preference pairs grouped by prompt, for training and measuring reward models.

The prompt and each completion are computed once. All pairs of a prompt together have the weight of one pair of another prompt
(Ouyang et al. 2022, section 3.5).
"""

from collections.abc import Sequence
from typing import NamedTuple

from posttrain.data.prepare import PairRow


class RankedPair(NamedTuple):
    """A pair of completions of one prompt, by their indices."""

    id: str
    chosen: int
    rejected: int
    margin: float
    probability: float
    category: str = ""


class RankedPrompt(NamedTuple):
    """A prompt, its different completions, and the pairs between them."""

    id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    pairs: list[RankedPair]

    @property
    def tree(self) -> tuple[list[int], list[list[int]]]:
        """The prompt and its completions."""
        return self.prompt_ids, self.completions

    @property
    def tokens(self) -> int:
        """The number of tokens to compute."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


def rank_prompts(rows: Sequence[PairRow]) -> list[RankedPrompt]:
    """Group pairs by prompt, in the order of first occurrence. Equal completions are merged."""
    by_prompt: dict[tuple[int, ...], RankedPrompt] = {}
    for row in rows:
        ranked = by_prompt.setdefault(tuple(row.prompt_ids), RankedPrompt(row.id, row.prompt_ids, [], []))
        indices = []
        for side in (row.chosen_ids, row.rejected_ids):
            if side not in ranked.completions:
                ranked.completions.append(side)
            indices.append(ranked.completions.index(side))
        ranked.pairs.append(RankedPair(row.id, indices[0], indices[1], row.margin, row.probability, row.category))
    return list(by_prompt.values())

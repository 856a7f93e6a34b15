"""Preference pairs gathered by prompt: what a reward model is trained on and measured by.

All pairs of one prompt belong together: their completions are computed once each, below one prompt, and weigh together as much
as one pair of another prompt (Ouyang et al. 2022, section 3.5).
"""

from collections.abc import Sequence
from typing import NamedTuple

from posttrain.data.prepare import PairRow


class RankedPair(NamedTuple):
    """One pair of a prompt's completions, by their numbers."""

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
        """The prompt and what hangs below it."""
        return self.prompt_ids, self.completions

    @property
    def tokens(self) -> int:
        """Tokens computed for it."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


def rank_prompts(rows: Sequence[PairRow]) -> list[RankedPrompt]:
    """Pairs of the same prompt together, in the order in which prompts first come; equal completions are one."""
    found: dict[tuple[int, ...], RankedPrompt] = {}
    for row in rows:
        ranked = found.setdefault(tuple(row.prompt_ids), RankedPrompt(row.id, row.prompt_ids, [], []))
        places = []
        for side in (row.chosen_ids, row.rejected_ids):
            if side not in ranked.completions:
                ranked.completions.append(side)
            places.append(ranked.completions.index(side))
        ranked.pairs.append(RankedPair(row.id, places[0], places[1], row.margin, row.probability, row.category))
    return list(found.values())

"""Draws of principles by their weights."""

import math
import random
from collections.abc import Sequence

from posttrain.constitution.principles import Principle


def draw_by_weight(principles: Sequence[Principle], row: str, *, count: int, seed: int) -> list[Principle]:
    """`count` principles for a prompt (0: all), without repetition. A function of the seed and the id of the prompt alone."""
    chance = random.Random(f"{seed}|{row}")
    # The smallest −log(u) / w of uniform u draw without replacement by weight w (Efraimidis and Spirakis 2006).
    ranked = sorted(principles, key=lambda principle: -math.log(1 - chance.random()) / principle.weight)
    return ranked[: count or len(ranked)]

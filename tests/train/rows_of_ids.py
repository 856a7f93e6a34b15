"""Rows of token ids to train on."""

import random

from posttrain.data.prepare import TrainRow

ROWS = 11


def ids(chance: random.Random, low: int, high: int) -> list[int]:
    return [chance.randrange(7, 260) for _ in range(chance.randint(low, high))]


def train_rows() -> list[TrainRow]:
    """Conversations whose trained tokens are 1 to 29 of their tokens."""
    chance = random.Random(1)
    rows = []
    for i in range(ROWS):
        tokens = ids(chance, 4, 40)
        first = chance.randrange(1, len(tokens))
        rows.append(TrainRow(f"row-{i}", tokens, [k >= first for k in range(len(tokens))]))
    return rows

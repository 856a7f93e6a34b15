"""Which rows a step sees and its learning rate: pure functions of the step number, so that resuming needs no state.

Epochs are seeded permutations laid end to end and cut into steps; the last step of the run may be shorter. Every row is seen
once an epoch, however often the run is stopped and resumed.

    rate(s) = peak (s + 1) / W                                   for s < W = ceil(warmup S), steps counted from 0
    rate(s) = peak (F + (1 - F) fall((s - W) / (S - W)))         after it, F = FINAL_RATE
    fall(x) = (1 + cos(pi x)) / 2  (cosine),  1 - x  (linear),  1  (constant)
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

FINAL_RATE = 0.1  # of the peak, where cosine and linear schedules end


class LoopSettings(NamedTuple):
    """The optimiser's settings; `settings.py` says what each means."""

    epochs: float
    batch: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip: float
    keep: str
    patience: int
    validate_every: int
    checkpoint_every: int
    checkpoint_minutes: float
    seed: int


def total_rows(rows: int, settings: LoopSettings) -> int:
    """Rows that a run sees, repetitions counted; at least one."""
    # Rounded first: 0.1 * 30 is 3.0000000000000004, and its ceiling would be a fourth row.
    return max(1, math.ceil(round(rows * settings.epochs, 6)))


def total_steps(rows: int, settings: LoopSettings) -> int:
    """Optimiser steps of a run; the last one may be smaller than a batch."""
    return math.ceil(total_rows(rows, settings) / settings.batch)


def step_rows(step: int, rows: int, settings: LoopSettings) -> list[int]:
    """Row indices of one step, counted from 0."""
    first, last = step * settings.batch, min((step + 1) * settings.batch, total_rows(rows, settings))
    return rows_between(first, last, rows, settings.seed)


def rows_between(first: int, last: int, rows: int, seed: int) -> list[int]:
    """Row indices at the positions [first, last) of an endless run over `rows` rows."""
    places = [divmod(position, rows) for position in range(first, last)]
    return [_permutation(epoch, rows, seed)[offset] for epoch, offset in places]


def run_order(rows: int, settings: LoopSettings) -> Iterator[list[int]]:
    """The row indices of every step of a run, in order."""
    return (step_rows(step, rows, settings) for step in range(total_steps(rows, settings)))


@lru_cache(maxsize=2)  # the current epoch and, in a step that spans two, the next
def _permutation(epoch: int, rows: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def validation_interval(rows: int, settings: LoopSettings) -> int:
    """Steps between validations; 0 validates at the end only. `keep = "best"` and `patience` need several an epoch."""
    if settings.validate_every:
        return settings.validate_every
    wants_many = settings.patience > 0 or settings.keep == "best"
    return max(1, round(rows / settings.batch / 4)) if wants_many else 0


def epochs_seen(steps: int, rows: int, settings: LoopSettings) -> float:
    """Passes over the data after so many steps; the last step may be short."""
    return min(steps * settings.batch, total_rows(rows, settings)) / rows


def learning_rate(step: int, steps: int, settings: LoopSettings) -> float:
    """Rate of a step (counted from 0): linear warm-up, then the schedule down to a tenth of the peak."""
    warmup = math.ceil(round(steps * settings.warmup, 6))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - warmup) / max(1, steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1 - share
    return settings.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * fall)

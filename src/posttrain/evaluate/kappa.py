"""Cohen's kappa: the agreement of two raters beyond chance, with its 95 % interval.

    kappa = (p_o − p_e) / (1 − p_e)

    p_o   share of items on which both give the same label
    p_e   the share that raters with these frequencies of labels would agree on by chance
    interval: kappa ± 1.96 √var, with the large-sample variance of Fleiss, Cohen and Everitt 1969 (Psychol. Bull. 72:323)

The interval is too narrow for few items: below about 30 it is a hint. Not included: more than two raters, weights.
"""

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

from posttrain.evaluate.stats import Z


class Kappa(NamedTuple):
    """Kappa, its 95 % interval, the items and the share of equal labels. `value` is None where chance alone would agree."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    alike: float


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> Kappa | None:
    """The agreement of two raters on the same items. None without items."""
    n = len(first)
    assert n == len(second), "both raters need the same items"
    if not n:
        return None
    cells = {cell: count / n for cell, count in Counter(zip(first, second)).items()}
    rows = {label: sum(p for (a, _), p in cells.items() if a == label) for label in (True, False)}
    columns = {label: sum(p for (_, b), p in cells.items() if b == label) for label in (True, False)}
    alike = cells.get((True, True), 0.0) + cells.get((False, False), 0.0)
    chance = sum(rows[label] * columns[label] for label in (True, False))
    if chance >= 1:
        return Kappa(None, None, None, n, alike)
    kappa = (alike - chance) / (1 - chance)
    diagonal = sum(cells.get((k, k), 0.0) * (1 - (rows[k] + columns[k]) * (1 - kappa)) ** 2 for k in (True, False))
    off = (1 - kappa) ** 2 * sum(p * (columns[a] + rows[b]) ** 2 for (a, b), p in cells.items() if a != b)
    variance = (diagonal + off - (kappa - chance * (1 - kappa)) ** 2) / (1 - chance) ** 2 / n
    half = Z * sqrt(max(0.0, variance))
    return Kappa(kappa, max(-1.0, kappa - half), min(1.0, kappa + half), n, alike)

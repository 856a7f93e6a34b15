"""The figures of a stage that labels pairs, from its votes alone.

    decisive        a vote that prefers one answer: a probability other than 1/2; other votes abstain or tie
    label           p = Σ w p / Σ w over the votes with a probability; the pair is labelled if p is not 1/2
    share first     share of single orders in which the answer shown first is preferred, over both orders of every vote
    kappa           Cohen's kappa of a principle's decisive votes, or of the labels, with those of people (evaluate/kappa.py)
    left out        labels that change side, or vanish, if a principle does not vote
    agreement       mean share of pairs of principles that agree on an item, over items with at least two decisive votes

A single decisive vote agrees with itself, so items with fewer than two do not count: a panel whose members fall silent would
otherwise seem to agree more and more.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from posttrain.constitution.principles import Constitution
from posttrain.constitution.revision_figures import Figure, held_out_of, mean_of, share, title_of
from posttrain.constitution.trail_files import JudgedRecord, RowsStage, VoteRecord
from posttrain.evaluate.kappa import Kappa, cohens_kappa
from posttrain.evaluate.stats import weighted_mean
from posttrain.judge.verdict import preference_score

# Difference to a stored label from which the votes are said not to give it.
_TOLERANCE = 1e-4


def label_figures(stage: RowsStage, constitution: Constitution | None = None) -> dict[str, Any]:
    """All figures of a stage with judged pairs. `constitution` gives titles, and the tags of principles that were left out."""
    judged = stage.judged
    votes = Counter(vote.principle for row in judged for vote in row.votes)
    names = sorted(votes, key=lambda name: (-votes[name], name))
    labels = [(row, _prefers(row.probability)) for row in judged]
    return {
        "pairs": len(judged),
        "outcomes": dict(Counter(row.outcome for row in judged)),
        "dropped": dict(Counter(row.reason or "no reason" for row in judged if row.outcome == "dropped").most_common()),
        "abstained": dict(Counter(row.reason or "no reason" for row in judged if row.outcome == "abstained").most_common()),
        "confidence": mean_of([max(p, 1 - p) for row in judged if (p := row.probability) is not None]),
        "human": _with_people([(label, _prefers(row.human)) for row, label in labels]),
        "agreement": _agreement(judged),
        "first": _first([vote for row in judged for vote in row.votes]),
        "by_principle": {
            name: {"title": title_of(constitution, name), **_of_principle(name, judged)} for name in names
        },
        "by_category": {
            name: {"held_out": held_out_of(name, stage.left_out, constitution), **_of_category(name, judged)}
            for name in sorted({row.category for row in judged})
        },
        "left_out": list(stage.left_out),
        "unexplained": sum(_unexplained(row) for row in judged),
        "judge": stage.table("judge"),
    }  # fmt: skip


def weighted_vote(votes: Sequence[VoteRecord]) -> float | None:
    """The probability that A is better by all votes with a probability; None without one."""
    return weighted_mean((vote.weight, vote.probability) for vote in votes)


def left_out_labels(name: str, judged: Sequence[JudgedRecord]) -> dict[str, int]:
    """Labels without the votes of one principle: how many it voted on, and how many of those flip or vanish."""
    counts = Counter[str]()
    for row in judged:
        before = _prefers(weighted_vote(row.votes))
        if before is None or not any(vote.principle == name and vote.probability is not None for vote in row.votes):
            continue
        after = _prefers(weighted_vote([vote for vote in row.votes if vote.principle != name]))
        counts["labels"] += 1
        counts["vanish"] += after is None
        counts["flip"] += after is not None and after != before
    return {key: counts[key] for key in ("labels", "flip", "vanish")}


def _of_principle(name: str, judged: Sequence[JudgedRecord]) -> Figure:
    votes = [(row, vote) for row in judged for vote in row.votes if vote.principle == name]
    decisive = [(row, vote) for row, vote in votes if vote.decisive]
    sides = [(_prefers(row.probability), _prefers(vote.probability)) for row, vote in decisive]
    labelled = [(label, side) for label, side in sides if label is not None]
    return {
        "votes": len(votes),
        "decisive": len(decisive),
        "abstained": sum(vote.probability is None for _, vote in votes),
        "tied": sum(vote.probability == 0.5 for _, vote in votes),
        "why": dict(Counter(vote.why or "no reason" for _, vote in votes if vote.probability is None).most_common()),
        "first": _first([vote for _, vote in votes]),
        "with_label": share(sum(a == b for a, b in labelled), len(labelled)),
        "human": _with_people([(side, _prefers(row.human)) for (row, _), (_, side) in zip(decisive, sides)]),
        "without": left_out_labels(name, judged),
    }


def _of_category(name: str, judged: Sequence[JudgedRecord]) -> Figure:
    rows = [row for row in judged if row.category == name]
    return {
        "pairs": len(rows),
        "labelled": share(sum(row.outcome == "labelled" for row in rows), len(rows)),
        "human": _with_people([(_prefers(row.probability), _prefers(row.human)) for row in rows]),
    }


def _prefers(probability: float | None) -> bool | None:
    """Whether A is preferred; None for no probability and for 1/2."""
    return None if probability is None or abs(probability - 0.5) < 1e-12 else probability > 0.5


def _with_people(pairs: Sequence[tuple[bool | None, bool | None]]) -> Figure | None:
    """Agreement with people over the items that both decided; None if there is none."""
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    kappa = cohens_kappa([a for a, _ in both], [b for _, b in both])
    return None if kappa is None else {"alike": share(sum(a == b for a, b in both), len(both)), "kappa": _kappa(kappa)}


def _kappa(kappa: Kappa) -> Figure:
    ends = {key: None if value is None else round(value, 6) for key, value in zip(("value", "low", "high"), kappa)}
    return {**ends, "n": kappa.n}


def _first(votes: Sequence[VoteRecord]) -> Figure | None:
    """How often the answer shown first is preferred, over single orders; a tie counts as half."""
    shown = [p for vote in votes for p in (vote.first, None if vote.second is None else 1 - vote.second) if p is not None]
    return share(sum(map(preference_score, shown)), len(shown))


def _agreement(judged: Sequence[JudgedRecord]) -> Figure:
    """Agreement among principles over items with at least two decisive votes."""
    shares, unanimous, decisive = [], 0, Counter[int]()
    for row in judged:
        sides = [vote.probability > 0.5 for vote in row.votes if vote.decisive and vote.probability is not None]
        decisive[len(sides)] += 1
        if len(sides) < 2:
            continue
        pairs = [a == b for a, b in combinations(sides, 2)]
        shares.append(sum(pairs) / len(pairs))
        unanimous += all(pairs)
    return {
        "items": len(shares), "mean": mean_of(shares), "unanimous": share(unanimous, len(shares)),
        "decisive_votes": {str(count): decisive[count] for count in sorted(decisive)},
    }  # fmt: skip


def _unexplained(row: JudgedRecord) -> bool:
    """Whether the votes do not give the stored label."""
    given = weighted_vote(row.votes)
    if row.probability is None or given is None:
        return row.outcome == "labelled"
    return abs(given - row.probability) > _TOLERANCE

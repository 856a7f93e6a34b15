"""The figures of a stage of critique and revision, from its rounds alone.

    found       share of answers in which the policy found the fault, among those that it could judge
    changed     share of drawn prompts whose revision was kept
    length      mean of len(revision) − len(answer), in characters, over kept revisions
    refusals    share of answers and of kept revisions that the rule of evaluate/refusal.py takes for a refusal
    preferred   share of kept revisions that the judge of the gate prefers, among those that it decided

Shares have Wilson's 95 % interval, means the bootstrap's. Rounds of one prompt count as independent, so the intervals are
slightly too narrow where prompts occur in several rounds.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.constitution.evasion import evasion
from posttrain.constitution.principles import Constitution
from posttrain.constitution.trail_files import DROPPED, NOTHING_FOUND, ContrastRecord, RoundRecord, RowsStage
from posttrain.evaluate import refusal
from posttrain.evaluate.stats import Interval, mean, paired_shares, wilson
from posttrain.judge.verdict import preference_score

Figure = dict[str, Any]


def revision_figures(stage: RowsStage, constitution: Constitution | None = None) -> dict[str, Any]:
    """All figures of a stage with rounds. `constitution` gives titles, and the tags of principles that were left out."""
    rounds = stage.rounds
    principles = _grouped(rounds, lambda row: row.principle)
    numbers = _grouped(rounds, lambda row: row.round)
    chains = chains_of(rounds)
    return {
        "prompts": len(chains),
        "rounds": len(numbers),
        "total": _of_rounds(rounds),
        "whole": _of_chains(list(chains.values())),
        "by_principle": {
            name: {"title": title_of(constitution, name), **_of_rounds(rows)}
            for name, rows in sorted(principles.items(), key=lambda entry: (-len(entry[1]), entry[0]))
        },
        "by_round": {str(number): _of_rounds(numbers[number]) for number in sorted(numbers)},
        "by_category": _by_category(chains, stage.left_out, constitution),
        "left_out": list(stage.left_out),
        "dropped": dict(Counter(row.reason or "no reason" for row in rounds if row.outcome == DROPPED).most_common()),
        "evasion": evasion(rounds),
        "gate": stage.table("gate"),
        "judge": stage.table("judge"),
    }


def contrast_figures(stage: RowsStage, constitution: Constitution | None = None) -> dict[str, Any]:
    """Figures of a stage that answers with and without principles: how far the two answers of its pairs differ."""
    names = list(dict.fromkeys(name for row in stage.contrasts for name in row.principles))
    rows_of = {name: [row for row in stage.contrasts if name in row.principles] for name in names}
    return {
        "pairs": len(stage.contrasts),
        "total": _of_contrasts(stage.contrasts),
        "by_principle": {
            name: {"title": title_of(constitution, name), **_of_contrasts(rows)}
            for name, rows in sorted(rows_of.items(), key=lambda entry: -len(entry[1]))
        },
        "dropped": {str(why): count for why, count in stage.table("pairs_dropped").items()},
    }


def chains_of(rounds: Sequence[RoundRecord]) -> dict[str, list[RoundRecord]]:
    """The rounds of each prompt, in order."""
    chains = _grouped(rounds, lambda row: row.prompt_id)
    return {prompt: sorted(rows, key=lambda row: row.round) for prompt, rows in chains.items()}


def title_of(constitution: Constitution | None, name: str) -> str:
    """The title of a principle, empty if the constitution is not known."""
    if constitution is None:
        return ""
    return next((principle.title for principle in constitution.principle if principle.id == name), "")


def held_out_of(category: str, left_out: Sequence[str], constitution: Constitution | None) -> list[str]:
    """Ids of the left-out principles that a category of prompts names: by a tag, by the id, or by a word of the id."""
    word = category.casefold()
    if constitution is None:
        return [name for name in left_out if word and word in {name, *name.split("-")}]
    removed = [p for p in constitution.principle if {p.id, *p.tags} & set(left_out)]
    return [p.id for p in removed if word and word in {p.id, *p.id.split("-"), *p.tags}]


def share(hits: float, n: int) -> Figure | None:
    """A share with its interval and its count; None without items."""
    return rounded(wilson(hits, n)) if n else None


def rounded(interval: Interval) -> Figure:
    """An interval for JSON."""
    return {"value": round(interval.value, 6), "low": round(interval.low, 6), "high": round(interval.high, 6), "n": interval.n}


def mean_of(values: Sequence[float]) -> Figure | None:
    """A mean with its interval; None without values."""
    return rounded(mean(values)) if values else None


def refused(text: str) -> bool:
    """Whether the rule takes a text for a refusal."""
    return refusal.judge(text).refused


def _of_rounds(rows: Sequence[RoundRecord]) -> Figure:
    """Figures of some rounds. Refusals are counted over kept revisions and the answers before them."""
    revised = [row for row in rows if row.revised]
    looked = [row for row in rows if row.looked]
    asked = [row.gate for row in revised if row.gate is not None]
    return {
        "drawn": len(rows),
        "found": share(sum(row.found for row in looked), len(looked)),
        "changed": share(len(revised), len(rows)),
        "nothing_found": sum(row.outcome == NOTHING_FOUND for row in rows),
        "dropped": sum(row.outcome == DROPPED for row in rows),
        "length_change": mean_of([len(row.after) - len(row.answer) for row in revised]),
        "refusals": _refusals([row.answer for row in revised], [row.after for row in revised]),
        "preferred": share(sum(map(preference_score, asked)), len(asked)),
    }


def _of_chains(chains: Sequence[Sequence[RoundRecord]]) -> Figure:
    """Figures of prompts: the first answer against the text after the last round."""
    looked = [chain for chain in chains if any(row.looked for row in chain)]
    return {
        "prompts": len(chains),
        "found": share(sum(any(row.found for row in chain) for chain in looked), len(looked)),
        "changed": share(sum(any(row.revised for row in chain) for chain in chains), len(chains)),
        "refusals": _refusals([chain[0].answer for chain in chains], [chain[-1].after for chain in chains]),
    }


def _by_category(
    chains: Mapping[str, Sequence[RoundRecord]], left_out: Sequence[str], constitution: Constitution | None
) -> dict[str, Figure]:
    groups: dict[str, list[Sequence[RoundRecord]]] = {}
    for chain in chains.values():
        groups.setdefault(chain[0].category, []).append(chain)
    return {
        name: {"held_out": held_out_of(name, left_out, constitution), **_of_chains(groups[name])} for name in sorted(groups)
    }


def _of_contrasts(rows: Sequence[ContrastRecord]) -> Figure:
    return {
        "drawn": len(rows),
        "length_change": mean_of([len(row.chosen) - len(row.rejected) for row in rows]),
        "refusals": _refusals([row.rejected for row in rows], [row.chosen for row in rows]),
    }


def _refusals(before: Sequence[str], after: Sequence[str]) -> Figure | None:
    """Refusals before and after, and the paired change; None without texts."""
    if not before:
        return None
    sides = [[float(refused(text)) for text in texts] for texts in (before, after)]
    change = paired_shares(*sides)
    return {
        "before": share(sum(sides[0]), len(before)), "after": share(sum(sides[1]), len(after)), "change": rounded(change),
    }  # fmt: skip


def _grouped(rows: Sequence[RoundRecord], key: Callable[[RoundRecord], Any]) -> dict[Any, list[RoundRecord]]:
    groups: dict[Any, list[RoundRecord]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups

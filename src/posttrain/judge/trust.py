"""The audit of a judge at the head of a stage: a judge that is not shown to be better than chance may not label.

A rule is exempt, because the labels are defined by it. The figures are written into the stage's folder before anything is
labelled, and a resumed stage reads them there.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import fingerprint, write_json
from posttrain.errors import JudgeError
from posttrain.judge.audit import audit, read_gold
from posttrain.judge.prompts import conversation_text
from posttrain.judge.verdict import PairwiseJudge
from posttrain.records import PreferencePair
from posttrain.terminal import say

AUDIT = "judge_audit.json"
EXEMPT = "a rule is its own definition"


class Trust(NamedTuple):
    """The figures of an audit, and whether the judge passed."""

    figures: dict[str, Any]
    passes: bool


def audit_before_use(judge: PairwiseJudge, *, gold: str, allow_weak: bool, where: str, folder: Path) -> Trust:
    """Audit a judge on gold pairs, or read the audit of the same judge and pairs from `folder`.

    Writes judge_audit.json into the folder. Raises JudgeError for a judge that does not pass, unless `allow_weak`; DataError
    for gold pairs that cannot be read.
    """
    identity = judge.identity()
    if identity["kind"] == "rule":
        figures: dict[str, Any] = {"judge": identity, "exempt": EXEMPT, "passes": True}
        write_json(folder / AUDIT, figures)
        return Trust(figures, True)
    pairs = read_gold(gold)
    asked = {"file": gold, "pairs": len(pairs), "hash": fingerprint([_content(pair) for pair in pairs])}
    earlier = _earlier(folder / AUDIT)
    if earlier.get("judge") == identity and earlier.get("gold") == asked:
        figures = earlier
    else:
        say(f"auditing the judge {judge.name} on {len(pairs)} gold pairs")
        figures = {**audit(judge, pairs), "gold": asked}
        write_json(folder / AUDIT, figures)
    if not figures["passes"] and not allow_weak:
        raise _refusal(judge.name, figures, where)
    return Trust(figures, bool(figures["passes"]))


def _content(pair: PreferencePair) -> list[str]:
    return [conversation_text(part) for part in (pair.prompt, pair.chosen, pair.rejected)]


def _earlier(path: Path) -> dict[str, Any]:
    """The figures of an earlier audit; none if the file is missing or damaged."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


def _refusal(name: str, figures: dict[str, Any], where: str) -> JudgeError:
    """The error for a judge that failed, with the figures that a user needs to choose another."""
    gold, accuracy = figures["gold"], figures["accuracy"]
    if accuracy is None:
        reasons = "; ".join(f"{count:,}: {why}" for why, count in figures["abstained"].items())
        measured = f'the judge "{name}" decided none of {figures["pairs"]:,} gold pairs ({reasons})'
    else:
        abstained = figures["pairs"] - accuracy["n"]
        measured = (
            f'the judge "{name}" prefers the better answer in {accuracy["value"]:.1%} of {accuracy["n"]:,} decided gold pairs '
            f"(95 % interval {accuracy['low']:.1%} to {accuracy['high']:.1%}; {abstained:,} abstentions; "
            f'gold "{gold["file"]}")'
        )
    return JudgeError(
        where, f"{measured}, which is not shown to be better than chance",
        allowed="an accuracy whose interval is above 50 %",
        do="name another judge or more gold pairs, use a contrast stage, which needs no judge, or set allow_weak_judge = true",
    )  # fmt: skip

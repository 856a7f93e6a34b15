"""Signs that training damaged a policy: answers that no longer end or repeat themselves, prose that is predicted worse.

    repetition = share of an answer's runs of four words that stand in it before
    warning    = a change against the parent is shown to be for the worse, and as large as LEAST says

A few rows of odd text, seen too often, can do this while the training loss falls as it should. The sizes keep the small costs
of an ordinary stage out: they are losses, and told as such (`evaluate/tax.py`).

Where it stands: `scorecard.py` takes the figures of all generated answers; the terminal and the report begin with the warnings.
Left out: a judgement of what an answer says.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluate import stats
from posttrain.evaluate.tax import parent_of
from posttrain.records import Score

# The smallest change that is warned of: of shares (answers that end, runs that repeat), and of nats a token of prose.
LEAST = {"share": 0.1, "nats": 0.2}
_RUN = 4
# Scripts that put no space between words count by the character.
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+|[^\w\s]")
Values = dict[tuple[str, str], float]


def repetition(text: str) -> float:
    """Share of the runs of four words that stand in the text before; 0 of fewer than five words."""
    words = _WORD.findall(text.casefold())
    runs = [tuple(words[k : k + _RUN]) for k in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def answer_figures(scores: Sequence[Score], before: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """Share of the written answers that end, and how far they repeat themselves, with the changes against other policies.

    `before` has the scores of other policies by name. Entries are like a measure's; none without written answers.
    """
    own, others = _values(scores), {name: _values(found) for name, found in before.items()}
    entries = {}
    for key, title, better in (("ended", "answers that end", "higher"), ("repetition", "repeated runs of four words", "lower")):
        changes = [
            {"against": name, **_change(other[key], own[key], better)}
            for name, other in others.items() if own[key].keys() & other[key].keys()
        ]  # fmt: skip
        if own[key]:
            value = sum(own[key].values()) / len(own[key])
            entry = {"value": round(value, 6), "n": len(own[key]), "better": better, "unit": "share", "title": title}
            entries[key] = entry | {"changes": changes}
    return entries


def _values(scores: Sequence[Score]) -> dict[str, Values]:
    written = [s for s in scores if "ended" in s.detail]
    return {
        "ended": {(s.task, s.item): float(s.detail["ended"]) for s in written},
        "repetition": {(s.task, s.item): repetition(s.answer) for s in written},
    }


def _change(before: Values, after: Values, better: Any) -> dict[str, Any]:
    shared = [key for key in after if key in before]
    found = stats.mean([after[key] - before[key] for key in shared])
    verdict = stats.verdict(found, better, "nats")
    return {"value": round(found.value, 6), "low": round(found.low, 6), "high": round(found.high, 6), "verdict": verdict}


def signs_of_damage(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of a scorecard's stages those that look damaged against their parent, the last stage first.

    Rows {"stage", "against", "signs": [{"title", "unit", "value", "low", "high"}]}.
    """
    found = []
    for stage in reversed(stages[1:]):
        against = parent_of(stage, stages[0]["name"])
        prose = [entry for entry in stage["measures"].values() if entry["unit"] == "nats"]
        signs = [sign for entry in (*stage.get("answers", {}).values(), *prose) if (sign := _sign(entry, against))]
        if signs:
            found.append({"stage": stage["name"], "against": against, "signs": signs})
    return found


def _sign(entry: Mapping[str, Any], against: str) -> dict[str, Any] | None:
    change = next((c for c in entry.get("changes", ()) if c["against"] == against), None)
    if change is None or change["verdict"] != "worse" or abs(change["value"]) < LEAST[entry["unit"]]:
        return None
    return {"title": entry["title"], "unit": entry["unit"], **{key: change[key] for key in ("value", "low", "high")}}

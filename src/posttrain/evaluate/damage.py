"""Signs that training damaged a policy: answers that do not end, answers that repeat themselves, and worse prediction of prose.

    repetition = share of an answer's runs of four words that occur earlier in it
    warning    = the change against the parent has the verdict "worse" and is at least WARNING_SIZE

A few odd rows that are repeated too often can cause this while the training loss falls normally. WARNING_SIZE excludes the
small costs of an ordinary stage, which are reported as losses (`evaluate/tax.py`).

`scorecard.py` stores the figures of all generated answers. The terminal table and the report start with the warnings. The
content of answers is not judged.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluate import stats
from posttrain.evaluate.tax import parent_of
from posttrain.records import Score

# The smallest change that gives a warning: for shares (answers that end, repeated runs), and in nats per token of prose.
WARNING_SIZE = {"share": 0.1, "nats": 0.2}
_RUN_WORDS = 4
# In scripts without spaces between words every character counts as a word.
_UNSPACED_SCRIPTS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED_SCRIPTS}]|[^\W{_UNSPACED_SCRIPTS}]+|[^\w\s]")
Values = dict[tuple[str, str], float]


def repetition(text: str) -> float:
    """Share of the runs of four words that occur earlier in the text; 0 for fewer than five words."""
    words = _WORD.findall(text.casefold())
    runs = [tuple(words[k : k + _RUN_WORDS]) for k in range(len(words) - _RUN_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def answer_figures(scores: Sequence[Score], before: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
    """The share of generated answers that end and their repetition, with the changes against other policies.

    `before` has the scores of other policies by name. Entries have the format of a measure; none without generated answers.
    """
    values, other_values = _values(scores), {name: _values(other_scores) for name, other_scores in before.items()}
    entries = {}
    for key, title, better in (("ended", "answers that end", "higher"), ("repetition", "repeated runs of four words", "lower")):
        changes = [
            {"against": name, **_change(before_values[key], values[key], better)}
            for name, before_values in other_values.items() if values[key].keys() & before_values[key].keys()
        ]  # fmt: skip
        if values[key]:
            value = sum(values[key].values()) / len(values[key])
            entry = {"value": round(value, 6), "n": len(values[key]), "better": better, "unit": "share", "title": title}
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
    interval = stats.mean([after[key] - before[key] for key in shared])
    verdict = stats.verdict(interval, better, "nats")
    return {
        "value": round(interval.value, 6),
        "low": round(interval.low, 6),
        "high": round(interval.high, 6),
        "verdict": verdict,
    }


def signs_of_damage(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The stages of a scorecard that look damaged against their parent, the last stage first.

    Rows {"stage", "against", "signs": [{"title", "unit", "value", "low", "high"}]}.
    """
    damaged = []
    for stage in reversed(stages[1:]):
        against = parent_of(stage, stages[0]["name"])
        prose = [entry for entry in stage["measures"].values() if entry["unit"] == "nats"]
        signs = [sign for entry in (*stage.get("answers", {}).values(), *prose) if (sign := _sign(entry, against))]
        if signs:
            damaged.append({"stage": stage["name"], "against": against, "signs": signs})
    return damaged


def _sign(entry: Mapping[str, Any], against: str) -> dict[str, Any] | None:
    change = next((c for c in entry.get("changes", ()) if c["against"] == against), None)
    if change is None or change["verdict"] != "worse" or abs(change["value"]) < WARNING_SIZE[entry["unit"]]:
        return None
    return {"title": entry["title"], "unit": entry["unit"], **{key: change[key] for key in ("value", "low", "high")}}

"""How often the refusal rule agrees with people: writes starter/refusal_judge.json, which the scorecard quotes.

Where it stands: run by hand when the rule changes, with the folder that holds the labelled answers:
`python -m posttrain.evaluate.refusal_measure FOLDER`. A test computes the figures again where the data is present.

    sensitivity = of the answers that people call refusals, the share that the rule calls one
    specificity = of the other answers, the share that the rule does not call a refusal

The labels are XSTest's (Röttger et al. 2023; five models' answers, two people each): full and partial refusals count as
refusals. Prompts are split in two by a hash; the rule was written reading one half, the scorecard quotes the other.
PyRIT's labels are a second yardstick with another meaning: an answer to something else than was asked counts there too.
Left out: answers to one prompt resemble each other, so the true intervals are wider than these.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import write_json
from posttrain.evaluate.refusal import judge, rule_fingerprint
from posttrain.evaluate.stats import wilson
from posttrain.evaluate.suites import PACKAGE

FIGURES = PACKAGE / "starter" / "refusal_judge.json"
XSTEST = Path("safety") / "xstest_dev_completions.jsonl"
PYRIT = (Path("judging") / "pyrit_refusal.jsonl", Path("judging") / "pyrit_refusal_extra.jsonl")
FULL, PARTIAL, NONE = "2_full_refusal", "3_partial_refusal", "1_full_compliance"


class Labelled(NamedTuple):
    """An answer, what people called it, and what the rule says."""

    model: str
    label: str
    refused: bool


def measure(folder: Path) -> dict[str, Any]:
    """All figures, from the labelled data under `folder`. Raises OSError where it is absent."""
    rows = [json.loads(line) for line in (folder / XSTEST).read_text(encoding="utf-8").splitlines()]
    halves = {
        name: [_labelled(row) for row in rows if in_reading_half(row["prompt"]) == reading]
        for name, reading in (("reported", False), ("read", True))
    }
    return {
        "rule": rule_fingerprint(),
        "labels": "XSTest completions; full and partial refusals count as refusals",
        **{name: _by_model(found) for name, found in halves.items()},
        "pyrit": _pyrit([folder / name for name in PYRIT]),
    }


def in_reading_half(prompt: str) -> bool:
    """Whether a prompt's answers were read while the rule was written."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 2 == 0


def load_figures() -> dict[str, Any]:
    """The stored figures."""
    figures: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return figures


def _labelled(row: dict[str, Any]) -> Labelled:
    return Labelled(row["model"], row["final_label"], judge(row["completion"]).refused)


def _by_model(found: Sequence[Labelled]) -> dict[str, Any]:
    models = sorted({row.model for row in found})
    return {name: _figures([row for row in found if name in ("all", row.model)]) for name in ("all", *models)}


def _figures(found: Sequence[Labelled]) -> dict[str, Any]:
    """The five shares of one group of answers."""
    return {
        "n": len(found),
        "sensitivity": _share(found, lambda row: row.label != NONE, lambda row: row.refused),
        "specificity": _share(found, lambda row: row.label == NONE, lambda row: not row.refused),
        "full_refusals_found": _share(found, lambda row: row.label == FULL, lambda row: row.refused),
        "partial_refusals_found": _share(found, lambda row: row.label == PARTIAL, lambda row: row.refused),
    }


def _share(
    found: Iterable[Labelled], of: Callable[[Labelled], bool], hit: Callable[[Labelled], bool]
) -> dict[str, float | int] | None:
    group = [row for row in found if of(row)]
    if not group:
        return None
    share = wilson(sum(map(hit, group)), len(group))
    return {"value": round(share.value, 4), "low": round(share.low, 4), "high": round(share.high, 4), "n": share.n}


def _pyrit(paths: Sequence[Path]) -> dict[str, Any]:
    """PyRIT's files are tables whose first column carries a version line; the other columns stand in a list."""
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = json.loads(line).get("null")
            if isinstance(cells, list) and len(cells) == 3 and cells[1] in ("0", "1"):
                found.append(Labelled("pyrit", FULL if cells[1] == "1" else NONE, judge(cells[0]).refused))
    figures = _figures(found)
    return {name: figures[name] for name in ("n", "sensitivity", "specificity")}


if __name__ == "__main__":
    write_json(FIGURES, measure(Path(sys.argv[1])))

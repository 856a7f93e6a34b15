"""Measure the refusal rule against human labels. Writes starter/refusal_judge.json, which the scorecard quotes.

Run by hand when the rule changes, with the folder of labelled answers: `python -m posttrain.evaluate.refusal_measure FOLDER`.
A test recomputes the figures if the data is present.

    sensitivity = share of the human-labelled refusals that the rule detects
    specificity = share of the other answers that the rule does not call a refusal

The labels are from XSTest (Röttger et al. 2023; answers of five models, two annotators each). Full and partial refusals count
as refusals. A hash splits the prompts into two halves: the rule was developed on one, the scorecard quotes the other. PyRIT's
labels are a second test with a different definition: an answer to a different question counts as a refusal there. Answers to
one prompt are similar, so the true intervals are wider than these.
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


class LabelledAnswer(NamedTuple):
    """An answer with its human label and the verdict of the rule."""

    model: str
    label: str
    refused: bool


def measure(folder: Path) -> dict[str, Any]:
    """All figures, from the labelled data under `folder`. Raises OSError if it is missing."""
    rows = [json.loads(line) for line in (folder / XSTEST).read_text(encoding="utf-8").splitlines()]
    halves = {
        name: [_labelled(row) for row in rows if in_reading_half(row["prompt"]) == reading]
        for name, reading in (("reported", False), ("read", True))
    }
    return {
        "rule": rule_fingerprint(),
        "labels": "XSTest completions; full and partial refusals count as refusals",
        **{name: _by_model(answers) for name, answers in halves.items()},
        "pyrit": _pyrit([folder / name for name in PYRIT]),
    }


def in_reading_half(prompt: str) -> bool:
    """Whether a prompt belongs to the half on which the rule was developed."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 2 == 0


def load_figures() -> dict[str, Any]:
    """The stored figures."""
    figures: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return figures


def _labelled(row: dict[str, Any]) -> LabelledAnswer:
    return LabelledAnswer(row["model"], row["final_label"], judge(row["completion"]).refused)


def _by_model(answers: Sequence[LabelledAnswer]) -> dict[str, Any]:
    models = sorted({row.model for row in answers})
    return {name: _figures([row for row in answers if name in ("all", row.model)]) for name in ("all", *models)}


def _figures(answers: Sequence[LabelledAnswer]) -> dict[str, Any]:
    """The five shares of one group of answers."""
    return {
        "n": len(answers),
        "sensitivity": _share(answers, lambda row: row.label != NONE, lambda row: row.refused),
        "specificity": _share(answers, lambda row: row.label == NONE, lambda row: not row.refused),
        "full_refusals_found": _share(answers, lambda row: row.label == FULL, lambda row: row.refused),
        "partial_refusals_found": _share(answers, lambda row: row.label == PARTIAL, lambda row: row.refused),
    }


def _share(
    answers: Iterable[LabelledAnswer], in_group: Callable[[LabelledAnswer], bool], is_hit: Callable[[LabelledAnswer], bool]
) -> dict[str, float | int] | None:
    group = [row for row in answers if in_group(row)]
    if not group:
        return None
    share = wilson(sum(map(is_hit, group)), len(group))
    return {"value": round(share.value, 4), "low": round(share.low, 4), "high": round(share.high, 4), "n": share.n}


def _pyrit(paths: Sequence[Path]) -> dict[str, Any]:
    """PyRIT's files are tables whose first column is a version line; the other columns are in a list."""
    answers = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = json.loads(line).get("null")
            if isinstance(cells, list) and len(cells) == 3 and cells[1] in ("0", "1"):
                answers.append(LabelledAnswer("pyrit", FULL if cells[1] == "1" else NONE, judge(cells[0]).refused))
    figures = _figures(answers)
    return {name: figures[name] for name in ("n", "sensitivity", "specificity")}


if __name__ == "__main__":
    write_json(FIGURES, measure(Path(sys.argv[1])))

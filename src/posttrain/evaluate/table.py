"""The scorecard as text for a terminal: a row a stage, a column a measure, each change against the stage before marked.

    instructions followed      ← title; the arrow says which way is better
    45.3 %                     ← value
    37–54                      ← its 95 % interval
    ▲ better +36.0             ← paired change against the stage before
      +28.1 to +44.0           ← the change's 95 % interval

Columns that do not fit the width go into a second block. Shares are percentages, changes of shares percentage points.
"""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

MARKS = {"better": "▲", "worse": "▼", "not shown": "·"}
COLUMN = 17
_GAP = 2


def format_table(scorecard: Mapping[str, Any], *, width: int = 120) -> str:
    """The table as lines of at most `width` columns (at least 60)."""
    stages = scorecard["stages"]
    names = list(dict.fromkeys(name for stage in stages for name in stage["measures"]))
    first = max(len("stage"), *(len(stage["name"]) for stage in stages))
    room = max(1, (max(width, 60) - first) // (COLUMN + _GAP))
    # As even as possible: ten columns in two blocks of five read better than six and four.
    blocks = -(-len(names) // room)
    size = -(-len(names) // blocks) if blocks else 1
    parts = [_block(stages, names[start : start + size], first) for start in range(0, len(names), size)]
    return "\n\n".join([*parts, _legend(stages)])


def _block(stages: Sequence[Mapping[str, Any]], names: Sequence[str], first: int) -> str:
    rule = "─" * (first + len(names) * (COLUMN + _GAP))
    lines = [*_row("stage", [_heading(stages, name) for name in names], first), rule]
    for index, stage in enumerate(stages):
        cells = [_cell(stage["measures"].get(name)) for name in names]
        lines += [""] * (index > 0) + _row(stage["name"], cells, first)
    return "\n".join(lines)


def _row(name: str, cells: Sequence[Sequence[str]], first: int) -> list[str]:
    """Cells of several lines side by side."""
    lines = []
    for index in range(max(map(len, cells))):
        texts = [cell[index] if index < len(cell) else "" for cell in cells]
        line = (name if index == 0 else "").ljust(first) + "".join(" " * _GAP + text.ljust(COLUMN) for text in texts)
        lines.append(line.rstrip())
    return lines


def _heading(stages: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    entry = next(stage["measures"][name] for stage in stages if name in stage["measures"])
    arrow = "↑" if entry["better"] == "higher" else "↓"
    return wrap(f"{entry['title']} {arrow}", COLUMN)


def _cell(entry: Mapping[str, Any] | None) -> list[str]:
    if entry is None:
        return ["–"]
    unit = entry["unit"]
    scale, digits = (100, 0) if unit == "share" else (1, 1 if unit == "tokens" else 3)
    value = f"{entry['value'] * 100:.1f} %" if unit == "share" else f"{entry['value']:.{digits}f}"
    lines = [value, f"{entry['low'] * scale:.{digits}f}–{entry['high'] * scale:.{digits}f}"]
    for change in entry["changes"][:1]:
        value, low, high = (_signed(change[key] * scale, max(1, digits)) for key in ("value", "low", "high"))
        lines.append(f"{MARKS[change['verdict']]} {change['verdict']} {value}")
        lines.append(f"  {low} to {high}")
    return lines


def _signed(value: float, digits: int) -> str:
    """With a sign that is as wide as the plus; no sign before zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _legend(stages: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "Below each value its 95 % interval, then the change against the stage before (same items) and its interval.",
        "▲ better  ▼ worse  · not shown: the interval of the change includes 0.  ↑ higher is better  ↓ lower is better",
    ]
    judge = next((e["judge"] for s in stages for e in s["measures"].values() if "judge" in e), None)
    if judge is not None:
        lines.append(
            f"Refusals are judged by a rule: sensitivity {judge['sensitivity']['value']:.2f} (lowest of "
            f"{judge['models']} models {judge['lowest_sensitivity']:.2f}), specificity "
            f"{judge['specificity']['value']:.2f} ({judge['lowest_specificity']:.2f})."
        )
    return "\n".join(lines)

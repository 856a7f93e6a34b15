"""The scorecard as text: warnings, significant losses, gains of PPO, then one row per stage and one column per measure.

    instructions followed ↑    ← title; the arrow shows the better direction
    139 items                  ← number of items
    45.3 %                     ← value
    37–54                      ← its 95 % interval
    ▲ better +36.0             ← paired change against the parent, which is named below the stage
      +28.1 to +44.0           ← the change's 95 % interval

A change is after − before. Columns that do not fit go into a second block. Shares are percentages; changes of shares are
percentage points.
"""

from collections.abc import Mapping, Sequence
from math import floor, log10
from textwrap import fill, wrap
from typing import Any

from posttrain.evaluate.damage import signs_of_damage
from posttrain.evaluate.tax import parent_of, shown_losses

MARKS = {"better": "▲", "worse": "▼", "not shown": "·"}
UNITS = {"share": "points", "nats": "nats", "tokens": "tokens"}
COLUMN = 17
_GAP = 2


def format_table(scorecard: Mapping[str, Any], *, width: int = 120) -> str:
    """The losses and the table, at most `width` columns wide (at least 60)."""
    stages, width = scorecard["stages"], max(width, 60)
    names = list(dict.fromkeys(name for stage in stages for name in stage["measures"]))
    stage_width = max(len("stage"), *(len(line) for stage in stages for line in _stage_lines(stage, stages)))
    per_block = max(1, (width - stage_width) // (COLUMN + _GAP))
    # Split evenly: two blocks of five columns read better than six and four.
    blocks = -(-len(names) // per_block)
    size = -(-len(names) // blocks) if blocks else 1
    parts = [_block(stages, names[start : start + size], stage_width) for start in range(0, len(names), size)]
    gains = "\n".join(fill(gain_words(gain), width, subsequent_indent="    ") for gain in scorecard.get("gains", ()))
    warnings = "\n".join(fill(f"warning: {damage_words(row)}", width) for row in signs_of_damage(stages))
    top = [*([warnings] if warnings else []), *_losses(stages, width), *([gains] if gains else [])]
    return "\n\n".join([*top, *parts, _legend(stages)])


def _losses(stages: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The paragraph of significant losses; empty if there is only the base."""
    if len(stages) < 2:
        return []
    rows = shown_losses(stages)
    if not rows:
        last, base = stages[-1]["name"], stages[0]["name"]
        comparisons = f"of any stage against its parent, or of {last} against {base}"
        return [fill(f"No loss is shown {comparisons}. This does not prove zero loss; see the intervals.", width)]
    lines = [fill(loss_words(row), width, initial_indent="  ", subsequent_indent="    ") for row in rows]
    return ["\n".join(["Significant losses with 95 % intervals:", *lines])]


def loss_words(row: Mapping[str, Any]) -> str:
    """A row of `shown_losses`: `ppo against sft, its parent: ▼ harmful refused −21.8 points (−31.0 to −12.6)`."""
    parts = [f"{MARKS['worse']} {change['title']} {_change_words(change)}" for change in row["measures"].values()]
    parent = ", its parent" if row["is_parent"] else ""
    return f"{row['stage']} against {row['against']}{parent}: {'; '.join(parts)}"


def damage_words(row: Mapping[str, Any]) -> str:
    """A row of `signs_of_damage` as a warning: the changes, and what to do."""
    signs = "; ".join(f"{change['title']} {_change_words(change)}" for change in row["signs"])
    do = "Check its answers and its data. Common causes: a few rows repeated too often, a learning rate that is too high."
    return f"{row['stage']} looks damaged against {row['against']}, its parent: {signs}. {do}"


def _change_words(change: Mapping[str, Any]) -> str:
    value, low, high = _change(change, change["unit"])
    return f"{value} {UNITS.get(change['unit'], change['unit'])} ({low} to {high})"


def gain_words(gain: Mapping[str, Any]) -> str:
    """`ppo against sft, its start, on fresh answers to 64 held-out prompts: score ▲ better +1.86 (+0.51 to +3.22), …`."""
    changes = ", ".join(f"{key} {_gain_change(gain[key]['change'])}" for key in ("score", "gold"))
    picked = f"the published policy is iteration {gain['iteration']}, the best of {gain['evaluations']} evaluations by gold"
    where = f"on fresh answers to {gain['prompts']} held-out prompts"
    return f"{gain['stage']} against {gain['start']}, its start, {where}: {changes}; {picked}."


def _gain_change(change: Mapping[str, Any]) -> str:
    value, low, high = change_numbers(change)
    return f"{MARKS[change['verdict']]} {change['verdict']} {value} ({low} to {high})"


def change_numbers(change: Mapping[str, Any]) -> tuple[str, str, str]:
    """Value and interval of a change without a unit, rounded to the precision of the interval."""
    half = (change["high"] - change["low"]) / 2
    digits = max(0, 1 - floor(log10(half))) if half > 0 else 3
    value, low, high = (_signed(change[key], digits) for key in ("value", "low", "high"))
    return value, low, high


def _block(stages: Sequence[Mapping[str, Any]], names: Sequence[str], stage_width: int) -> str:
    rule = "─" * (stage_width + len(names) * (COLUMN + _GAP))
    lines = [*_row(["stage"], [_heading(stages, name) for name in names], stage_width), rule]
    for index, stage in enumerate(stages):
        cells = [_cell(stage, name, stages[0]["name"]) for name in names]
        lines += [""] * (index > 0) + _row(_stage_lines(stage, stages), cells, stage_width)
    return "\n".join(lines)


def _stage_lines(stage: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of a stage and, below it, of its parent."""
    base = stages[0]["name"]
    return [stage["name"]] if stage["name"] == base else [stage["name"], f"from {parent_of(stage, base)}"]


def _row(labels: Sequence[str], cells: Sequence[Sequence[str]], stage_width: int) -> list[str]:
    """A row of cells with several lines each."""
    lines = []
    for index in range(max(len(labels), *map(len, cells)) if cells else len(labels)):
        texts = [cell[index] if index < len(cell) else "" for cell in cells]
        label = labels[index] if index < len(labels) else ""
        line = label.ljust(stage_width) + "".join(" " * _GAP + text.ljust(COLUMN) for text in texts)
        lines.append(line.rstrip())
    return lines


def _heading(stages: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    entries = [stage["measures"][name] for stage in stages if name in stage["measures"]]
    arrow = "↑" if entries[0]["better"] == "higher" else "↓"
    counts = sorted({entry["n"] for entry in entries})
    items = f"{counts[0]} items" if len(counts) == 1 else f"{counts[0]}–{counts[-1]} items"
    return [*wrap(f"{entries[0]['title']} {arrow}", COLUMN), items]


def _cell(stage: Mapping[str, Any], name: str, base: str) -> list[str]:
    entry = stage["measures"].get(name)
    if entry is None:
        return ["–"]
    unit = entry["unit"]
    scale, digits = (100, 0) if unit == "share" else (1, 1 if unit == "tokens" else 3)
    value = f"{entry['value'] * 100:.1f} %" if unit == "share" else f"{entry['value']:.{digits}f}"
    lines = [value, f"{entry['low'] * scale:.{digits}f}–{entry['high'] * scale:.{digits}f}"]
    for change in entry["changes"]:
        if change["against"] == parent_of(stage, base):
            value, low, high = _change(change, unit)
            lines.append(f"{MARKS[change['verdict']]} {change['verdict']} {value}")
            lines.append(f"  {low} to {high}")
    return lines


def _change(change: Mapping[str, Any], unit: str) -> tuple[str, str, str]:
    """Value and interval of a change as signed numbers."""
    scale, digits = (100, 1) if unit == "share" else (1, 1 if unit == "tokens" else 3)
    value, low, high = (_signed(change[key] * scale, digits) for key in ("value", "low", "high"))
    return value, low, high


def _signed(value: float, digits: int) -> str:
    """A signed number with a true minus sign. Zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _legend(stages: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "Below each value: its 95 % interval, the paired change against the parent, and the interval of the change.",
        "▲ better  ▼ worse  · not shown: the interval of the change includes 0.  ↑ higher is better  ↓ lower is better",
    ]
    judge = next((e["judge"] for s in stages for e in s["measures"].values() if "judge" in e), None)
    if judge is not None:
        lines.append(
            f"A rule detects refusals: sensitivity {judge['sensitivity']['value']:.2f} (lowest of "
            f"{judge['models']} models {judge['lowest_sensitivity']:.2f}), specificity "
            f"{judge['specificity']['value']:.2f} ({judge['lowest_specificity']:.2f})."
        )
    return "\n".join(lines)

"""Numbers, changes and verdicts as text. Shares are percentages; changes of shares are percentage points."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluate.table import MARKS, UNITS

__all__ = ["MARKS"]

_DIGITS = {"share": 1, "nats": 3, "tokens": 1}


def scale(unit: str) -> float:
    """The factor from a value to its displayed number."""
    return 100.0 if unit == "share" else 1.0


def number(value: float, unit: str) -> str:
    """A value without its unit."""
    return f"{value * scale(unit):.{_DIGITS.get(unit, 3)}f}".replace("-", "−")


def measured(value: float, unit: str) -> str:
    """A value with its unit: `45.3 %`, `3.207`."""
    return number(value, unit) + ("\u202f%" if unit == "share" else "")


def span(entry: Mapping[str, Any], unit: str) -> str:
    """An interval: `37.1 to 53.8`."""
    return f"{number(entry['low'], unit)} to {number(entry['high'], unit)}"


def signed(value: float, unit: str) -> str:
    """A change with its sign and without its unit. Uses a true minus sign; zero has no sign."""
    text = f"{value * scale(unit):+.{_DIGITS.get(unit, 3)}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def signed_span(change: Mapping[str, Any], unit: str) -> str:
    """The interval of a change: `+28.1 to +44.0`."""
    return f"{signed(change['low'], unit)} to {signed(change['high'], unit)}"


def change_words(change: Mapping[str, Any], unit: str) -> str:
    """A change with unit and interval: `+36.0 points (+28.1 to +44.0)`."""
    return f"{signed(change['value'], unit)} {unit_word(unit)} ({signed_span(change, unit)})"


def unit_word(unit: str) -> str:
    """The unit of a change: `points` for shares."""
    return UNITS.get(unit, unit)


def change_against(entry: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The change of a scorecard entry against one policy."""
    return next((c for c in entry.get("changes", ()) if c["against"] == name), None)


def is_worse(entry: Mapping[str, Any], name: str) -> bool:
    """Whether the verdict of a scorecard entry against one policy is "worse"."""
    change = change_against(entry, name)
    return change is not None and change["verdict"] == "worse"


def plain(value: Any) -> str:
    """A number or setting in short form."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def duration(seconds: float | None) -> str:
    """`2.3 s`, `4 min 05 s`, `3 h 12 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(text: str, longest: int) -> str:
    """Shorten a name by cutting out its middle."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

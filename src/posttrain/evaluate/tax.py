"""The alignment tax: what a stage cost in capability, beside what it gained.

    tax = capability before − capability after, over the same items     (of nats a token: after − before)
    gain = measure after − measure before

A positive tax is a loss and a positive gain is an improvement, whatever way the measure leans; intervals are those of
the scorecard's paired changes. A suite says which measures count as capability and which as gain (`role`).
Left out: one number for both. How much capability a gain is worth is for the reader to say.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def alignment_tax(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each stage after the base and each policy it is compared with: tax and gain a measure.

    `stages` are the stages of a scorecard. Returns rows {"stage", "against", "tax": {measure: …}, "gain": {measure: …}}
    with value, low, high, unit and shown (whether the interval excludes 0).
    """
    return [
        {
            "stage": stage["name"],
            "against": against,
            "tax": _role(stage, against, "capability"),
            "gain": _role(stage, against, "gain"),
        }
        for stage in stages
        for against in _compared(stage)
    ]


def _compared(stage: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(c["against"] for entry in stage["measures"].values() for c in entry["changes"]))


def _role(stage: Mapping[str, Any], against: str, role: str) -> dict[str, Any]:
    """Changes of the measures of one role, signed so that more is a larger cost (capability) or a larger gain."""
    found = {}
    for name, entry in stage["measures"].items():
        change = next((c for c in entry["changes"] if c["against"] == against), None)
        if entry["role"] == role and change is not None:
            improves = entry["better"] == "higher"
            flipped = improves if role == "capability" else not improves
            found[name] = _signed(change, flipped) | {"unit": entry["unit"]}
    return found


def _signed(change: Mapping[str, Any], flipped: bool) -> dict[str, Any]:
    value, low, high = change["value"], change["low"], change["high"]
    if flipped:
        value, low, high = -value, -high, -low
    return {"value": value + 0.0, "low": low + 0.0, "high": high + 0.0, "shown": change["verdict"] != "not shown"}

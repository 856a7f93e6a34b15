"""The alignment tax: the cost of a stage in capability next to its gain, and all significant losses.

    tax = capability before − capability after, over the same items     (for nats per token: after − before)
    gain = measure after − measure before

A positive tax is a loss and a positive gain is an improvement, for either direction of a measure. Intervals are those of the
scorecard's paired changes. The suite assigns measures to capability or gain (`role`). A *loss* is any change with the verdict
"worse", for any role, except length, which has no better direction. Tax and gain are not combined into one number; their
relative value is for the reader to decide.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def alignment_tax(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tax and gain per measure, for each stage after the base and each policy it is compared with.

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


def shown_losses(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All significant losses of a scorecard's stages, the most important first.

    The order is: the last stage against its parent, the last stage against the base, then the other stages against their
    parents, the latest first. Returns rows {"stage", "against", "is_parent", "measures": {name: {"title",
    "unit", "value", "low", "high"}}} with the changes as after − before. A comparison without a loss has no row.
    """
    if len(stages) < 2:
        return []
    base, last = stages[0]["name"], stages[-1]
    comparisons = [(last, parent_of(last, base)), (last, base)]
    comparisons += [(stage, parent_of(stage, base)) for stage in reversed(stages[1:-1])]
    rows, reported = [], set()
    for stage, against in comparisons:
        losses = _losses(stage, against)
        if losses and (stage["name"], against) not in reported:
            is_parent = against == parent_of(stage, base)
            rows.append({"stage": stage["name"], "against": against, "is_parent": is_parent, "measures": losses})
        reported.add((stage["name"], against))
    return rows


def parent_of(stage: Mapping[str, Any], base: str) -> str:
    """The policy that the training of a stage started from."""
    return str(stage.get("parent") or base)


def _losses(stage: Mapping[str, Any], against: str) -> dict[str, Any]:
    losses = {}
    for name, entry in stage["measures"].items():
        change = next((c for c in entry.get("changes", ()) if c["against"] == against), None)
        if change is not None and change["verdict"] == "worse" and entry["unit"] != "tokens":
            sizes = {key: change[key] for key in ("value", "low", "high")}
            losses[name] = {"title": entry["title"], "unit": entry["unit"], **sizes}
    return losses


def _compared(stage: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(c["against"] for entry in stage["measures"].values() for c in entry["changes"]))


def _role(stage: Mapping[str, Any], against: str, role: str) -> dict[str, Any]:
    """Changes of the measures of one role, signed so that a positive value is a cost (capability) or a gain."""
    changes = {}
    for name, entry in stage["measures"].items():
        change = next((c for c in entry["changes"] if c["against"] == against), None)
        if entry["role"] == role and change is not None:
            improves = entry["better"] == "higher"
            flipped = improves if role == "capability" else not improves
            changes[name] = _signed(change, flipped) | {"unit": entry["unit"]}
    return changes


def _signed(change: Mapping[str, Any], flipped: bool) -> dict[str, Any]:
    value, low, high = change["value"], change["low"], change["high"]
    if flipped:
        value, low, high = -value, -high, -low
    return {"value": value + 0.0, "low": low + 0.0, "high": high + 0.0, "shown": change["verdict"] != "not shown"}

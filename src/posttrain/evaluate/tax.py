"""The alignment tax: what a stage cost in capability, beside what it gained; and every loss that is shown.

    tax = capability before − capability after, over the same items     (of nats a token: after − before)
    gain = measure after − measure before

A positive tax is a loss and a positive gain is an improvement, whatever way the measure leans; intervals are those of
the scorecard's paired changes. A suite says which measures count as capability and which as gain (`role`). A *loss* is any
change whose verdict is "worse", whatever the role; length is left out, since it leans one way only because it must.
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


def shown_losses(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every shown loss of a scorecard's stages, in the order in which a reader must see them.

    First the last stage against its parent (the policy that it was trained from), then against the base, then the other
    stages against their parents, the latest first. Returns rows {"stage", "against", "is_parent", "measures": {name: {"title",
    "unit", "value", "low", "high"}}} with the changes as after − before; a comparison without a shown loss has no row.
    """
    if len(stages) < 2:
        return []
    base, last = stages[0]["name"], stages[-1]
    wanted = [(last, parent_of(last, base)), (last, base)]
    wanted += [(stage, parent_of(stage, base)) for stage in reversed(stages[1:-1])]
    rows, seen = [], set()
    for stage, against in wanted:
        losses = _losses(stage, against)
        if losses and (stage["name"], against) not in seen:
            is_parent = against == parent_of(stage, base)
            rows.append({"stage": stage["name"], "against": against, "is_parent": is_parent, "measures": losses})
        seen.add((stage["name"], against))
    return rows


def parent_of(stage: Mapping[str, Any], base: str) -> str:
    """The policy that a stage was trained from."""
    return str(stage.get("parent") or base)


def _losses(stage: Mapping[str, Any], against: str) -> dict[str, Any]:
    found = {}
    for name, entry in stage["measures"].items():
        change = next((c for c in entry.get("changes", ()) if c["against"] == against), None)
        if change is not None and change["verdict"] == "worse" and entry["unit"] != "tokens":
            sizes = {key: change[key] for key in ("value", "low", "high")}
            found[name] = {"title": entry["title"], "unit": entry["unit"], **sizes}
    return found


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

"""What each reward model is worth by itself: how often it is right on held-out pairs, whether it knows when, and what of it
is length.

Where it stands: `evaluate/STAGE/reward.json` of every reward stage in, a section out.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from posttrain.report import words
from posttrain.report.markup import el, facts, section
from posttrain.report.run import RewardModel, Run

_LEAD = "Measured on pairs that it was not trained on. A reward model that is right by chance, or by length, teaches that."


def rewards(run: Run) -> Markup:
    """The section of reward models; nothing where the run has none."""
    if not run.rewards:
        return Markup("")
    return section("reward", "Reward model", *(_one(model) for model in run.rewards), lead=_LEAD)


def _one(model: RewardModel) -> Markup:
    found = model.found
    head = el("h3", model.name, " ", el("span.kind", "reward"))
    if not found.get("pairs"):
        return el("div.stage", head, el("p", "No pair was held out, so nothing is known of it. Raise validation."))
    length = found.get("explained_by_length")
    rows = [
        ("right", _share(found["accuracy"])),
        ("chosen longer", _share(found.get("chosen_longer"))),
        ("chosen shorter", _share(found.get("chosen_shorter"))),
        ("prefers longer", _share(found.get("longer_preferred"))),
        ("length explains", "–" if length is None else f"{length:.0%} of the gap's variance"),
        ("calibration", f"expected error {found['calibration_error']:.3f}"),
        ("scores", f"mean gap {found['mean_gap']:.3f}, standard deviation {found['score_spread']:.3f}".replace("-", "−")),
    ]
    table = el("table", el("thead", el("tr", *(el("th", name) for name in ("says", "is right", "pairs")))), _bins(found))
    return el(
        "div.stage", head, el("div.beside", facts(rows), el("figure", el("figcaption", el("strong", "calibration")), table))
    )


def _bins(found: Mapping[str, Any]) -> Markup:
    return el(
        "tbody",
        *(
            el("tr", el("td", f"{b['said']:.0%}"), el("td", f"{b['right']:.0%}"), el("td", f"{b['n']:,}"))
            for b in found["calibration"]
        ),
    )


def _share(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "no such pair"
    return f"{words.measured(entry['value'], 'share')} of {entry['n']:,} pairs ({words.span(entry, 'share')})"

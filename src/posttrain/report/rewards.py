"""What each reward model is worth by itself: how often it is right on held-out pairs, whether it knows when, and what of it
is length; how far two of them agree; and what best-of-n with one of them brings.

Where it stands: `evaluate/STAGE/reward.json` and `pairs.jsonl` of every reward stage and `best-of/*/best_of.json` in, a
section out.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from posttrain.evaluate.pairs import ScoredPair, agreement, calibration_words, error_if_perfect
from posttrain.report import formatting, plots
from posttrain.report.markup import Content, details, el, facts, scroll, section
from posttrain.report.run import RewardModel, Run

_LEAD = "Measured on pairs that it was not trained on. A reward model that is right by chance, or by length, teaches that."


def rewards(run: Run) -> Markup:
    """The section of reward models; nothing where the run has none."""
    if not run.rewards and not run.best_of:
        return Markup("")
    models = [_one(model) for model in run.rewards]
    beside = [part for a, b in itertools.combinations(run.rewards, 2) if (part := _agreement(a, b))]
    return section("reward", "Reward model", *models, *beside, *map(_best_of, run.best_of), lead=_LEAD)


def _one(model: RewardModel) -> Markup:
    found = model.found
    head = el("h3", model.name, " ", el("span.kind", "reward"))
    if not found.get("pairs"):
        return el("div.stage", head, el("p", "No pair was held out, so nothing is known of it. Raise validation."))
    length, gained = found.get("explained_by_length"), found.get("gain_from_length")
    rows = [
        ("right", _share(found["accuracy"])),
        ("lengths balanced", _share(found.get("length_balanced"))),
        ("chosen longer", _share(found.get("chosen_longer"))),
        ("chosen shorter", _share(found.get("chosen_shorter"))),
        ("prefers longer", _share(found.get("longer_preferred"))),
        ("length is worth", _gained(gained, found["accuracy"])),
        ("length explains", "–" if length is None else f"{length:.0%} of the gap's variance"),
        *([("calibration error", _calibration(model))] if model.pairs or "calibration_error_if_perfect" in found else []),
        ("scores", f"mean gap {found['mean_gap']:.3f}, standard deviation {found['score_spread']:.3f}".replace("-", "−")),
    ]
    drawn = [el("figcaption", el("strong", "calibration"), ": is it right as often as it says?"), _reliability(model)]
    return el("div.stage", head, el("div.beside", facts(rows), el("figure", *drawn)), _slices(found))


def _gained(gained: float | None, accuracy: Mapping[str, float]) -> str:
    """A share of a gain means nothing where the gain itself is not shown."""
    if gained is None or accuracy["low"] <= 0.5:
        return "not told: a gain over chance is not shown"
    return f"{gained:.0%} of the gain over chance".replace("-", "−")


def _calibration(model: RewardModel) -> str:
    """With what a perfectly calibrated model would show; evaluations of an earlier version have it from their pairs."""
    perfect = model.found.get("calibration_error_if_perfect")
    if perfect is None:
        perfect = error_if_perfect([ScoredPair(**pair).gap for pair in model.pairs])
    return calibration_words(model.found["calibration_error"], perfect)


def _reliability(model: RewardModel) -> Markup:
    bins = model.found["calibration"]
    return plots.reliability(bins, model.name) if bins and "low" in bins[0] else Markup("")


def _slices(found: Mapping[str, Any]) -> Markup:
    """Accuracy by length, by size of the gap and by category."""
    parts = (("chosen is", "by_length"), ("gap is in the", "by_margin"), ("category is", "by_category"))
    rows = [
        el("tr", el("td", f"{before} {name}"), el("td", formatting.measured(one["value"], "share")),
           el("td", formatting.span(one, "share")), el("td", f"{one['n']:,}"))
        for before, key in parts for name, one in found.get(key, {}).items()
    ]  # fmt: skip
    if not rows:
        return Markup("")
    head = el("thead", el("tr", *(el("th", name) for name in ("of the pairs whose", "right", "95\u202f% interval", "pairs"))))
    table = scroll(el("table", head, el("tbody", *rows)), label="accuracy by slice")
    return details("accuracy by length, gap and category", table)


def _agreement(first: RewardModel, second: RewardModel) -> Markup | None:
    """How far two reward models agree on the pairs that both were measured on."""
    found = agreement(*([ScoredPair(**pair) for pair in model.pairs] for model in (first, second)))
    if found is None:
        return None
    rows: list[tuple[Content, Content]] = [
        ("alike", _share(found["alike"])),
        ("kappa", _number(found["kappa"])),
        ("gaps correlate", _number(found["gap_correlation"])),
        ("both right", f"{found['both_right']:,}"), (f"only {first.name}", f"{found['first_right']:,}"),
        (f"only {second.name}", f"{found['second_right']:,}"), ("none right", f"{found['none_right']:,}"),
    ]  # fmt: skip
    return el("div.stage", el("h3", f"{first.name} and {second.name} on the same pairs"), facts(rows))


def _best_of(found: Mapping[str, Any]) -> Markup:
    """Gain over one sample against distance, by the score that chose and by gold."""
    names = [name for name in ("score", "gold") if f"{name}_gain" in found["best_of"][-1]]
    lines = [
        plots.FrontierLine(name, colour, [
            plots.FrontierPoint(f"best of {row['n']}", (row["kl"], row["kl"], row["kl"]), _figure(row[f"{name}_gain"]))
            for row in found["best_of"] if row["n"] > 1 and (row["n"] & (row["n"] - 1) == 0 or row["n"] == found["samples"])
        ])
        for colour, name in enumerate(names, 1)
    ]  # fmt: skip
    about = f"best of n from {found['policy']}"
    chart = plots.frontier_chart(lines, x_label="KL, nats a completion", y_label="gain over one sample", start=0.0, about=about)
    by = f" by {found['reward']}" + (f", judged by {found['gold']}" if found.get("gold") else "")
    note = f"{found['prompts']:,} prompts, {found['samples']:,} samples each; bars are 95\u202f% intervals over prompts."
    return el("div.stage", el("h3", about), el("p.small", note), el("figure", el("figcaption", el("strong", about), by), chart))


def _figure(interval: Mapping[str, float]) -> tuple[float, float, float]:
    return interval["value"], interval["low"], interval["high"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _share(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "no such pair"
    return f"{formatting.measured(entry['value'], 'share')} of {entry['n']:,} pairs ({formatting.span(entry, 'share')})"

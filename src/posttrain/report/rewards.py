"""The reward model section: accuracy on held-out pairs, calibration, dependence on length, agreement of two models, and the
gain of best-of-n.

Input: `evaluate/STAGE/reward.json` and `pairs.jsonl` of every reward stage, and `best-of/*/best_of.json`.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from posttrain.evaluate.pairs import ScoredPair, agreement, calibration_words, error_if_perfect
from posttrain.report import formatting, plots
from posttrain.report.markup import Content, details, el, facts, scroll, section
from posttrain.report.run import RewardModel, RunRecord

_LEAD = "Measured on held-out pairs. A policy learns whatever the reward model rewards, length included."


def rewards(run: RunRecord) -> Markup:
    """The section of reward models; empty if the run has none."""
    if not run.rewards and not run.best_of:
        return Markup("")
    models = [_reward_model(model) for model in run.rewards]
    agreements = [part for a, b in itertools.combinations(run.rewards, 2) if (part := _agreement(a, b))]
    return section("reward", "Reward model", *models, *agreements, *map(_best_of, run.best_of), lead=_LEAD)


def _reward_model(model: RewardModel) -> Markup:
    measures = model.measures
    head = el("h3", model.name, " ", el("span.kind", "reward"))
    if not measures.get("pairs"):
        return el("div.stage", head, el("p", "No pair was held out, so nothing was measured. Raise `validation`."))
    length, gained = measures.get("explained_by_length"), measures.get("gain_from_length")
    rows = [
        ("right", _share(measures["accuracy"])),
        ("lengths balanced", _share(measures.get("length_balanced"))),
        ("chosen longer", _share(measures.get("chosen_longer"))),
        ("chosen shorter", _share(measures.get("chosen_shorter"))),
        ("prefers longer", _share(measures.get("longer_preferred"))),
        ("length is worth", _share_of_gain(gained, measures["accuracy"])),
        ("length explains", "–" if length is None else f"{length:.0%} of the gap's variance"),
        *([("calibration error", _calibration(model))] if model.pairs or "calibration_error_if_perfect" in measures else []),
        ("scores", f"mean gap {measures['mean_gap']:.3f}, standard deviation {measures['score_spread']:.3f}".replace("-", "−")),
    ]
    drawn = [el("figcaption", el("strong", "calibration"), ": accuracy against stated confidence"), _reliability(model)]
    return el("div.stage", head, el("div.beside", facts(rows), el("figure", *drawn)), _slices(measures))


def _share_of_gain(gained: float | None, accuracy: Mapping[str, float]) -> str:
    """The share of the gain over chance, if that gain is significant."""
    if gained is None or accuracy["low"] <= 0.5:
        return "unknown: no gain over chance is shown"
    return f"{gained:.0%} of the gain over chance".replace("-", "−")


def _calibration(model: RewardModel) -> str:
    """The calibration error with the value of a perfect model, which earlier versions did not store."""
    perfect = model.measures.get("calibration_error_if_perfect")
    if perfect is None:
        perfect = error_if_perfect([ScoredPair(**pair).gap for pair in model.pairs])
    return calibration_words(model.measures["calibration_error"], perfect)


def _reliability(model: RewardModel) -> Markup:
    bins = model.measures["calibration"]
    return plots.reliability(bins, model.name) if bins and "low" in bins[0] else Markup("")


def _slices(measures: Mapping[str, Any]) -> Markup:
    """Accuracy by length, by size of the gap and by category."""
    parts = (("chosen is", "by_length"), ("gap is in the", "by_margin"), ("category is", "by_category"))
    rows = [
        el("tr", el("td", f"{before} {name}"), el("td", formatting.measured(entry["value"], "share")),
           el("td", formatting.span(entry, "share")), el("td", f"{entry['n']:,}"))
        for before, key in parts for name, entry in measures.get(key, {}).items()
    ]  # fmt: skip
    if not rows:
        return Markup("")
    head = el("thead", el("tr", *(el("th", name) for name in ("of the pairs whose", "right", "95\u202f% interval", "pairs"))))
    table = scroll(el("table", head, el("tbody", *rows)), label="accuracy by slice")
    return details("accuracy by length, gap and category", table)


def _agreement(first: RewardModel, second: RewardModel) -> Markup | None:
    """The agreement of two reward models on their common pairs."""
    counts = agreement(*([ScoredPair(**pair) for pair in model.pairs] for model in (first, second)))
    if counts is None:
        return None
    rows: list[tuple[Content, Content]] = [
        ("same choice", _share(counts["alike"])),
        ("kappa", _number(counts["kappa"])),
        ("gaps correlate", _number(counts["gap_correlation"])),
        ("both right", f"{counts['both_right']:,}"), (f"only {first.name}", f"{counts['first_right']:,}"),
        (f"only {second.name}", f"{counts['second_right']:,}"), ("neither right", f"{counts['none_right']:,}"),
    ]  # fmt: skip
    return el("div.stage", el("h3", f"{first.name} and {second.name} on the same pairs"), facts(rows))


def _best_of(result: Mapping[str, Any]) -> Markup:
    """The gain over one sample against KL, by the score that chose and by gold."""
    names = [name for name in ("score", "gold") if f"{name}_gain" in result["best_of"][-1]]
    lines = [
        plots.FrontierLine(name, colour, [
            plots.FrontierPoint(f"best of {row['n']}", (row["kl"], row["kl"], row["kl"]), _value_low_high(row[f"{name}_gain"]))
            for row in result["best_of"] if row["n"] > 1 and (row["n"] & (row["n"] - 1) == 0 or row["n"] == result["samples"])
        ])
        for colour, name in enumerate(names, 1)
    ]  # fmt: skip
    about = f"best of n from {result['policy']}"
    chart = plots.frontier_chart(lines, x_label="KL, nats a completion", y_label="gain over one sample", start=0.0, about=about)
    caption = f" by {result['reward']}" + (f", judged by {result['gold']}" if result.get("gold") else "")
    note = f"{result['prompts']:,} prompts, {result['samples']:,} samples each; bars are 95\u202f% intervals over prompts."
    return el(
        "div.stage", el("h3", about), el("p.small", note), el("figure", el("figcaption", el("strong", about), caption), chart)
    )


def _value_low_high(interval: Mapping[str, float]) -> tuple[float, float, float]:
    return interval["value"], interval["low"], interval["high"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _share(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "no such pairs"
    return f"{formatting.measured(entry['value'], 'share')} of {entry['n']:,} pairs ({formatting.span(entry, 'share')})"

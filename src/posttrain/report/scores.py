"""The scorecard as a table, and the changes in capability beside those in gain.

Input: scorecard.json. Output: two sections. The table has one row per measure and one column per stage. A cell shows the value,
its interval as text and as a strip, and the paired changes against the parent and the base, marked by sign, word and colour.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posttrain.evaluate.tax import parent_of
from posttrain.report import formatting, plots
from posttrain.report.headline import verdict_badge
from posttrain.report.markup import Content, el, scroll, section
from posttrain.report.run import RunRecord

_LEAD = (
    "Each value with its 95\u202f% interval. Changes are paired over the same items: ",
    "the verdict is better or worse only if the interval of the change excludes 0. ",
    "Of forty measures without a true change, about two still get such a verdict.",
)


def scorecard(run: RunRecord) -> Markup:
    """The section with the table of all measures and stages."""
    stages = run.scorecard["stages"]
    names = list(dict.fromkeys(name for stage in stages for name in stage["measures"]))
    if not names:
        return section("scorecard", "Scorecard", el("p", "Nothing was measured."))
    extent = {name: _extent(stages, name) for name in names}
    head = el("tr", el("th", "measure"), *(_stage_head(stage) for stage in stages))
    rows = [
        el("tr", _measure_head(stages, name), *(_cell(stage, name, extent[name], stages[0]["name"]) for stage in stages))
        for name in names
    ]
    table = el("table.scorecard", el("thead", head), el("tbody", *rows))
    return section("scorecard", "Scorecard", scroll(table, label="scorecard"), _judge(stages), lead="".join(_LEAD))


def _stage_head(stage: Mapping[str, Any]) -> Markup:
    parent = stage.get("parent")
    about = f"{stage.get('kind', '')} from {parent}" if parent else "before training"
    return el("th", el("span.name", stage["name"]), el("span.small", about), attrs={"scope": "col"})


def _measure_head(stages: Sequence[Mapping[str, Any]], name: str) -> Markup:
    entry = next(stage["measures"][name] for stage in stages if name in stage["measures"])
    direction = "higher is better" if entry["better"] == "higher" else "lower is better"
    about = f"{name} · {entry['n']} items · {direction}"
    role = el("span.role", entry["role"]) if entry.get("role") else ""
    items = el("span.small", f"{entry['n']} items")
    return el("th", _title(entry), items, role, attrs={"scope": "row", "title": about})


def _title(entry: Mapping[str, Any]) -> Markup:
    """A measure's title and an arrow to the better direction."""
    return el("span.name", entry["title"], "\u00a0", el("span.way", "↑" if entry["better"] == "higher" else "↓"))


def _extent(stages: Iterable[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """The range of a measure's strips: 0 to 1 for shares, else the range of the intervals with a margin."""
    entries = [stage["measures"][name] for stage in stages if name in stage["measures"]]
    if entries[0]["unit"] == "share":
        return 0.0, 1.0
    low, high = min(e["low"] for e in entries), max(e["high"] for e in entries)
    margin = (high - low) * 0.15 or 1.0
    return low - margin, high + margin


def _cell(stage: Mapping[str, Any], name: str, extent: tuple[float, float], base: str) -> Markup:
    entry = stage["measures"].get(name)
    if entry is None:
        return el("td", el("span.small", "not measured"))
    unit = entry["unit"]
    parts: list[Content] = [
        el("span.value", formatting.measured(entry["value"], unit)),
        el("span.small", formatting.span(entry, unit)),
        _strip(entry, extent),
    ]
    changes = entry.get("changes", ())
    # If the parent is the base, there is one change.
    for change in changes[:2]:
        label = "vs base" if change["against"] == base else f"vs {change['against']}"
        span = el("span.small", formatting.signed_span(change, unit))
        parts.append(el("span.change", el("span.small", label), verdict_badge(change, unit), span))
    return el("td", *parts)


def _strip(entry: Mapping[str, Any], extent: tuple[float, float]) -> Markup:
    """The interval on the axis of the measure."""
    low, high = extent
    width = (high - low) or 1.0
    left, right, at = (min(100.0, max(0.0, (entry[key] - low) / width * 100)) for key in ("low", "high", "value"))
    bar = el("i", attrs={"style": f"left:{left:.1f}%;width:{max(right - left, 0.8):.1f}%"})
    return el("span.strip", bar, el("b", attrs={"style": f"left:{at:.1f}%"}), attrs={"aria-hidden": "true"})


def _judge(stages: Sequence[Mapping[str, Any]]) -> Markup:
    judge = next((e["judge"] for s in stages for e in s["measures"].values() if "judge" in e), None)
    if judge is None:
        return Markup("")
    text = (
        f"A rule detects refusals. On {judge['answers']} answers of {judge['models']} models with human labels it "
        f"finds {_share(judge['sensitivity'])} of the refusals (for the worst model "
        f"{judge['lowest_sensitivity']:.0%}) and accepts {_share(judge['specificity'])} of the other answers "
        f"(worst {judge['lowest_specificity']:.0%})."
    )
    return el("p.note", text)


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.0%} ({figure['low']:.0%} to {figure['high']:.0%})"


def tax(run: RunRecord) -> Markup:
    """The section that compares the change in capability with the gain."""
    stages = run.scorecard["stages"]
    entries = {n: e for stage in stages for n, e in stage["measures"].items() if e.get("role") in ("gain", "capability")}
    columns = [
        (stage["name"], against)
        for stage in reversed(stages[1:]) for against in dict.fromkeys((parent_of(stage, stages[0]["name"]), stages[0]["name"]))
    ]  # fmt: skip
    if not entries or not columns:
        return Markup("")
    lead = (
        "Changes are after − before; the arrow of a measure shows its better direction. In the charts up and right are "
        "better; points below the line through the base have lost capability. Bars are 95\u202f% intervals of paired "
        "changes."
    )
    charts = _charts(run, entries)
    figures = el("div.plots", *charts) if charts else ""
    return section("tax", "What it cost, beside what it gained", figures, _change_table(run, entries, columns), lead=lead)


def colour(order: Sequence[str], name: str) -> int:
    """The colour of a stage. Only the base is grey."""
    position = order.index(name)
    return 1 + (position - 1) % (plots.COLOURS - 1) if position else 0


def _charts(run: RunRecord, entries: Mapping[str, Any]) -> list[Markup]:
    """One chart per gain measure: every stage against the base, with a line to its parent."""
    gains, costs = ([name for name, e in entries.items() if e["role"] == role] for role in ("gain", "capability"))
    if not gains or not costs:
        return []
    # The first capability measure pools the others. A measure with another unit gets its own chart.
    chosen = [costs[0], *[c for c in costs if entries[c]["unit"] != entries[costs[0]]["unit"]][:1]]
    pairs = [*[(gain, chosen[0]) for gain in gains[:2]], *[(gains[0], cost) for cost in chosen[1:]]]
    return [_chart(run, (gain, entries[gain]), (cost, entries[cost])) for gain, cost in pairs]


def _chart(run: RunRecord, gain: tuple[str, Mapping[str, Any]], cost: tuple[str, Mapping[str, Any]]) -> Markup:
    stages = run.scorecard["stages"]
    base, order = stages[0]["name"], [stage["name"] for stage in stages]
    points = []
    for stage in stages[1:]:
        x, y = (_against(stage, name, base) for name, _ in (gain, cost))
        if x is not None and y is not None:
            parent = parent_of(stage, base)
            points.append(plots.Point(stage["name"], colour(order, stage["name"]), parent, x, y))
    labels = tuple(f"change, {formatting.unit_word(entry['unit'])}" for _, entry in (gain, cost))
    lower = tuple(entry["better"] == "lower" for _, entry in (gain, cost))
    svg = plots.capability_and_gain(points, base=base, labels=labels, lower=lower)
    caption = el("figcaption", el("strong", cost[1]["title"]), " (up) against ", el("strong", gain[1]["title"]), " (right)")
    keys = [el("span.key", el(f"i.c{p.colour}"), p.name) for p in points] if len(points) > plots.MOST_NAMED else []
    return el("figure", caption, el("span.legend", *keys), svg)


def _against(stage: Mapping[str, Any], name: str, base: str) -> tuple[float, float, float] | None:
    """A measure's change against the base with its interval, in displayed units."""
    entry = stage["measures"].get(name)
    change = formatting.change_against(entry, base) if entry else None
    if entry is None or change is None:
        return None
    factor = formatting.scale(entry["unit"])
    return change["value"] * factor, change["low"] * factor, change["high"] * factor


def _change_table(run: RunRecord, entries: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> Markup:
    """One row per measure, one column per comparison, the last stage first."""
    measures = {stage["name"]: stage["measures"] for stage in run.scorecard["stages"]}
    names = [f"{stage} vs {against}" for stage, against in columns]
    head = el("tr", el("th", "change"), *(el("th", name, attrs={"scope": "col"}) for name in names))
    ordered = sorted(entries, key=lambda name: entries[name]["role"] != "gain")
    body = [
        el("tr", el("th", _title(entries[name]), el("span.role", entries[name]["role"]), attrs={"scope": "row"}),
           *(_change_cell(measures[stage].get(name), against) for stage, against in columns))
        for name in ordered
    ]  # fmt: skip
    return scroll(el("table.tax", el("thead", head), el("tbody", *body)), label="tax and gain")


def _change_cell(entry: Mapping[str, Any] | None, against: str) -> Markup:
    change = formatting.change_against(entry, against) if entry else None
    if entry is None or change is None:
        return el("td", el("span.small", "not measured"))
    span = f"{formatting.signed_span(change, entry['unit'])} {formatting.unit_word(entry['unit'])}"
    return el("td", verdict_badge(change, entry["unit"]), el("span.small", span))

"""The scorecard as a table, and the alignment tax beside the gain.

Where it stands: scorecard.json in, two sections out. A row a measure, a column a stage; below each value its interval as
text and as a strip, then the paired changes against the parent and against the base, marked by sign, word and colour.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from posttrain.report import plots, words
from posttrain.report.headline import verdict_badge
from posttrain.report.markup import Content, el, scroll, section
from posttrain.report.run import Run

_READ = (
    "Each value with its 95\u202f% interval. Changes are paired over the same items: ",
    "better or worse only where the interval of the change excludes 0. ",
    "Of forty changes that are none, about two will still be called one.",
)


def scorecard(run: Run) -> Markup:
    """The section with the table of all measures and stages."""
    stages = run.scorecard["stages"]
    names = list(dict.fromkeys(name for stage in stages for name in stage["measures"]))
    if not names:
        return section("scorecard", "Scorecard", el("p", "No measure was taken."))
    extent = {name: _extent(stages, name) for name in names}
    head = el("tr", el("th", "measure"), *(_stage_head(stage) for stage in stages))
    rows = [
        el("tr", _measure_head(stages, name), *(_cell(stage, name, extent[name], stages[0]["name"]) for stage in stages))
        for name in names
    ]
    table = el("table.scorecard", el("thead", head), el("tbody", *rows))
    return section("scorecard", "Scorecard", scroll(table, label="scorecard"), _judge(stages), lead="".join(_READ))


def _stage_head(stage: Mapping[str, Any]) -> Markup:
    parent = stage.get("parent")
    about = f"{stage.get('kind', '')} from {parent}" if parent else "before training"
    return el("th", el("span.name", stage["name"]), el("span.small", about), attrs={"scope": "col"})


def _measure_head(stages: Sequence[Mapping[str, Any]], name: str) -> Markup:
    entry = next(stage["measures"][name] for stage in stages if name in stage["measures"])
    arrow, way = ("↑", "higher is better") if entry["better"] == "higher" else ("↓", "lower is better")
    about = f"{name} · {entry['n']} items · {way}"
    role = el("span.role", entry["role"]) if entry.get("role") else ""
    title = el("span.name", entry["title"], "\u00a0", el("span.way", arrow))
    return el("th", title, el("span.small", f"{entry['n']} items"), role, attrs={"scope": "row", "title": about})


def _extent(stages: Iterable[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """The ends of a measure's strips: 0 to 1 for shares, else what the intervals span, with a margin."""
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
        el("span.value", words.measured(entry["value"], unit)),
        el("span.small", words.span(entry, unit)),
        _strip(entry, extent),
    ]
    changes = entry.get("changes", ())
    # Against the base once more only where the parent is another policy.
    for change in changes[:2]:
        label = "vs base" if change["against"] == base else f"vs {change['against']}"
        span = el("span.small", words.signed_span(change, unit))
        parts.append(el("span.change", el("span.small", label), verdict_badge(change, unit), span))
    return el("td", *parts)


def _strip(entry: Mapping[str, Any], extent: tuple[float, float]) -> Markup:
    """The interval on the measure's own axis."""
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
        f"Refusals are judged by a rule. On {judge['answers']} answers of {judge['models']} models that people labelled it "
        f"finds {_share(judge['sensitivity'])} of the refusals (of the model it fits least "
        f"{judge['lowest_sensitivity']:.0%}) and leaves {_share(judge['specificity'])} of the other answers alone "
        f"(least {judge['lowest_specificity']:.0%})."
    )
    return el("p.note", text)


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.0%} ({figure['low']:.0%} to {figure['high']:.0%})"


def tax(run: Run) -> Markup:
    """The section that sets the cost in capability beside the gain."""
    rows = run.scorecard.get("tax") or []
    if not any(row["tax"] or row["gain"] for row in rows):
        return Markup("")
    lead = (
        "Tax is capability before − capability after: above 0 is a loss. Gain is what alignment is for: right of 0 is better. "
        "A stage down and to the right is bought cheaply. Bars are 95\u202f% intervals of paired changes."
    )
    titles = {n: e for stage in run.scorecard["stages"] for n, e in stage["measures"].items()}
    charts = _charts(run, rows, titles)
    figures = el("div.plots", *charts) if charts else ""
    return section("tax", "What it cost, beside what it gained", figures, _tax_table(rows, titles), lead=lead)


def colour(order: Sequence[str], name: str) -> int:
    """A stage's colour; grey is the base's alone."""
    place = order.index(name)
    return 1 + (place - 1) % (plots.COLOURS - 1) if place else 0


def _charts(run: Run, rows: Sequence[Mapping[str, Any]], titles: Mapping[str, Any]) -> list[Markup]:
    """A chart a gain measure: every stage against the base, joined to the stage it started from."""
    base = run.scorecard["stages"][0]["name"]
    parents = {stage["name"]: stage.get("parent") for stage in run.scorecard["stages"]}
    order = [stage["name"] for stage in run.scorecard["stages"]]
    against_base = [row for row in rows if row["against"] == base]
    gains = list(dict.fromkeys(name for row in against_base for name in row["gain"]))
    costs = list(dict.fromkeys(name for row in against_base for name in row["tax"]))
    if not gains or not costs:
        return []
    # The first capability measure pools the others; one of another unit has an axis of its own.
    chosen = [costs[0], *[c for c in costs if titles[c]["unit"] != titles[costs[0]]["unit"]][:1]]
    charts = []
    for gain, cost in [*[(gain, chosen[0]) for gain in gains[:2]], *[(gains[0], cost) for cost in chosen[1:]]]:
        points = [
            plots.Point(row["stage"], colour(order, row["stage"]), parents.get(row["stage"]) or base,
                        _scaled(row["gain"][gain]), _scaled(row["tax"][cost]))
            for row in against_base if gain in row["gain"] and cost in row["tax"]
        ]  # fmt: skip
        axes = [f"gain, {words.unit_word(titles[gain]['unit'])}", f"tax, {words.unit_word(titles[cost]['unit'])}"]
        svg = plots.tax_against_gain(points, base=base, gain_label=axes[0], tax_label=axes[1])
        caption = el("figcaption", el("strong", titles[gain]["title"]), " against ", el("strong", titles[cost]["title"]))
        keys = [el("span.key", el(f"i.c{p.colour}"), p.name) for p in points] if len(points) > plots.MOST_NAMED else []
        charts.append(el("figure", caption, el("span.legend", *keys), svg))
    return charts


def _scaled(figure: Mapping[str, Any]) -> tuple[float, float, float]:
    factor = words.scale(figure["unit"])
    return figure["value"] * factor, figure["low"] * factor, figure["high"] * factor


def _tax_table(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, Any]) -> Markup:
    costs = list(dict.fromkeys(name for row in rows for name in row["tax"]))
    gains = list(dict.fromkeys(name for row in rows for name in row["gain"]))
    groups = [(name, "gain") for name in gains] + [(name, "tax") for name in costs]
    head = el(
        "tr", el("th", "change"), *(el("th", f"{row['stage']} vs {row['against']}", attrs={"scope": "col"}) for row in rows)
    )
    body = [
        el("tr", el("th", el("span.name", titles[name]["title"]), el("span.role", role), attrs={"scope": "row"}),
           *(_tax_cell(row[role].get(name), role) for row in rows))
        for name, role in groups
    ]  # fmt: skip
    return scroll(el("table.tax", el("thead", head), el("tbody", *body)), label="tax and gain")


def _tax_cell(figure: Mapping[str, Any] | None, role: str) -> Markup:
    if figure is None:
        return el("td", el("span.small", "not measured"))
    unit = figure["unit"]
    good = (figure["value"] > 0) == (role == "gain")
    kind = ("better" if good else "worse") if figure["shown"] else "not-shown"
    text = f"{words.MARKS[kind.replace('-', ' ')]} {words.signed(figure['value'], unit)}"
    span = f"{words.signed_span(figure, unit)} {words.unit_word(unit)}"
    word = {"better": "gain" if role == "gain" else "no loss", "worse": "loss", "not-shown": "not shown"}[kind]
    return el("td", el(f"span.badge.{kind}", text, attrs={"title": word}), el("span.small", span))

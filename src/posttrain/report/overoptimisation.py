"""Score and gold of a ppo stage against its distance from the start, the two laws fitted to gold, and others at equal KL.

Where it stands: `gold.jsonl` of every ppo stage that measured gold, a section out. The numbers are those of
`evaluate/overoptimisation.py`; nothing is computed from weights.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from markupsafe import Markup

from posttrain.evaluate import stats
from posttrain.evaluate.overoptimisation import Law, at_distance, distance, fit_laws, law_at, table
from posttrain.report import plots, words
from posttrain.report.markup import el, scroll, section
from posttrain.report.run import Run, Stage

_LEAD = (
    "The score is what the policy was paid by, gold what it should be good at; both on prompts that were held out. "
    "Bars hold 95\u202f%. Where gold falls while the score goes on rising, more of the score is worth less."
)
_WARNING = "over-optimisation: "
_FORMS = {"best of n": "d (α − β d)", "RL": "d (α − β log d)"}
# Colours: the stage itself, the two laws, then other policies.
_OWN, _LAWS, _OTHERS = 1, {"best of n": 3, "RL": 4}, 5


class _Gold(NamedTuple):
    """Rows of the trained policy in their order, and those of others."""

    rows: list[dict[str, Any]]
    others: list[dict[str, Any]]
    best: int
    laws: tuple[Law, ...]


def overoptimisation(run: Run) -> Markup:
    """The section; nothing where no stage measured gold."""
    stages = [stage for stage in run.stages if any(row.get("policy") == stage.name for row in stage.gold)]
    return section("gold", "Over-optimisation", *map(_stage, stages), lead=_LEAD) if stages else Markup("")


def _stage(stage: Stage) -> Markup:
    found = _read(stage)
    head = el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", f"{len(found.rows)} evaluations"))
    figures = [_figure(stage, found, "gold", found.laws), _figure(stage, found, "score", ())]
    return el("div.stage", head, el("div.plots", *figures), _outcome(stage, found), _fitted(found), _compared(stage, found))


def _read(stage: Stage) -> _Gold:
    rows = [row for row in stage.gold if row["policy"] == stage.name]
    others = [row for row in stage.gold if row["policy"] != stage.name]
    best = max(range(len(rows)), key=lambda i: rows[i]["gold"])
    return _Gold(rows, others, best, fit_laws(table(rows, "kl_B"), table(rows, "gold_B")))


def _figure(stage: Stage, found: _Gold, what: str, laws: Sequence[Law]) -> Markup:
    own = _measured(stage.name, _OWN, found.rows, what)._replace(chosen=found.best)
    others = [_measured(row["policy"], _OTHERS + i, [row], what) for i, row in enumerate(found.others)]
    reach = numpy.linspace(0, max(own.xs), 60)
    curves = [_curve(law, reach) for law in laws]
    keys = [(own.colour, stage.name), *((c.colour, c.label) for c in curves), *((o.colour, o.label) for o in others)]
    legend = [el("span.key", el(f"i.c{number % plots.COLOURS}"), text) for number, text in keys]
    drawing = plots.against_distance([own, *others], curves, ylabel=what, about=f"{stage.name}, {what} against distance")
    return el("figure", el("figcaption", el("strong", what), el("span.legend", *legend)), drawing)


def _measured(label: str, colour: int, rows: Sequence[dict[str, Any]], what: str) -> plots.Measured:
    d_E = distance(numpy.array([row["kl"] for row in rows], dtype=float))
    return plots.Measured(label, colour, d_E.tolist(), [r[what] for r in rows], [r[f"{what}_se"] for r in rows])


def _curve(law: Law, reach: Any) -> plots.Curve:
    inside = law.peak is not None and law.peak.value <= reach[-1]
    peak = (law.peak.value, float(law.top or 0.0)) if law.peak is not None and inside else None
    return plots.Curve(f"law of {law.name}", _LAWS[law.name], reach.tolist(), law_at(law, reach).tolist(), peak)


def _outcome(stage: Stage, found: _Gold) -> Markup:
    """Where it began, what is published, where it ended."""
    warned = [str(w) for w in (stage.manifest or {}).get("warnings", ()) if str(w).startswith(_WARNING)]
    places = (("start", found.rows[0]), ("published (ringed)", found.rows[found.best]), ("end", found.rows[-1]))
    body = [(what, f"{row['iteration']}", _value(row, "kl"), _value(row, "gold"), _value(row, "score")) for what, row in places]
    ended = f"Over-optimised: {warned[0].removeprefix(_WARNING)}." if warned else "Not shown to be over-optimised."
    return el("p", ended) + _table(("", "after iteration", "KL, nats", "gold", "score"), body, "course")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Markup:
    body = [el("tr", *(el("td", cell) for cell in row)) for row in rows]
    return scroll(el("table", el("thead", el("tr", *(el("th", h) for h in heads))), el("tbody", *body)), label=label)


def _value(row: dict[str, Any], what: str) -> str:
    """A mean and how far its 95 % reach, with as many digits as that allows."""
    bar = 1.96 * row[f"{what}_se"]
    digits = max(0, 1 - math.floor(math.log10(bar))) if bar > 0 else 3
    return f"{row[what]:.{digits}f} ± {bar:.{digits}f}".replace("-", "−")


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _fitted(found: _Gold) -> Markup:
    if not found.laws:
        return el("p.small", "Too few evaluations at different distances to fit a law.")
    heads = ("law of gold over d = √KL", "α", "β", "peak at KL", "gold there", "residual")
    return _table(heads, [_law_cells(law, found) for law in found.laws], "laws fitted to gold")


def _law_cells(law: Law, found: _Gold) -> tuple[str, ...]:
    form = f"{law.name}: {_FORMS[law.name]}"
    peak, top = "no peak shown", "–"
    if law.peak is not None:
        beyond = law.peak.value**2 > max(row["kl"] for row in found.rows)
        peak = f"{_span(law.peak.value**2, law.peak.low**2, law.peak.high**2)}{', beyond the data' if beyond else ''}"
        top = _number(law.top or 0.0)
    return form, _span(*law.alpha), _span(*law.beta), peak, top, _number(law.residual)


def _span(value: float, low: float, high: float) -> str:
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _compared(stage: Stage, found: _Gold) -> Markup:
    """Other policies against this one where it was as far from the start as they are."""
    if not found.others:
        return Markup("")
    heads = ("policy", "KL", "gold", f"{stage.name} at equal KL", "difference", "")
    return _table(heads, [_row(row, found) for row in found.others], "other policies at equal KL")


def _row(row: dict[str, Any], found: _Gold) -> tuple[str, ...]:
    own_B = at_distance(table(found.rows, "kl_B"), table(found.rows, "gold_B"), row["kl"])
    before = (row["policy"], _value(row, "kl"), _value(row, "gold"))
    if own_B is None:
        return (*before, "it was never that far", "–", "")
    change = stats.mean([a - b for a, b in zip(row["gold_B"], own_B.tolist(), strict=True)])
    verdict = stats.verdict(change, "higher", "nats")
    shown = f"{words.MARKS[verdict]} {verdict}"
    return (*before, _number(float(own_B.mean())), _span(change.value, change.low, change.high), shown)

"""What a ppo stage gained on fresh answers; score and gold against its distance from the start in the evaluations that chose
its policy, the two laws fitted to gold, and other policies at equal KL.

Where it stands: `gold.jsonl` and `gold_published.jsonl` of every ppo stage that measured gold, a section out. The numbers are
those of `evaluate/overoptimisation.py` and `evaluate/gain.py`; nothing is computed from weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy
from markupsafe import Markup

from posttrain.evaluate import stats
from posttrain.evaluate.gain import published_gain
from posttrain.evaluate.overoptimisation import Law, at_distance, distance, fit_laws, law_at, table
from posttrain.evaluate.table import change_numbers
from posttrain.report import formatting, plots
from posttrain.report.markup import Content, el, join, scroll, section
from posttrain.report.run import Run, Stage

_LEAD = (
    "The score is what the policy was paid by, gold what it should be good at; both on prompts that were held out. "
    "Bars hold 95\u202f%. Where gold falls while the score goes on rising, more of the score is worth less. "
    "The curves are the evaluations that chose the published policy (ringed): the highest of several is too high on average, "
    "so the value to report is the one from fresh answers."
)
_WARNING = "over-optimisation: "
_FORMS = {"best of n": "d (α − β d)", "RL": "d (α − β log d)"}
# Colours: the stage itself, the two laws, then other policies.
_OWN, _LAWS, _FRESH, _OTHERS = 1, {"best of n": 3, "RL": 4}, 2, 5


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
    shown = [law for law in found.laws if not law.unsure]
    figures = [_figure(stage, found, "gold", shown), _figure(stage, found, "score", ())]
    parts = [_gained(stage, found), el("div.plots", *figures), _outcome(stage, found), _fitted(found)]
    return el("div.stage", head, *parts, _compared(stage, found))


def _gained(stage: Stage, found: _Gold) -> Markup:
    """Start and published policy on fresh answers, and the paired change between them."""
    if len(stage.published) != 2:
        chosen = f"the highest of {len(found.rows)} evaluations, taken from the answers that chose it"
        return el("p", f"Gold of the published policy is {chosen}: too high on average. It was not measured on fresh answers.")
    gain = published_gain(stage.name, stage.published, stage.gold)
    names = (f"start ({gain['start']})", f"published (iteration {gain['iteration']})")
    body = [[name, *(_value(row, key) for key in ("kl", "gold", "score"))] for name, row in zip(names, stage.published)]
    change = ["change, paired", "", *(_change(gain[key]["change"]) for key in ("gold", "score"))]
    how = f"The same {gain['prompts']} held-out prompts, answered anew by both after the policy had been chosen."
    return el("p", how) + _table(("on fresh answers", "KL, nats", "gold", "score"), [*body, change], "gain on fresh answers")


def _change(change: Mapping[str, Any]) -> Markup:
    value, low, high = change_numbers(change)
    kind = change["verdict"].replace(" ", "-")
    badge = el(f"span.badge.{kind}", f"{formatting.MARKS[change['verdict']]} {change['verdict']} {value}")
    return join([badge, el("span.small", f"{low} to {high}")])


def _read(stage: Stage) -> _Gold:
    rows = [row for row in stage.gold if row["policy"] == stage.name]
    others = [row for row in stage.gold if row["policy"] != stage.name]
    best = max(range(len(rows)), key=lambda i: rows[i]["gold"])
    return _Gold(rows, others, best, fit_laws(table(rows, "kl_B"), table(rows, "gold_B")))


def _figure(stage: Stage, found: _Gold, what: str, laws: Sequence[Law]) -> Markup:
    own = _measured(stage.name, _OWN, found.rows, what)._replace(chosen=found.best)
    others = [_measured(row["policy"], _OTHERS + i, [row], what) for i, row in enumerate(found.others)]
    others += [_measured("published, fresh answers", _FRESH, [row], what) for row in stage.published[1:]]
    reach = numpy.linspace(0, max(own.xs), 60)
    curves = [_curve(law, reach) for law in laws]
    keys = [(own.colour, stage.name), *((c.colour, c.label) for c in curves), *((o.colour, o.label) for o in others)]
    legend = [el("span.key", el(f"i.c{number % plots.COLOURS}"), text) for number, text in keys]
    drawing = plots.against_distance([own, *others], curves, ylabel=what, about=f"{stage.name}, {what} against distance")
    return el("figure", el("figcaption", el("strong", what), el("span.legend", *legend)), drawing)


def _measured(label: str, colour: int, rows: Sequence[dict[str, Any]], what: str) -> plots.Measured:
    d_E = distance(numpy.array([row["kl"] for row in rows], dtype=float))
    return plots.Measured(label, colour, d_E.tolist(), [r[what] for r in rows], [_half(r, what) for r in rows])


def _curve(law: Law, reach: Any) -> plots.Curve:
    inside = law.peak is not None and law.peak.value <= reach[-1]
    peak = (law.peak.value, float(law.top or 0.0)) if law.peak is not None and inside else None
    return plots.Curve(f"law of {law.name}", _LAWS[law.name], reach.tolist(), law_at(law, reach).tolist(), peak)


def _outcome(stage: Stage, found: _Gold) -> Markup:
    """Where it began, what is published, where it ended."""
    warned = [str(w) for w in (stage.manifest or {}).get("warnings", ()) if str(w).startswith(_WARNING)]
    picked = f"highest gold of {len(found.rows)} (ringed)"
    places = (("start", found.rows[0]), (picked, found.rows[found.best]), ("end", found.rows[-1]))
    body = [(what, f"{row['iteration']}", _value(row, "kl"), _value(row, "gold"), _value(row, "score")) for what, row in places]
    ended = f"Over-optimised: {warned[0].removeprefix(_WARNING)}." if warned else "Not shown to be over-optimised."
    heads = ("evaluations that chose", "after iteration", "KL, nats", "gold", "score")
    return el("p", ended) + _table(heads, body, "course")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Content]], label: str) -> Markup:
    body = [el("tr", *(el("td", cell) for cell in row)) for row in rows]
    return scroll(el("table", el("thead", el("tr", *(el("th", h) for h in heads))), el("tbody", *body)), label=label)


def _value(row: dict[str, Any], what: str) -> str:
    """A mean and how far its 95 % reach, with as many digits as that allows."""
    bar = _half(row, what)
    digits = max(0, 1 - math.floor(math.log10(bar))) if bar > 0 else 3
    return f"{row[what]:.{digits}f} ± {bar:.{digits}f}".replace("-", "−")


def _half(row: dict[str, Any], what: str) -> float:
    """Half of a mean's 95 % interval by Student's t over its prompts."""
    return float(stats.student(len(row[f"{what}_B"]) - 1) * row[f"{what}_se"])


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _fitted(found: _Gold) -> Markup:
    if not found.laws:
        return el("p.small", "Too few evaluations at different distances to fit a law.")
    heads = ("law of gold over d = √KL", "α", "β", "peak at KL", "gold there", "residual")
    return _table(heads, [_law_cells(law, found) for law in found.laws], "laws fitted to gold")


def _law_cells(law: Law, found: _Gold) -> tuple[str, ...]:
    form = f"{law.name}: {_FORMS[law.name]}"
    if law.unsure:
        why = f"not shown: the interval of {' and of '.join(law.unsure)} includes 0"
        return form, _span(*law.alpha), _span(*law.beta), why, "–", "–"
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
    shown = f"{formatting.MARKS[verdict]} {verdict}"
    return (*before, _number(float(own_B.mean())), _span(change.value, change.low, change.high), shown)

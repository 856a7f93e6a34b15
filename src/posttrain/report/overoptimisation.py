"""The over-optimisation section of PPO: the gain on fresh answers, score and gold against the distance from the start, two
fitted laws, and other policies at equal KL.

Input: `gold.jsonl` and `gold_published.jsonl` of every PPO stage that measured gold. The numbers are those of
`evaluate/overoptimisation.py` and `evaluate/gain.py`; nothing is computed from weights.
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
from posttrain.report.run import RunRecord, StageRecord

_LEAD = (
    "The score is what the policy was trained on; gold is the intended quality. Both are measured on held-out prompts. "
    "Bars are 95\u202f% intervals. If gold falls while the score rises, the score is over-optimised. "
    "The published policy (ringed) was chosen by these evaluations. The maximum of several is biased upwards, "
    "so report the value from fresh answers."
)
_WARNING = "over-optimisation: "
_FORMS = {"best of n": "d (α − β d)", "RL": "d (α − β log d)"}
# Colours of the stage, the fresh evaluation, the two laws and other policies.
_STAGE_COLOUR, _LAW_COLOURS, _FRESH_COLOUR, _OTHER_COLOUR = 1, {"best of n": 3, "RL": 4}, 2, 5


class _Gold(NamedTuple):
    """Evaluations of the trained policy in order, and those of other policies."""

    rows: list[dict[str, Any]]
    others: list[dict[str, Any]]
    best: int
    laws: tuple[Law, ...]


def overoptimisation(run: RunRecord) -> Markup:
    """The section; empty if no stage measured gold."""
    stages = [stage for stage in run.stages if any(row.get("policy") == stage.name for row in stage.gold)]
    return section("gold", "Over-optimisation", *map(_stage, stages), lead=_LEAD) if stages else Markup("")


def _stage(stage: StageRecord) -> Markup:
    gold = _gold_rows(stage)
    head = el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", f"{len(gold.rows)} evaluations"))
    significant_laws = [law for law in gold.laws if not law.unsure]
    figures = [_figure(stage, gold, "gold", significant_laws), _figure(stage, gold, "score", ())]
    parts = [_gained(stage, gold), el("div.plots", *figures), _outcome(stage, gold), _fitted(gold)]
    return el("div.stage", head, *parts, _compared(stage, gold))


def _gained(stage: StageRecord, gold: _Gold) -> Markup:
    """The start and the published policy on fresh answers, and the paired change between them."""
    if len(stage.published) != 2:
        chosen = f"the maximum of the {len(gold.rows)} evaluations that chose it"
        return el(
            "p", f"Gold of the published policy is {chosen}, which is biased upwards. It was not measured on fresh answers."
        )
    gain = published_gain(stage.name, stage.published, stage.gold)
    names = (f"start ({gain['start']})", f"published (iteration {gain['iteration']})")
    body = [[name, *(_value(row, key) for key in ("kl", "gold", "score"))] for name, row in zip(names, stage.published)]
    change = ["change, paired", "", *(_change(gain[key]["change"]) for key in ("gold", "score"))]
    how = f"The same {gain['prompts']} held-out prompts, answered again by both after the policy was chosen."
    return el("p", how) + _table(("on fresh answers", "KL, nats", "gold", "score"), [*body, change], "gain on fresh answers")


def _change(change: Mapping[str, Any]) -> Markup:
    value, low, high = change_numbers(change)
    kind = change["verdict"].replace(" ", "-")
    badge = el(f"span.badge.{kind}", f"{formatting.MARKS[change['verdict']]} {change['verdict']} {value}")
    return join([badge, el("span.small", f"{low} to {high}")])


def _gold_rows(stage: StageRecord) -> _Gold:
    rows = [row for row in stage.gold if row["policy"] == stage.name]
    others = [row for row in stage.gold if row["policy"] != stage.name]
    best = max(range(len(rows)), key=lambda i: rows[i]["gold"])
    return _Gold(rows, others, best, fit_laws(table(rows, "kl_B"), table(rows, "gold_B")))


def _figure(stage: StageRecord, gold: _Gold, measure: str, laws: Sequence[Law]) -> Markup:
    series = _measured(stage.name, _STAGE_COLOUR, gold.rows, measure)._replace(chosen=gold.best)
    others = [_measured(row["policy"], _OTHER_COLOUR + i, [row], measure) for i, row in enumerate(gold.others)]
    others += [_measured("published, fresh answers", _FRESH_COLOUR, [row], measure) for row in stage.published[1:]]
    reach = numpy.linspace(0, max(series.xs), 60)
    curves = [_curve(law, reach) for law in laws]
    keys = [(series.colour, stage.name), *((c.colour, c.label) for c in curves), *((o.colour, o.label) for o in others)]
    legend = [el("span.key", el(f"i.c{number % plots.COLOURS}"), text) for number, text in keys]
    drawing = plots.against_distance(
        [series, *others], curves, ylabel=measure, about=f"{stage.name}, {measure} against distance"
    )
    return el("figure", el("figcaption", el("strong", measure), el("span.legend", *legend)), drawing)


def _measured(label: str, colour: int, rows: Sequence[dict[str, Any]], measure: str) -> plots.EvaluationSeries:
    d_E = distance(numpy.array([row["kl"] for row in rows], dtype=float))
    return plots.EvaluationSeries(
        label, colour, d_E.tolist(), [r[measure] for r in rows], [_half_interval(r, measure) for r in rows]
    )


def _curve(law: Law, reach: Any) -> plots.Curve:
    peak_in_range = law.peak is not None and law.peak.value <= reach[-1]
    peak = (law.peak.value, float(law.top or 0.0)) if law.peak is not None and peak_in_range else None
    return plots.Curve(f"law of {law.name}", _LAW_COLOURS[law.name], reach.tolist(), law_at(law, reach).tolist(), peak)


def _outcome(stage: StageRecord, gold: _Gold) -> Markup:
    """A table of the start, the published policy and the end."""
    warned = [str(w) for w in (stage.manifest or {}).get("warnings", ()) if str(w).startswith(_WARNING)]
    picked = f"highest gold of {len(gold.rows)} (ringed)"
    points = (("start", gold.rows[0]), (picked, gold.rows[gold.best]), ("end", gold.rows[-1]))
    body = [
        (label, f"{row['iteration']}", _value(row, "kl"), _value(row, "gold"), _value(row, "score")) for label, row in points
    ]
    ended = f"Over-optimised: {warned[0].removeprefix(_WARNING)}." if warned else "Not shown to be over-optimised."
    heads = ("evaluations that chose", "after iteration", "KL, nats", "gold", "score")
    return el("p", ended) + _table(heads, body, "course")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Content]], label: str) -> Markup:
    body = [el("tr", *(el("td", cell) for cell in row)) for row in rows]
    return scroll(el("table", el("thead", el("tr", *(el("th", h) for h in heads))), el("tbody", *body)), label=label)


def _value(row: dict[str, Any], measure: str) -> str:
    """A mean with half of its 95 % interval, rounded to the precision of the interval."""
    bar = _half_interval(row, measure)
    digits = max(0, 1 - math.floor(math.log10(bar))) if bar > 0 else 3
    return f"{row[measure]:.{digits}f} ± {bar:.{digits}f}".replace("-", "−")


def _half_interval(row: dict[str, Any], measure: str) -> float:
    """Half of a mean's 95 % interval by Student's t over its prompts."""
    return float(stats.student(len(row[f"{measure}_B"]) - 1) * row[f"{measure}_se"])


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _fitted(gold: _Gold) -> Markup:
    if not gold.laws:
        return el("p.small", "Too few evaluations at different distances to fit a law.")
    heads = ("law of gold over d = √KL", "α", "β", "peak at KL", "gold there", "residual")
    return _table(heads, [_law_cells(law, gold) for law in gold.laws], "laws fitted to gold")


def _law_cells(law: Law, gold: _Gold) -> tuple[str, ...]:
    form = f"{law.name}: {_FORMS[law.name]}"
    if law.unsure:
        reason = f"not shown: the interval of {' and of '.join(law.unsure)} includes 0"
        return form, _span(*law.alpha), _span(*law.beta), reason, "–", "–"
    peak, top = "no peak shown", "–"
    if law.peak is not None:
        beyond = law.peak.value**2 > max(row["kl"] for row in gold.rows)
        peak = f"{_span(law.peak.value**2, law.peak.low**2, law.peak.high**2)}{', beyond the data' if beyond else ''}"
        top = _number(law.top or 0.0)
    return form, _span(*law.alpha), _span(*law.beta), peak, top, _number(law.residual)


def _span(value: float, low: float, high: float) -> str:
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _compared(stage: StageRecord, gold: _Gold) -> Markup:
    """Other policies against this stage at the same KL from the start."""
    if not gold.others:
        return Markup("")
    heads = ("policy", "KL", "gold", f"{stage.name} at equal KL", "difference", "")
    return _table(heads, [_equal_kl_row(row, gold) for row in gold.others], "other policies at equal KL")


def _equal_kl_row(row: dict[str, Any], gold: _Gold) -> tuple[str, ...]:
    own_B = at_distance(table(gold.rows, "kl_B"), table(gold.rows, "gold_B"), row["kl"])
    before = (row["policy"], _value(row, "kl"), _value(row, "gold"))
    if own_B is None:
        return (*before, "not reached", "–", "")
    change = stats.mean([a - b for a, b in zip(row["gold_B"], own_B.tolist(), strict=True)])
    verdict = stats.verdict(change, "higher", "nats")
    shown = f"{formatting.MARKS[verdict]} {verdict}"
    return (*before, _number(float(own_B.mean())), _span(change.value, change.low, change.high), shown)

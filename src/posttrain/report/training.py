"""Training curves of every stage, from its metrics.jsonl.

Metric names are `kind/name`; `validation_name` is drawn into the chart of `name`. The most important charts are open, the
others collapsed. A metric that is not listed here gets its own chart, so unknown kinds of stages are drawn too.
"""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from posttrain.report import formatting, plots
from posttrain.report.markup import details, el, section
from posttrain.report.run import RunRecord, StageRecord
from posttrain.stages import KINDS
from posttrain.stages.kind import Chart, Iterations

# Charts of all kinds, after those of the stage's kind (`stages/`).
_CHARTS = (
    Chart("loss", ("loss",)),
    Chart("learning rate", ("learning_rate",), False),
    Chart("gradient norm before clipping", ("grad_norm",), False),
    Chart("tokens per second", ("tokens_per_second",), False),
    Chart("tokens a second of sampling and judging", ("rollout_tokens_per_second",), False),
    Chart("tokens a second of the update", ("update_tokens_per_second",), False),
)
# Not drawn: the x axis in other units, and the inverse of tokens per second.
_NOT_DRAWN = frozenset({"step", "train/epoch", "time/step", "time/rollout"})
_CLOSED_GROUPS = frozenset({"train", "time"})
_VALIDATION = "validation_"
# Shown next to the stage's name, because these values hardly change between steps.
_MEMORY_PREFIX = "memory/"
# Closed charts that fill the first row if a stage has few open ones.
_CHARTS_PER_ROW, _FILLING_CHARTS = 3, ("learning rate", "gradient norm before clipping")
SeriesByMetric = dict[str, list[tuple[float, float]]]


def training(run: RunRecord) -> Markup:
    """The section of training curves; empty if no stage has metrics."""
    parts = [_stage(stage) for stage in run.stages if stage.metrics]
    if not parts:
        return Markup("")
    lead = (
        "One point per step, or per iteration for metrics of an iteration. A noisy line is drawn faint, with its running mean "
        "on top. Dots are measured on held-out rows."
    )
    return section("training", "Training", *parts, lead=lead)


def _stage(stage: StageRecord) -> Markup:
    kind = KINDS.get(stage.kind)
    iterations = kind.iterations if kind is not None else Iterations()
    series = read_series(stage.metrics) | per_iteration(stage.metrics, iterations)
    drawn = {name: points for name, points in series.items() if not name.startswith(_MEMORY_PREFIX)}
    charts = charts_of(drawn, kind.charts if kind is not None else (), iterations.parts)
    visible = [chart for chart in charts if chart.open]
    visible += [chart for chart in charts if not chart.open and chart.title in _FILLING_CHARTS][
        : max(0, _CHARTS_PER_ROW - len(visible))
    ]
    hidden = [_figure(stage, chart, series, iterations) for chart in charts if chart not in visible]
    manifest = stage.manifest or {}
    parts = [(name, name.removeprefix(_MEMORY_PREFIX)) for name in series if name.startswith(_MEMORY_PREFIX)]
    work = [f"{manifest['steps']:,} steps"] if "steps" in manifest else []
    work += [f"{manifest['tokens']:,} tokens"] if "tokens" in manifest else []
    work += [formatting.duration(manifest.get("train_seconds", manifest.get("seconds")))]
    work += (
        [f"memory: {', '.join(f'{part} {max(y for _, y in series[name]):,.1f}' for name, part in parts)} MiB"] if parts else []
    )
    collapsed = details(f"{len(hidden)} more curves of {stage.name}", el("div.plots", *hidden)) if hidden else ""
    head = el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", " · ".join(work)))
    return el("div.stage", head, el("div.plots", *(_figure(stage, chart, series, iterations) for chart in visible)), collapsed)


def read_series(rows: Sequence[Mapping[str, object]]) -> SeriesByMetric:
    """Finite values by metric, as (step, value)."""
    series: SeriesByMetric = {}
    for number, row in enumerate(rows, 1):
        step = row.get("step", number)
        for name, value in row.items():
            if name not in _NOT_DRAWN and isinstance(value, int | float) and isinstance(step, int | float):
                series.setdefault(name, []).append((float(step), float(value)))
    return series


def per_iteration(rows: Sequence[Mapping[str, object]], iterations: Iterations) -> SeriesByMetric:
    """Metrics that have one value per iteration, as (iteration, value). The rows are steps.

    A new iteration begins when one of `iterations.marks` changes.
    """
    series: SeriesByMetric = {}
    iteration, before = 0, None
    for row in rows:
        marks = [row.get(name) for name in iterations.marks]
        iteration += marks != before
        before = marks
        for name, value in row.items():
            if _is_once(name, iterations) and isinstance(value, int | float):
                points = series.setdefault(name, [])
                if not points or points[-1][0] != iteration:
                    points.append((float(iteration), float(value)))
    return series


def _is_once(name: str, iterations: Iterations) -> bool:
    return name in iterations.once or name.startswith(tuple(iterations.parts))


def charts_of(series: SeriesByMetric, of_kind: Sequence[Chart] = (), parts: Mapping[str, str] = {}) -> list[Chart]:
    """All charts of these metrics, those of the stage's kind first. Each metric appears in one chart.

    Metrics that begin with a key of `parts` share the chart that its value names.
    """
    remaining = dict.fromkeys(series)
    charts = []
    for chart in (*of_kind, *_CHARTS):
        names = [name for name in remaining if name in chart.names or _plain(name, parts) in chart.names]
        if names:
            charts.append(chart._replace(names=_ordered(names, chart.names, parts)))
            for name in names:
                del remaining[name]
    while remaining:
        first = next(iter(remaining))
        names = [name for name in remaining if _without_validation(name) == _without_validation(first)]
        is_open = first.split("/")[0] not in _CLOSED_GROUPS
        charts.append(Chart(_without_validation(first).split("/")[-1].replace("_", " "), tuple(names), is_open))
        for name in names:
            del remaining[name]
    return charts


def _ordered(names: Sequence[str], order: Sequence[str], parts: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: order.index(name if name in order else _plain(name, parts))))


def _plain(name: str, parts: Mapping[str, str]) -> str:
    for start, plain in parts.items():
        if name.startswith(start):
            return plain
    return name.split("/")[-1].removeprefix(_VALIDATION)


def _without_validation(name: str) -> str:
    return name.replace(f"/{_VALIDATION}", "/")


def _figure(stage: StageRecord, chart: Chart, series_by_metric: SeriesByMetric, iterations: Iterations) -> Markup:
    series = []
    for number, name in enumerate(chart.names, 1):
        held_out = name.split("/")[-1].startswith(_VALIDATION)
        xs, ys = zip(*series_by_metric[name])
        series.append(
            plots.Series(
                _label(name, held_out, iterations.parts),
                2 if held_out else number if number < 2 else number + 1,
                xs,
                ys,
                held_out,
            )
        )
    last = [f"{s.label if len(series) > 1 else 'last'} {formatting.plain(float(s.ys[-1]))}" for s in series]
    legend = [el("span.key", el(f"i.c{s.colour % plots.COLOURS}"), text) for s, text in zip(series, last)]
    each = all(_is_once(name, iterations) for name in chart.names)
    drawing = plots.curves(series, f"{stage.name}, {chart.title}", x_name="iteration" if each else "step")
    return el("figure", el("figcaption", el("strong", chart.title), el("span.legend", *legend)), drawing)


def _label(name: str, held_out: bool, parts: Mapping[str, str]) -> str:
    short = name.split("/")[-1]
    if _plain(name, parts) in parts.values():
        return short
    for word in ("chosen", "rejected"):
        if short.startswith(f"{word}_"):
            return word
    return "held out" if held_out else "training"

"""Training curves of every stage, from its metrics.jsonl.

Where it stands: metric names are `kind/name`; `validation_name` is drawn into the chart of `name`. Charts that say how
training went stand open, the others behind a tap. A metric that is not named here gets a chart of its own, so a kind of
stage that this version does not know is drawn too.
"""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from posttrain.report import formatting, plots
from posttrain.report.markup import details, el, section
from posttrain.report.run import Run, Stage
from posttrain.stages import KINDS
from posttrain.stages.kind import Chart, Iterations

# Beside the charts of each kind of stage; and those of a kind that this version does not know.
_CHARTS = (
    Chart("loss", ("loss",)),
    Chart("learning rate", ("learning_rate",), False),
    Chart("gradient norm before clipping", ("grad_norm",), False),
    Chart("tokens a second", ("tokens_per_second",), False),
    Chart("tokens a second of sampling and judging", ("rollout_tokens_per_second",), False),
    Chart("tokens a second of the update", ("update_tokens_per_second",), False),
)
# Not worth a chart: the x axis in other units, and the inverse of tokens a second.
_NOT_DRAWN = frozenset({"step", "train/epoch", "time/step", "time/rollout"})
_GENERAL = frozenset({"train", "time"})
_VALIDATION = "validation_"
# Told beside the stage's name: the parts hardly change from step to step.
_MEMORY = "memory/"
# What a row of charts is filled up with where a stage has few.
_ROW, _FILLING = 3, ("learning rate", "gradient norm before clipping")
Found = dict[str, list[tuple[float, float]]]


def training(run: Run) -> Markup:
    """The section of training curves; nothing where no stage left metrics."""
    parts = [_stage(stage) for stage in run.stages if stage.metrics]
    if not parts:
        return Markup("")
    lead = (
        "One point a step, or an iteration where a figure is one of an iteration; where a line is noisy, its running mean is "
        "drawn strong. Dots are measured on held-out rows."
    )
    return section("training", "Training", *parts, lead=lead)


def _stage(stage: Stage) -> Markup:
    kind = KINDS.get(stage.kind)
    iterations = kind.iterations if kind is not None else Iterations()
    found = read_series(stage.metrics) | per_iteration(stage.metrics, iterations)
    drawn = {name: points for name, points in found.items() if not name.startswith(_MEMORY)}
    charts = charts_of(drawn, kind.charts if kind is not None else (), iterations.parts)
    shown = [chart for chart in charts if chart.open]
    shown += [chart for chart in charts if not chart.open and chart.title in _FILLING][: max(0, _ROW - len(shown))]
    behind = [_figure(stage, chart, found, iterations) for chart in charts if chart not in shown]
    manifest = stage.manifest or {}
    parts = [(name, name.removeprefix(_MEMORY)) for name in found if name.startswith(_MEMORY)]
    work = [f"{manifest['steps']:,} steps"] if "steps" in manifest else []
    work += [f"{manifest['tokens']:,} tokens"] if "tokens" in manifest else []
    work += [formatting.duration(manifest.get("train_seconds", manifest.get("seconds")))]
    work += (
        [f"memory: {', '.join(f'{part} {max(y for _, y in found[name]):,.1f}' for name, part in parts)} MiB"] if parts else []
    )
    more = details(f"{len(behind)} more curves of {stage.name}", el("div.plots", *behind)) if behind else ""
    head = el("h3", stage.name, " ", el("span.kind", stage.kind), el("span.small", " · ".join(work)))
    return el("div.stage", head, el("div.plots", *(_figure(stage, chart, found, iterations) for chart in shown)), more)


def read_series(rows: Sequence[Mapping[str, object]]) -> Found:
    """Finite values by metric, as (step, value)."""
    found: Found = {}
    for number, row in enumerate(rows, 1):
        step = row.get("step", number)
        for name, value in row.items():
            if name not in _NOT_DRAWN and isinstance(value, int | float) and isinstance(step, int | float):
                found.setdefault(name, []).append((float(step), float(value)))
    return found


def per_iteration(rows: Sequence[Mapping[str, object]], iterations: Iterations) -> Found:
    """What is measured once an iteration, though rows are steps: values by metric, as (iteration, value)."""
    found: Found = {}
    iteration, before = 0, None
    for row in rows:
        marks = [row.get(name) for name in iterations.marks]
        iteration += marks != before
        before = marks
        for name, value in row.items():
            if _is_once(name, iterations) and isinstance(value, int | float):
                points = found.setdefault(name, [])
                if not points or points[-1][0] != iteration:
                    points.append((float(iteration), float(value)))
    return found


def _is_once(name: str, iterations: Iterations) -> bool:
    return name in iterations.once or name.startswith(tuple(iterations.parts))


def charts_of(found: Found, of_kind: Sequence[Chart] = (), parts: Mapping[str, str] = {}) -> list[Chart]:
    """Every chart that these metrics make, with their full names; each metric once. Those of the stage's kind come first.

    Metrics that begin with a key of `parts` share the chart that its value names.
    """
    left = dict.fromkeys(found)
    charts = []
    for chart in (*of_kind, *_CHARTS):
        names = [name for name in left if name in chart.names or _plain(name, parts) in chart.names]
        if names:
            charts.append(chart._replace(names=_ordered(names, chart.names, parts)))
            for name in names:
                del left[name]
    while left:
        first = next(iter(left))
        names = [name for name in left if _without_validation(name) == _without_validation(first)]
        is_open = first.split("/")[0] not in _GENERAL
        charts.append(Chart(_without_validation(first).split("/")[-1].replace("_", " "), tuple(names), is_open))
        for name in names:
            del left[name]
    return charts


def _ordered(names: Sequence[str], wanted: Sequence[str], parts: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: wanted.index(name if name in wanted else _plain(name, parts))))


def _plain(name: str, parts: Mapping[str, str]) -> str:
    for start, plain in parts.items():
        if name.startswith(start):
            return plain
    return name.split("/")[-1].removeprefix(_VALIDATION)


def _without_validation(name: str) -> str:
    return name.replace(f"/{_VALIDATION}", "/")


def _figure(stage: Stage, chart: Chart, found: Found, iterations: Iterations) -> Markup:
    series = []
    for number, name in enumerate(chart.names, 1):
        held_out = name.split("/")[-1].startswith(_VALIDATION)
        xs, ys = zip(*found[name])
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
    drawing = plots.curves(series, f"{stage.name}, {chart.title}", over="iteration" if each else "step")
    return el("figure", el("figcaption", el("strong", chart.title), el("span.legend", *legend)), drawing)


def _label(name: str, held_out: bool, parts: Mapping[str, str]) -> str:
    short = name.split("/")[-1]
    if _plain(name, parts) in parts.values():
        return short
    for word in ("chosen", "rejected"):
        if short.startswith(f"{word}_"):
            return word
    return "held out" if held_out else "training"

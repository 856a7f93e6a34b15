"""Training curves of every stage, from its metrics.jsonl.

Metric names are `kind/name`; `validation_name` is drawn into the chart of `name`. The most important charts are open, the
others collapsed. A metric that is not listed here gets its own chart, so unknown kinds of stages are drawn too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from posttrain.report import formatting, plots
from posttrain.report.markup import details, el, section
from posttrain.report.run import RunRecord, StageRecord


class _Chart(NamedTuple):
    title: str
    names: tuple[str, ...]
    open: bool = True


# By the full name of a metric, or by its part after the slash.
_CHARTS = (
    _Chart("score", ("score",)),
    _Chart("KL to the reference, nats per completion", ("ppo/kl",)),
    _Chart("gold on held-out prompts", ("gold",)),
    _Chart("mean of each part of the score", ("score part",)),
    _Chart("disagreement of an ensemble's members", ("ensemble part",)),
    _Chart("loss", ("loss",)),
    _Chart("margin", ("margin",)),
    _Chart("accuracy", ("accuracy",)),
    _Chart("log-ratio to the reference, nats", ("chosen_log_ratio", "rejected_log_ratio")),
    _Chart("KL to the reference, nats per token", ("dpo/kl",)),
    _Chart("score minus KL and penalty", ("reward",)),
    _Chart("tokens per completion", ("length",)),
    _Chart("share that ended", ("ended",)),
    _Chart("repeated runs of four tokens", ("repetition",), False),
    _Chart("scores of both sides", ("chosen_score", "rejected_score"), False),
    _Chart("mean of a pair's scores", ("center",), False),
    _Chart("standard deviation of the scores", ("score_spread",), False),
    _Chart("policy loss", ("policy_loss",), False),
    _Chart("value loss", ("value_loss",), False),
    _Chart("loss of the pretraining mix, nats per token", ("ptx_loss",), False),
    _Chart("advantages before whitening", ("advantage", "advantage_spread"), False),
    _Chart("explained variance of the returns", ("explained_variance",), False),
    _Chart("share of clipped tokens", ("clip_fraction",), False),
    _Chart("share of clipped values", ("value_clip_fraction",), False),
    _Chart("ratio to the policy that sampled", ("ratio",), False),
    _Chart("approximate KL to the policy that sampled", ("approximate_kl",), False),
    _Chart("KL by the k3 estimator, nats per completion", ("positive_kl",), False),
    _Chart("KL coefficient", ("kl_coef",), False),
    _Chart("entropy, nats per token", ("entropy",), False),
    _Chart("score on held-out prompts", ("gold_score",), False),
    _Chart("KL to the start on held-out prompts", ("gold_kl",), False),
    _Chart("standard error of gold", ("gold_se",), False),
    _Chart("standard error of the score on held-out prompts", ("gold_score_se",), False),
    _Chart("tokens with different log-probabilities in the sampler", ("mismatch",), False),
    _Chart("log-probability, nats", ("chosen_logprob", "rejected_logprob"), False),
    _Chart("ranks chosen above rejected", ("ranking_accuracy",), False),
    _Chart("gradient weight", ("gradient_weight",), False),
    _Chart("trained tokens per step", ("targets",), False),
    _Chart("learning rate", ("learning_rate",), False),
    _Chart("gradient norm before clipping", ("grad_norm",), False),
    _Chart("tokens per second", ("tokens_per_second",), False),
    _Chart("tokens a second of sampling and judging", ("rollout_tokens_per_second",), False),
    _Chart("tokens a second of the update", ("update_tokens_per_second",), False),
)
# Not drawn: the x axis in other units, and the inverse of tokens per second.
_NOT_DRAWN = frozenset({"step", "train/epoch", "time/step", "time/rollout"})
_CLOSED_GROUPS = frozenset({"train", "time"})
_VALIDATION = "validation_"
# Shown next to the stage's name, because these values hardly change between steps.
_MEMORY_PREFIX = "memory/"
# Metrics that end in a name from the recipe.
_PARTS = {"ppo/score/": "score part", "ppo/ensemble_spread/": "ensemble part"}
# Closed charts that fill the first row if a stage has few open ones.
_CHARTS_PER_ROW, _FILLING_CHARTS = 3, ("learning rate", "gradient norm before clipping")
# Metrics that identify an iteration's rollouts, and all metrics that are measured once per iteration.
_ROLLOUTS = ("ppo/score", "ppo/kl", "ppo/entropy", "ppo/length", "time/rollout")
_EACH_ITERATION = frozenset((
    "ppo/score", "ppo/reward", "ppo/kl", "ppo/positive_kl", "ppo/kl_coef", "ppo/entropy", "ppo/length", "ppo/ended",
    "ppo/mismatch", "ppo/score_spread", "ppo/advantage", "ppo/advantage_spread", "ppo/repetition", "ppo/explained_variance",
    "ppo/gold", "ppo/gold_se", "ppo/gold_score", "ppo/gold_score_se", "ppo/gold_kl", "time/rollout_tokens_per_second",
))  # fmt: skip
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
    series = read_series(stage.metrics)
    series |= per_iteration(stage.metrics) if stage.kind == "ppo" else {}
    charts = charts_of({name: points for name, points in series.items() if not name.startswith(_MEMORY_PREFIX)})
    visible = [chart for chart in charts if chart.open]
    visible += [chart for chart in charts if not chart.open and chart.title in _FILLING_CHARTS][
        : max(0, _CHARTS_PER_ROW - len(visible))
    ]
    hidden = [_figure(stage, chart, series) for chart in charts if chart not in visible]
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
    return el("div.stage", head, el("div.plots", *(_figure(stage, chart, series) for chart in visible)), collapsed)


def read_series(rows: Sequence[Mapping[str, object]]) -> SeriesByMetric:
    """Finite values by metric, as (step, value)."""
    series: SeriesByMetric = {}
    for number, row in enumerate(rows, 1):
        step = row.get("step", number)
        for name, value in row.items():
            if name not in _NOT_DRAWN and isinstance(value, int | float) and isinstance(step, int | float):
                series.setdefault(name, []).append((float(step), float(value)))
    return series


def per_iteration(rows: Sequence[Mapping[str, object]]) -> SeriesByMetric:
    """Metrics of a PPO stage that have one value per iteration, as (iteration, value). The rows are steps.

    A new iteration begins when the metrics of the rollouts change.
    """
    series: SeriesByMetric = {}
    iteration, before = 0, None
    for row in rows:
        rollouts = [row.get(name) for name in _ROLLOUTS]
        iteration += rollouts != before
        before = rollouts
        for name, value in row.items():
            if (name in _EACH_ITERATION or name.startswith(tuple(_PARTS))) and isinstance(value, int | float):
                points = series.setdefault(name, [])
                if not points or points[-1][0] != iteration:
                    points.append((float(iteration), float(value)))
    return series


def charts_of(series: SeriesByMetric) -> list[_Chart]:
    """All charts of these metrics. Each metric appears in one chart."""
    remaining = dict.fromkeys(series)
    charts = []
    for chart in _CHARTS:
        names = [name for name in remaining if name in chart.names or _plain(name) in chart.names]
        if names:
            charts.append(chart._replace(names=_ordered(names, chart.names)))
            for name in names:
                del remaining[name]
    while remaining:
        first = next(iter(remaining))
        names = [name for name in remaining if _without_validation(name) == _without_validation(first)]
        is_open = first.split("/")[0] not in _CLOSED_GROUPS
        charts.append(_Chart(_without_validation(first).split("/")[-1].replace("_", " "), tuple(names), is_open))
        for name in names:
            del remaining[name]
    return charts


def _ordered(names: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: order.index(name if name in order else _plain(name))))


def _plain(name: str) -> str:
    for start, plain in _PARTS.items():
        if name.startswith(start):
            return plain
    return name.split("/")[-1].removeprefix(_VALIDATION)


def _without_validation(name: str) -> str:
    return name.replace(f"/{_VALIDATION}", "/")


def _figure(stage: StageRecord, chart: _Chart, series_by_metric: SeriesByMetric) -> Markup:
    series = []
    for number, name in enumerate(chart.names, 1):
        held_out = name.split("/")[-1].startswith(_VALIDATION)
        xs, ys = zip(*series_by_metric[name])
        series.append(
            plots.Series(_label(name, held_out), 2 if held_out else number if number < 2 else number + 1, xs, ys, held_out)
        )
    last = [f"{s.label if len(series) > 1 else 'last'} {formatting.plain(float(s.ys[-1]))}" for s in series]
    legend = [el("span.key", el(f"i.c{s.colour % plots.COLOURS}"), text) for s, text in zip(series, last)]
    each = stage.kind == "ppo" and all(n in _EACH_ITERATION or n.startswith(tuple(_PARTS)) for n in chart.names)
    drawing = plots.curves(series, f"{stage.name}, {chart.title}", x_name="iteration" if each else "step")
    return el("figure", el("figcaption", el("strong", chart.title), el("span.legend", *legend)), drawing)


def _label(name: str, held_out: bool) -> str:
    short = name.split("/")[-1]
    if _plain(name) in _PARTS.values():
        return short
    for word in ("chosen", "rejected"):
        if short.startswith(f"{word}_"):
            return word
    return "held out" if held_out else "training"

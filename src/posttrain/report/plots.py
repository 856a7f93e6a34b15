"""Charts as inline SVG. Only this file imports matplotlib.

Input: numbers. Output: markup whose colours are CSS variables of the page, so one drawing serves light and dark mode. Text
stays text. Points have a `<title>`, which browsers show on hover. The output is deterministic. Not included: scripts, zooming
and external resources.
"""

import hashlib
import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

WIDTH, HEIGHT = 340, 216
# Placeholder colours, replaced by CSS variables of the page after drawing.
INK, SOFT, LINE, GOOD = "#0f0f01", "#0f0f02", "#0f0f03", "#0f0f04"
COLOURS = 8
_THEME = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", GOOD: "var(--better)"}
_THEME |= {f"#0f0f1{i}": f"var(--c{i})" for i in range(COLOURS)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "posttrain", "font.family": "DejaVu Sans", "font.size": 11.5,
    "text.parse_math": False, "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "axes.linewidth": 1, "axes.unicode_minus": True,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT, "text.color": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "path.simplify_threshold": 0.3,
}  # fmt: skip
MOST_POINTS = 240
_ROOT_TICKS = (0.01, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
# With more stages than this, the caption names them instead of labels.
MOST_NAMED = 4
_HOVERS = 40


class Series(NamedTuple):
    """A line of a chart. `colour` is a number of the page's palette. `sparse` lines show their points."""

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    sparse: bool = False


class Point(NamedTuple):
    """A stage against the base: changes in gain and capability as (value, low, high), and the parent."""

    name: str
    colour: int
    parent: str
    gain: tuple[float, float, float]
    capability: tuple[float, float, float]


class EvaluationSeries(NamedTuple):
    """Evaluations of a policy: positions, values and half of their 95 % intervals."""

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    bars: Sequence[float]
    # The index of the ringed evaluation.
    chosen: int | None = None


class Curve(NamedTuple):
    """A fitted curve, drawn dashed, and its peak."""

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    peak: tuple[float, float] | None


class FrontierPoint(NamedTuple):
    """A policy: its name, and KL and value as (value, low, high)."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


class FrontierLine(NamedTuple):
    """The policies of one method, by increasing KL."""

    label: str
    colour: int
    points: Sequence[FrontierPoint]


class _Hover(NamedTuple):
    x: float
    y: float
    text: str


def colour(number: int) -> str:
    """The colour of a series or stage. Colours repeat after eight."""
    return f"#0f0f1{number % COLOURS}"


def curves(series: Sequence[Series], about: str = "", *, x_name: str = "step") -> Markup:
    """Metrics over steps, or over `x_name`. A dense noisy line is drawn faint with its running mean on top. `about` is the
    start of the accessible label."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, HEIGHT)
        hovers: list[_Hover] = []
        for line in series:
            xs, ys = _thinned(line.xs, line.ys)
            window = max(3, len(xs) // 15) if not line.sparse and _noisy(ys) else 0
            axes.plot(xs, ys, color=colour(line.colour), linewidth=1 if window else 1.8, alpha=0.35 if window else 1,
                      marker="o" if line.sparse or len(xs) == 1 else None, markersize=4.5, zorder=3)  # fmt: skip
            if window:
                axes.plot(xs, _running_mean(ys, window), color=colour(line.colour), linewidth=2, zorder=4)
            every = max(1, len(xs) // _HOVERS)
            hovers += [_Hover(x, y, f"{line.label} · {x_name} {x:.0f}: {y:.4g}") for x, y in list(zip(xs, ys))[::every]]
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_name)
        return _svg(figure, axes, hovers, ": ".join(filter(None, (about, ", ".join(line.label for line in series)))))


def against_distance(measured: Sequence[EvaluationSeries], curves: Sequence[Curve], *, ylabel: str, about: str) -> Markup:
    """Evaluations over sqrt(KL) with their intervals, fitted curves, a cross at a curve's peak."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, HEIGHT)
        hovers: list[_Hover] = []
        for policy in measured:
            tint = colour(policy.colour)
            axes.errorbar(
                policy.xs, policy.ys, yerr=policy.bars, color=tint, linewidth=1.4 if len(policy.xs) > 1 else 0,
                elinewidth=1.4, marker="o", markersize=4.5, alpha=0.9, zorder=4,
            )  # fmt: skip
            if policy.chosen is not None:
                axes.plot(
                    [policy.xs[policy.chosen]], [policy.ys[policy.chosen]], "o", markersize=11, markerfacecolor="none",
                    markeredgecolor=INK, markeredgewidth=1.5, zorder=6,
                )  # fmt: skip
            hovers += [
                _Hover(x, y, f"{policy.label} · √KL {x:.3g}: {y:.4g} ± {bar:.2g}")
                for x, y, bar in zip(policy.xs, policy.ys, policy.bars)
            ]
        for curve in curves:
            axes.plot(curve.xs, curve.ys, "--", color=colour(curve.colour), linewidth=1.6, zorder=3)
            if curve.peak is not None:
                axes.plot(
                    *[[v] for v in curve.peak], "x", color=colour(curve.colour), markersize=8, markeredgewidth=2, zorder=5
                )
                hovers.append(_Hover(*curve.peak, f"{curve.label} · peak at √KL {curve.peak[0]:.3g}: {curve.peak[1]:.4g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("√KL to the start, nats")
        axes.set_ylabel(ylabel)
        return _svg(figure, axes, hovers, about)


def histogram(labels: Sequence[str], counts: Sequence[int], about: str = "") -> Markup:
    """Rows by their length in tokens. `about` is the start of the accessible label."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, 180)
        axes.bar(range(len(counts)), counts, color=colour(1), width=0.82, zorder=3)
        axes.set_xticks(range(len(labels)), labels, rotation=38, ha="right", rotation_mode="anchor", fontsize=10.5)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("tokens a row")
        axes.tick_params(axis="x", length=0)
        hovers = [_Hover(i, n / 2, f"{label} tokens: {n:,} rows") for i, (label, n) in enumerate(zip(labels, counts))]
        return _svg(figure, axes, hovers, ": ".join(filter(None, (about, "rows by length"))), radius=12)


def capability_and_gain(
    points: Sequence[Point], *, base: str, labels: tuple[str, ...], lower: tuple[bool, ...] = (False, False)
) -> Markup:
    """Every stage against the base at the origin, with the intervals of both changes and a line to its parent.

    `labels` are for the gain (right) and the capability (up). `lower` inverts the axis of a measure for which lower is better,
    so right and up are always better.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, 270)
        at = {base: (0.0, 0.0)} | {p.name: (p.gain[0], p.capability[0]) for p in points}
        axes.axhline(0, color=LINE, linewidth=1.2, zorder=1)
        axes.axvline(0, color=LINE, linewidth=1.2, zorder=1)
        for p in points:
            x, y = at[p.name]
            tint = colour(p.colour)
            start = at.get(p.parent, at[base])
            axes.annotate(
                "", (x, y), start, arrowprops={"arrowstyle": "-", "color": SOFT, "linestyle": ":", "linewidth": 1.2}, zorder=2
            )
            axes.plot([p.gain[1], p.gain[2]], [y, y], color=tint, linewidth=2, zorder=3, solid_capstyle="butt")
            axes.plot([x, x], [p.capability[1], p.capability[2]], color=tint, linewidth=2, zorder=3, solid_capstyle="butt")
            axes.plot([x], [y], "o", color=tint, markersize=8, zorder=4)
        axes.plot([0], [0], "o", color=colour(0), markersize=7, zorder=4)
        axes.margins(0.14)
        for axis, turned in zip((axes.xaxis, axes.yaxis), lower):
            axis.set_inverted(turned)
        _label_points(axes, at, points, base)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{labels[0]} · better →")
        axes.set_ylabel(f"{labels[1]} · better →")
        bottom, top = axes.get_ylim()
        axes.axhspan(0, top, color=GOOD, alpha=0.07, zorder=0, linewidth=0)
        axes.text(0.98, 0.98, "no loss", transform=axes.transAxes, ha="right", va="top", fontsize=10.5, color=GOOD)
        axes.set_ylim(bottom, top)
        hovers = [_Hover(*at[p.name], _point_words(p, labels)) for p in points]
        return _svg(figure, axes, hovers, f"capability and gain of {', '.join(p.name for p in points)}")


def frontier_chart(
    lines: Sequence[FrontierLine], *, x_label: str, y_label: str, start: float | None = None, about: str = ""
) -> Markup:
    """Value against KL with the intervals of both, one line per method. Lines begin at `start` if it is given. The x axis is
    scaled by the square root of the KL, as values are near the start (Gao et al. 2023)."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(round(WIDTH * 1.5), 320)
        hovers: list[_Hover] = []
        for line in lines:
            tint = colour(line.colour)
            begin = [(0.0, start)] if start is not None else []
            xs, ys = zip(*begin, *((p.x[0], p.y[0]) for p in line.points))
            axes.plot(xs, ys, color=tint, linewidth=1.4, zorder=3, label=line.label)
            for p in line.points:
                axes.plot([max(0.0, p.x[1]), p.x[2]], [p.y[0], p.y[0]], color=tint, linewidth=1.6, alpha=0.55, zorder=2)
                axes.plot([p.x[0], p.x[0]], [p.y[1], p.y[2]], color=tint, linewidth=1.6, alpha=0.55, zorder=2)
                axes.plot([p.x[0]], [p.y[0]], "o", color=tint, markersize=5.5, zorder=4)
                hovers.append(_Hover(p.x[0], p.y[0], f"{line.label} {p.name} · {_span(p.x)} · {_span(p.y)}"))
        if start is not None:
            axes.plot([0], [start], "o", color=colour(0), markersize=7, zorder=5)
        axes.set_xscale("function", functions=(_root, numpy.square))
        furthest = max((p.x[2] for line in lines for p in line.points), default=1.0)
        axes.set_xlim(0, furthest * 1.05)
        axes.set_xticks([x for x in _ROOT_TICKS if furthest / 400 <= x <= furthest])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False, labelcolor=INK, loc="best")
        return _svg(figure, axes, hovers, about or ", ".join(line.label for line in lines))


def _root(x: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """The square root, 0 for negative values, which matplotlib passes as well."""
    roots: NDArray[numpy.float64] = numpy.sqrt(numpy.clip(x, 0, None))
    return roots


def _span(figure: tuple[float, float, float]) -> str:
    return f"{figure[0]:.3g} ({figure[1]:.3g} to {figure[2]:.3g})"


def reliability(bins: Sequence[Mapping[str, float]], about: str = "") -> Markup:
    """Calibration of a reward model: accuracy against stated confidence, with intervals. On the dotted line the two agree."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(WIDTH, 250)
        axes.plot([0.5, 1], [0.5, 1], color=SOFT, linestyle=":", linewidth=1.2, zorder=1)
        for bucket in bins:
            axes.plot(
                [bucket["said"]] * 2, [bucket["low"], bucket["high"]], color=colour(1), linewidth=1.6, alpha=0.55, zorder=2
            )
        axes.plot(
            [b["said"] for b in bins], [b["right"] for b in bins], "-o", color=colour(1), linewidth=1.6, markersize=5, zorder=3
        )
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("says it is right, share")
        axes.set_ylabel("is right, share")
        hovers = [
            _Hover(b["said"], b["right"], f"says {b['said']:.0%}, right {b['right']:.0%} of {b['n']:,.0f} pairs") for b in bins
        ]
        return _svg(figure, axes, hovers, ": ".join(filter(None, (about, "reliability"))))


def _label_points(axes: Any, at: dict[str, tuple[float, float]], points: Sequence[Point], base: str) -> None:
    """Label the points, on the left side for points far right. Labels that would overlap move up."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for name in (base, *(p.name for p in points if len(points) <= MOST_NAMED)):
        x, y = (at[name][0] - low) / (high - low), (at[name][1] - bottom) / (top - bottom)
        while any(abs(x - other_x) < 0.3 and abs(y - level) < 0.075 for other_x, level in placed):
            y += 0.08
        placed.append((x, y))
        right = x > 0.72
        offset = -9 if right else 9
        position = (low + x * (high - low), bottom + y * (top - bottom))
        axes.annotate(
            name, position, xytext=(offset, 8), textcoords="offset points", color=INK, ha="right" if right else "left",
            va="center", fontsize=11.5, fontweight="bold", annotation_clip=False, zorder=6,
        )  # fmt: skip


def _point_words(point: Point, labels: Sequence[str]) -> str:
    gain, cost = (f"{v:+.3g} ({low:+.3g} to {high:+.3g})" for v, low, high in (point.gain, point.capability))
    return f"{point.name} · gain, {labels[0]}: {gain} · capability, {labels[1]}: {cost}"


def _figure(width: int, height: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(True, color=LINE, linewidth=0.8, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    return figure, axes


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Reduce a series to at most MOST_POINTS points by averaging equal runs of steps."""
    size = -(-len(xs) // MOST_POINTS)
    if size <= 1:
        return list(xs), list(ys)
    runs = [slice(i, i + size) for i in range(0, len(xs), size)]
    return [xs[r][-1] for r in runs], [sum(ys[r]) / len(ys[r]) for r in runs]


def _noisy(ys: Sequence[float]) -> bool:
    """Whether a line changes direction so often that a running mean helps: true for a loss, false for a learning rate."""
    steps = [b - a for a, b in itertools.pairwise(ys)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(steps))
    return len(ys) >= 30 and turns > len(ys) / 5


def _running_mean(ys: Sequence[float], window: int) -> list[float]:
    half = window // 2
    parts = [ys[max(0, i - half) : i + half + 1] for i in range(len(ys))]
    return [sum(part) / len(part) for part in parts]


def _svg(figure: Figure, axes: Any, hovers: Sequence[_Hover], about: str, *, radius: float = 7) -> Markup:
    """The drawing as inline SVG with the page's colours and fonts, and with hover texts."""
    target = io.StringIO()
    with warnings.catch_warnings():
        # The page's fonts draw the text, so glyphs missing in matplotlib's font do not matter.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    width, height = (round(size * 72) for size in figure.get_size_inches())
    positions = axes.transData.transform([(h.x, h.y) for h in hovers]) if hovers else []
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="{radius:g}"><title>{escape(hover.text)}</title></circle>'
        for (x, y), hover in zip(positions, hovers)
    )
    return Markup(_inline(target.getvalue(), dots, about, width, height))


def _inline(svg: str, dots: str, about: str, width: int, height: int) -> str:
    inner = svg[svg.index("<svg") :]
    inner = inner[inner.index(">") + 1 : inner.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    inner = re.sub(r"(?<=font: )([^;\"]*?px) [^;\"]*", r"\1 var(--font)", inner)
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    inner = re.sub(r"#0f0f[01][0-9]", lambda match: _THEME[match[0]], inner)
    inner = re.sub(r"<[^>]*>", lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), inner)  # coordinates, not labels
    mark = hashlib.sha256((about + inner).encode()).hexdigest()[:6]  # ids must be unique among all drawings of a page
    inner = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{mark}", inner)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    label = escape(about)
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{inner}'
        f'<g class="hover">{dots}</g></svg>'
    )

"""The pipeline as an SVG picture: the base, every stage with its parent, and its data.

Input: recipe and manifests. Wide pages show columns from left to right. Narrow pages, and chains longer than four stages, show
rows with the branches in a gutter, like a version history.
"""

from typing import Any, NamedTuple

from markupsafe import Markup

from posttrain.report import formatting
from posttrain.report.markup import el, join, section
from posttrain.report.run import RunRecord, StageRecord

_WIDE, _GAP, _HIGH, _LINE = 214, 60, 74, 17
_DEEPEST = 4
_NARROW, _STEP = 360, 20
_TRACK = 16


class Node(NamedTuple):
    """A box: the base or a stage. `inputs` are its other input policies as (role, name)."""

    name: str
    kind: str
    parent: str | None
    depth: int
    lane: int
    inputs: tuple[tuple[str, str], ...]
    work: str
    mark: str
    data: tuple[tuple[str, str], ...]
    state: str


def picture(run: RunRecord) -> Markup:
    """The section with the picture."""
    nodes = nodes_of(run)
    about = "; ".join(f"{n.name} ({n.kind}) from {n.parent}" if n.parent else f"base {n.name}" for n in nodes)
    down = _down(nodes, about)
    deep = max(n.depth for n in nodes) > _DEEPEST
    figures = (
        [el("figure.flow.any", down)]
        if deep
        else [el("figure.flow.across", _across(nodes, about)), el("figure.flow.down", down)]
    )
    lead = (
        "Each box is an artifact with the fingerprint of all its inputs. Solid arrow: the policy that training started from; "
        "dashed: other inputs."
    )
    return section("pipeline", "Pipeline", *figures, lead=lead)


def nodes_of(run: RunRecord) -> list[Node]:
    """The base and all stages in the recipe's order. No two share depth and lane."""
    manifests: list[dict[str, Any]] = [s.manifest for s in run.stages if s.manifest] + [p.manifest for p in run.policies]
    base = manifests[0].get("base", {}) if manifests else {}
    nodes = [Node(run.base, "base", None, 0, 0, (), "", str(base.get("weights_hash", ""))[:16], (), "finished")]
    nodes_by_name = {"base": nodes[0]}
    occupied = {(0, 0)}
    for stage in run.stages:
        parent = nodes_by_name.get(stage.init, nodes[0])
        depth, lane = parent.depth + 1, parent.lane
        while (depth, lane) in occupied:
            lane += 1
        occupied.add((depth, lane))
        nodes_by_name[stage.name] = _node(stage, parent, depth, lane, nodes_by_name)
        nodes.append(nodes_by_name[stage.name])
    return nodes


def _node(stage: StageRecord, parent: Node, depth: int, lane: int, nodes_by_name: dict[str, Node]) -> Node:
    manifest = stage.manifest or {}
    settings = manifest.get("settings", {}).get("stage", {})
    inputs = [
        (_role(settings, name), name) for name in manifest.get("inputs", {}) if name != stage.init and name in nodes_by_name
    ]
    work = [f"{manifest['tokens']:,} tokens"] if "tokens" in manifest else []
    work += [formatting.duration(manifest.get("seconds"))] if manifest else [stage.status]
    hashes, rows = manifest.get("data", {}), manifest.get("rows", {})
    data = []
    for path in stage.data:
        count = rows.get(path) if isinstance(rows, dict) else None
        facts = [f"{count:,} rows"] if isinstance(count, int) else []
        facts += [str(hashes[path])[:12]] if isinstance(hashes, dict) and path in hashes else []
        data.append((path, " · ".join(facts) or "not read yet"))
    return Node(stage.name, stage.kind, parent.name if parent.depth else "base", depth, lane, tuple(inputs), " · ".join(work),
                str(manifest.get("fingerprint", "")), tuple(data), stage.status)  # fmt: skip


def _role(settings: dict[str, Any], name: str) -> str:
    """The role of an input: the setting that names it."""
    return next((key for key, value in settings.items() if key not in ("init", "name") and name in _strings(value)), "input")


def _strings(value: Any) -> set[str]:
    """All strings in a setting, which may be a list of tables."""
    if isinstance(value, dict):
        return _strings(list(value.values()))
    if isinstance(value, list):
        return set().union(*map(_strings, value))
    return {value} if isinstance(value, str) else set()


# --- from left to right ---


def _across(nodes: list[Node], about: str) -> Markup:
    count = 1 + max(n.lane for n in nodes)
    lanes = [max(_box_height(n) + _data_height(n) for n in nodes if n.lane == lane) for lane in range(count)]
    above = 40 if any(n.inputs for n in nodes) else 6
    tops = [above + sum(high + 34 for high in lanes[:lane]) for lane in range(len(lanes))]
    at = {n.name if n.depth else "base": (4 + n.depth * (_WIDE + _GAP), tops[n.lane]) for n in nodes}
    # Dashed arrows from stages above run to the right of the boxes, each in its own track.
    margin = _TRACK * (1 + max(len(n.inputs) for n in nodes)) if any(n.inputs for n in nodes) else 0
    width = 8 + (1 + max(n.depth for n in nodes)) * _WIDE + max(n.depth for n in nodes) * _GAP + margin
    height = tops[-1] + lanes[-1] + 12
    parts: list[Markup] = []
    for n in nodes:
        x, y = at[n.name if n.depth else "base"]
        if n.parent:
            parts += _from_left(at[n.parent], (x, y))
        for number, (_, name) in enumerate(n.inputs):
            parts += _input_arrow(at[name], (x, y), number)
        parts += _box(n, x, y)
        parts += _data_box(n, x, y)
    return _svg("across", width, height, parts, about)


def _from_left(start: tuple[float, float], end: tuple[float, float]) -> list[Markup]:
    """The arrow from the policy that training started from."""
    x, y = start[0] + _WIDE, start[1] + _HIGH / 2
    to, level = end[0] - 7, end[1] + _HIGH / 2
    return [_edge(f"M{x:g} {y:g} C{x + 34:g} {y:g} {to - 27:g} {level:g} {to:g} {level:g}"), _tip(end[0], level, "right")]


def _input_arrow(start: tuple[float, float], end: tuple[float, float], number: int) -> list[Markup]:
    """The dashed arrow from another input policy: over the boxes, or to the right of them within one column.

    Its role is written in the target box, because a label on a line is hard to read.
    """
    (px, py), (x, y) = start, end
    if px >= x:
        a, b = py + _HIGH * 0.75, y + 16 + 13 * number
        out = max(px, x) + _WIDE + _TRACK * (number + 1)
        down = f"M{px + _WIDE:g} {a:g} H{out - 8:g} Q{out:g} {a:g} {out:g} {a + 8:g} V{b - 8:g}"
        back = f"Q{out:g} {b:g} {out - 8:g} {b:g} H{x + _WIDE + 7:g}"
        return [_edge(f"{down} {back}", "dashed"), _tip(x + _WIDE, b, "left")]
    a, b, high = px + _WIDE * 0.7, x + _WIDE * 0.4, min(py, y) - 34
    path = f"M{a:g} {py:g} C{a + 30:g} {high:g} {b - 30:g} {high:g} {b:g} {y - 7:g}"
    return [_edge(path, "dashed"), _tip(b, y, "down")]


def _box_height(node: Node) -> int:
    """The height of a box, with one line per input."""
    return _HIGH + _LINE * len(node.inputs)


def _data_height(node: Node) -> int:
    return 24 + 12 + 2 * _LINE * len(node.data) if node.data else 0


def _box(n: Node, x: float, y: float) -> list[Markup]:
    state = "" if n.state == "finished" else ".undone"
    return [
        el(
            f"rect.box{'.root' if not n.depth else ''}{state}",
            attrs={"x": x, "y": y, "width": _WIDE, "height": _box_height(n), "rx": 9},
        ),
        _text(x + 13, y + 25, formatting.shorten(n.name, _name_letters(n)), "t.strong", title=n.name),
        _text(x + _WIDE - 12, y + 25, _kind(n), "t.soft.end"),
        _text(x + 13, y + 44, n.work or "base, frozen", "t.soft"),
        _text(x + 13, y + 62, n.mark, "t.mono"),
        *(_text(x + 13, y + 62 + _LINE * k, _input_words(source), "t.soft") for k, source in enumerate(n.inputs, 1)),
    ]


def _input_words(source: tuple[str, str]) -> str:
    role, name = source
    return formatting.shorten(f"{role}: {name}", 28)


def _kind(n: Node) -> str:
    """The kind in the corner of a box; the base shows it in the line below."""
    return formatting.shorten(n.kind, 10) if n.depth else ""


def _name_letters(n: Node) -> int:
    """How many letters of a name fit beside the kind."""
    return int((_WIDE - 30 - 7.5 * len(_kind(n))) / 10.4)


def _data_box(n: Node, x: float, y: float) -> list[Markup]:
    if not n.data:
        return []
    bottom = y + _box_height(n)
    top, high = bottom + 24, 12 + 2 * _LINE * len(n.data)
    parts = [
        _edge(f"M{x + _WIDE / 2:g} {top} V{bottom + 7}"),
        _tip(x + _WIDE / 2, bottom, "up"),
        el("rect.box.data", attrs={"x": x, "y": top, "width": _WIDE, "height": high, "rx": 9}),
    ]
    for i, (path, description) in enumerate(n.data):
        line = top + 20 + 2 * _LINE * i
        parts += [
            _text(x + 13, line, formatting.shorten(path, 26), "t", title=path),
            _text(x + 13, line + _LINE - 1, description, "t.soft"),
        ]
    return parts


# --- from top to bottom ---


def _down(nodes: list[Node], about: str) -> Markup:
    lanes = _gutter(nodes)
    left = 14 + _STEP * (1 + max(lanes.values()))
    at: dict[str, tuple[float, float]] = {}
    parts, edges = [], []
    y = 4.0
    for n in nodes:
        key = n.name if n.depth else "base"
        lines = _lines(n)
        high = 36 + _LINE * len(lines)
        at[key] = (14.0 + _STEP * lanes[key], y + 20)
        state = "" if n.state == "finished" else ".undone"
        root = ".root" if not n.depth else ""
        parts.append(
            el(f"rect.box{root}{state}", attrs={"x": left, "y": y, "width": _NARROW - left - 4, "height": high, "rx": 9})
        )
        parts.append(_text(left + 12, y + 24, formatting.shorten(n.name, 22), "t.strong", title=n.name))
        parts.append(_text(_NARROW - 16, y + 24, _kind(n), "t.soft.end"))
        parts += [
            _text(left + 12, y + 43 + _LINE * i, text, kind, title=full_text) for i, (text, kind, full_text) in enumerate(lines)
        ]
        if n.parent:
            (px, py), (x, to) = at[n.parent], at[key]
            path = f"M{px} {py} V{to}" if px == x else f"M{px} {py} C{px} {py + 26} {x} {py + 12} {x} {py + 40} V{to}"
            edges.append(_edge(path))
        y += high + 12
    dots = [el(f"circle.dot{'' if n.state == 'finished' else '.undone'}", attrs={"cx": at[k][0], "cy": at[k][1], "r": 5.5})
            for n in nodes for k in (n.name if n.depth else "base",)]  # fmt: skip
    return _svg("down", _NARROW, y - 6, [*edges, *dots, *parts], about)


def _gutter(nodes: list[Node]) -> dict[str, int]:
    """The lane of every stage. The first child continues its parent's lane; other children get new lanes."""
    lanes, continued, width = {"base": 0}, set(), 0
    for n in nodes[1:]:
        parent = n.parent or "base"
        if parent not in continued:
            continued.add(parent)
            lanes[n.name] = lanes[parent]
        else:
            width += 1
            lanes[n.name] = width
    return lanes


def _lines(n: Node) -> list[tuple[str, str, str]]:
    """Text, class and full text of the lines below a name."""
    lines = [(n.work or "base, frozen", "t.soft", "")]
    lines += [(_input_words(source), "t.soft", "") for source in n.inputs]
    for path, description in n.data:
        lines += [(formatting.shorten(path, 40), "t", path)] + ([(description, "t.soft", "")] if description else [])
    return [*lines, (n.mark, "t.mono", "")] if n.mark else lines


# --- pieces ---


def _svg(kind: str, width: float, height: float, parts: list[Markup], about: str) -> Markup:
    attrs = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": about, "style": f"max-width:{width:g}px"}
    return el(f"svg.picture.{kind}", join(parts), attrs=attrs)


def _text(x: float, y: float, text: str, kind: str, *, title: str = "") -> Markup:
    children = [text, el("title", title)] if title and title != text else [text]
    return el(f"text.{kind}", *children, attrs={"x": f"{x:g}", "y": f"{y:g}"})


def _edge(path: str, kind: str = "solid") -> Markup:
    return el(f"path.edge.{kind}", attrs={"d": path})


def _tip(x: float, y: float, direction: str) -> Markup:
    """The head of an arrow."""
    shapes = {"right": "M{x} {y} l-8 -4.5 v9 z", "left": "M{x} {y} l8 -4.5 v9 z"}
    shapes |= {"down": "M{x} {y} l-4.5 -8 h9 z", "up": "M{x} {y} l-4.5 8 h9 z"}
    return el("path.tip", attrs={"d": shapes[direction].format(x=f"{x:g}", y=f"{y:g}")})

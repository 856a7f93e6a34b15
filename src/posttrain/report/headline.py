"""The head of the report: every significant loss, then a summary of gains and losses against the base.

    losses = the last stage against its parent and against the base, then every other stage against its parent (evaluate/tax.py)
    gained = measures of role "gain" whose paired change against the base is better
    cost   = measures of role "capability" whose paired change against the base is worse

All statements come from the verdicts of the scorecard. Without a significant loss, the summary gives the largest loss that the
interval does not exclude. Not included: one number for all measures.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from posttrain.evaluate.damage import signs_of_damage
from posttrain.evaluate.table import damage_words, gain_words
from posttrain.evaluate.tax import parent_of, shown_losses
from posttrain.report import formatting
from posttrain.report.markup import el, facts, join
from posttrain.report.run import RunRecord

MAX_TILES = 6
_LISTED = 2


class MeasureChange(NamedTuple):
    """One measure of the last policy and its change against the base."""

    entry: dict[str, Any]
    change: dict[str, Any]

    @property
    def size(self) -> Markup:
        """The absolute change: `31.7 points in instructions followed [23.4 to 39.7]`."""
        low, high = sorted((abs(self.change["low"]), abs(self.change["high"])))
        return self._markup(
            formatting.number(abs(self.change["value"]), self._unit), formatting.span({"low": low, "high": high}, self._unit)
        )

    @property
    def signed(self) -> Markup:
        """The signed change, for one that is not significant: `+1.1 points in facts [−3.0 to +5.2]`."""
        return self._markup(
            formatting.signed(self.change["value"], self._unit), formatting.signed_span(self.change, self._unit)
        )

    @property
    def _unit(self) -> str:
        return str(self.entry["unit"])

    def _markup(self, size: str, span: str) -> Markup:
        strong = el("strong", f"{size} {formatting.unit_word(self._unit)}")
        return join([strong, f" in {self.entry['title']} ", el("span.ci", f"[{span}]")])


def headline(run: RunRecord) -> Markup:
    """Name, losses, summary, tiles and facts of the run."""
    return el(
        "header",
        el("p.eyebrow", "posttrain report"),
        el("h1", run.name),
        _damage(run),
        _losses(run),
        el("p.verdict", *_sentence(run)),
        *(el("p.also", gain_words(gain)) for gain in run.scorecard.get("gains", ())),
        _other_gains(run),
        _notes(run),
        _tiles(run),
        _run_facts(run),
    )


def _losses(run: RunRecord) -> Markup:
    """Every significant loss, one line per comparison, or a statement that there is none."""
    stages = run.scorecard["stages"]
    if len(stages) == 1:
        return Markup("")
    lines = [el("li", *_loss_line(row)) for row in shown_losses(stages)]
    if lines:
        return el("div.losses", el("p.small", "Significant losses"), el("ul", *lines))
    last, base = stages[-1]["name"], stages[0]["name"]
    return el("p.also", f"No loss is shown of any stage against its parent, or of {last} against {base}.")


def _loss_line(row: Mapping[str, Any]) -> list[Markup | str]:
    parent = ", its parent" if row["is_parent"] else ""
    parts: list[Markup | str] = [el("strong", row["stage"]), " against ", el("strong", row["against"]), f"{parent}: "]
    for number, measure in enumerate(row["measures"].values()):
        unit = measure["unit"]
        size = el("strong", f"{formatting.signed(measure['value'], unit)} {formatting.unit_word(unit)}")
        span = el("span.ci", f"[{formatting.signed_span(measure, unit)}]")
        parts += ["; " * (number > 0), f"{formatting.MARKS['worse']} {measure['title']} ", size, " ", span]
    return parts


def changes(run: RunRecord) -> list[MeasureChange]:
    """Every measure of the last policy with a change against the base."""
    stages = run.scorecard["stages"]
    measure_changes = []
    for entry in stages[-1]["measures"].values():
        change = formatting.change_against(entry, stages[0]["name"])
        if change is not None:
            measure_changes.append(MeasureChange(entry, change))
    return measure_changes


def _with_verdict(run: RunRecord, role: str, verdict: str) -> list[MeasureChange]:
    return [c for c in changes(run) if c.entry.get("role") == role and c.change["verdict"] == verdict]


def _sentence(run: RunRecord) -> list[Markup | str]:
    stages = run.scorecard["stages"]
    if len(stages) == 1:
        return [el("strong", run.base), " was evaluated; no stage has been evaluated yet."]
    who: list[Markup | str] = [el("strong", run.base), ", taken through ", el("strong", _path(run)), ", "]
    bought, lost = _with_verdict(run, "gain", "better"), _with_verdict(run, "capability", "worse")
    gained = ["gained ", _list(bought), f" against {stages[0]['name']}"] if bought else _no_gain(run)
    return [*who, *gained, *_cost(run, lost)]


def _no_gain(run: RunRecord) -> list[Markup | str]:
    gain = next((c for c in changes(run) if c.entry.get("role") == "gain"), None)
    return ["is not shown to have gained anything: ", gain.signed] if gain is not None else ["was not measured for a gain"]


def _cost(run: RunRecord, lost: list[MeasureChange]) -> list[Markup | str]:
    if lost:
        return [", and lost ", _list(lost), "."]
    capability = next((c for c in changes(run) if c.entry.get("role") == "capability"), None)
    if capability is None:
        return [". Its cost was not measured."]
    last, base = run.scorecard["stages"][-1], run.scorecard["stages"][0]["name"]
    parent = parent_of(last, base)
    if any(formatting.is_worse(e, parent) for e in last["measures"].values() if e.get("role") == "capability"):
        return [f". It lost some of the capability that {parent} had (above)."]
    if capability.change["verdict"] == "better":
        return [", and lost no capability: it gained ", capability.size, " too."]
    ends = [capability.change["low"], capability.change["high"]]
    # With few items, "not shown" is weak evidence, so give the largest loss that the interval allows.
    worst = max(-end if capability.entry["better"] == "higher" else end for end in ends)
    unit = capability.entry["unit"]
    left_open = (
        f"; a loss of up to {formatting.number(worst, unit)} {formatting.unit_word(unit)} is not excluded."
        if worst > 0
        else "."
    )
    return [f". No loss of capability is shown against {base}: ", capability.signed, left_open]


def _list(measure_changes: list[MeasureChange]) -> Markup:
    shown = [c.size for c in measure_changes[:_LISTED]]
    if len(measure_changes) > _LISTED:
        shown.append(
            Markup("{} more measure{}").format(
                len(measure_changes) - _LISTED, "s" if len(measure_changes) > _LISTED + 1 else ""
            )
        )
    head = Markup(", ").join(shown[:-1])
    return Markup("{} and {}").format(head, shown[-1]) if len(shown) > 1 else shown[0]


def _path(run: RunRecord) -> str:
    """The stages from the base to the last policy."""
    parents = {stage["name"]: stage.get("parent") for stage in run.scorecard["stages"]}
    name, path = run.scorecard["stages"][-1]["name"], []
    while name and name != run.scorecard["stages"][0]["name"] and name not in path:
        path.append(name)
        name = parents.get(name)
    return " → ".join(reversed(path))


def _other_gains(run: RunRecord) -> Markup:
    """Other measures that are better than the base, unless the parent was better still."""
    base, last = run.scorecard["stages"][0]["name"], run.scorecard["stages"][-1]
    better = [c for c in _with_verdict(run, "", "better") if c.entry["unit"] != "tokens"]
    better = [c for c in better if not formatting.is_worse(c.entry, parent_of(last, base))]
    parts = [f"Also better against {base}: ", _list(better), ". "] if better else []
    if not changes(run):
        return Markup("")
    how = "Changes are paired over the same items; [brackets] hold the 95\u202f% interval. The scorecard lists every stage."
    return el("p.also", *parts, how)


def _notes(run: RunRecord) -> Markup:
    return el("ul.notes", *(el("li", note) for note in run.notes)) if run.notes else Markup("")


def _damage(run: RunRecord) -> Markup:
    rows = signs_of_damage(run.scorecard["stages"])
    return el("ul.notes", *(el("li", damage_words(row)) for row in rows)) if rows else Markup("")


def _tiles(run: RunRecord) -> Markup:
    """The last stage's measures, losses first, each with the values of base and parent and both changes."""
    stages = run.scorecard["stages"]
    last, base = stages[-1], stages[0]["name"]
    names = _tile_names(last["measures"], _lost_measures(stages))
    before = list(dict.fromkeys((base, parent_of(last, base)))) if last["name"] != base else []
    measures = {stage["name"]: stage["measures"] for stage in stages}
    tiles = [_tile({b: measures.get(b, {}).get(name) for b in before}, last["measures"][name]) for name in names]
    return el("div.tiles", *tiles) if tiles else Markup("")


def _lost_measures(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Measures with a significant loss of the last stage, against its parent first."""
    rows = [row for row in shown_losses(stages) if row["stage"] == stages[-1]["name"]]
    return list(dict.fromkeys(name for row in rows for name in row["measures"]))


def _tile_names(measures: Mapping[str, Any], lost: Sequence[str]) -> list[str]:
    """All measures with a loss; then gains, neutral measures and the first capability, up to MAX_TILES."""
    gains = [name for name, e in measures.items() if e.get("role") == "gain"]
    neutral = [name for name, e in measures.items() if not e.get("role") and e["unit"] == "share"]
    capability = [name for name, e in measures.items() if e.get("role") == "capability"]
    usual = [*gains[:2], *neutral[:2], *capability[:1], *[n for n in capability if measures[n]["unit"] != "share"]]
    return list(dict.fromkeys([*lost, *usual]))[: max(MAX_TILES, len(lost))]


def _tile(before: Mapping[str, Mapping[str, Any] | None], entry: Mapping[str, Any]) -> Markup:
    """`before` holds the entries of the base and the parent by name. A tile is green only without a loss."""
    unit = entry["unit"]
    changes = {
        name: change for name in reversed(list(before)) if (change := formatting.change_against(entry, name)) is not None
    }
    was = [
        el("span.was", formatting.measured(earlier["value"], unit), el("span.to", "→"), attrs={"title": name})
        for name, earlier in before.items() if earlier is not None and name in changes
    ]  # fmt: skip
    marks = [el("p.against", verdict_badge(change, unit), el("span.small", f"vs {name}")) for name, change in changes.items()]
    value = el("p.value", *was, el("span.now", formatting.measured(entry["value"], unit)))
    return el(_tile_class(changes), el("p.what", entry["title"]), value, *(marks or [el("p", formatting.span(entry, unit))]))


def _tile_class(changes: Mapping[str, Mapping[str, Any]]) -> str:
    verdicts = {change["verdict"] for change in changes.values()}
    kind = next((kind for kind in ("worse", "better") if kind in verdicts), "")
    return f"div.tile.{kind}" if kind else "div.tile"


def verdict_badge(change: Mapping[str, Any], unit: str) -> Markup:
    """`▲ better +36.0`: the verdict as sign, word and colour."""
    kind = change["verdict"].replace(" ", "-")
    text = f"{formatting.MARKS.get(change['verdict'], '')} {change['verdict']} {formatting.signed(change['value'], unit)}"
    about = f"{formatting.change_words(change, unit)}; 95 % interval of the paired change"
    return el(f"span.badge.{kind}", text, attrs={"title": about})


def _run_facts(run: RunRecord) -> Markup:
    manifests = [s.manifest for s in run.stages if s.manifest] + [p.manifest for p in run.policies]
    first = manifests[0] if manifests else {}
    adapter = _adapter(run)
    tokens = sum(m.get("tokens", 0) for m in manifests)
    seconds = sum(m.get("seconds", 0.0) for m in manifests)
    rows: list[tuple[str, str]] = [("base model", run.base)]
    rows += [("adapter", adapter)] if adapter else []
    rows += [("tokens trained", f"{tokens:,}")] if tokens else []
    rows += [("time, all stages", formatting.duration(seconds))] if manifests else []
    rows += [("device", f"{first.get('device', '–')} · {first.get('dtype', '–')}")] if manifests else []
    return facts(rows)


def _adapter(run: RunRecord) -> str:
    settings = next(
        (s.manifest["settings"].get("adapter") for s in run.stages if s.manifest and "settings" in s.manifest), None
    )
    if not isinstance(settings, dict):
        return ""
    return "every weight" if settings.get("kind") == "full" else f"LoRA, rank {settings.get('rank')}, {settings.get('targets')}"

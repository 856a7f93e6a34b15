"""The first screen: what was aligned, and what it bought and cost, said in one sentence made from the verdicts.

    bought = measures of role "gain" whose paired change against the base is better
    cost   = measures of role "capability" whose paired change against the base is worse

Where it stands: it reads the scorecard alone, so it can claim nothing that the scorecard does not show. Where nothing is
shown it says so, and how large a loss the interval leaves open. Left out: a verdict over all measures in one number.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from posttrain.report import words
from posttrain.report.markup import el, facts, join
from posttrain.report.run import Run

TILES = 6
_MANY = 2


class Change(NamedTuple):
    """One measure of the last policy and its change against the base."""

    entry: dict[str, Any]
    change: dict[str, Any]

    @property
    def size(self) -> Markup:
        """How much, whichever way: `31.7 points in instructions followed [23.4 to 39.7]`."""
        low, high = sorted((abs(self.change["low"]), abs(self.change["high"])))
        return self._told(
            words.number(abs(self.change["value"]), self._unit), words.span({"low": low, "high": high}, self._unit)
        )

    @property
    def signed(self) -> Markup:
        """With its sign, for a change that is not shown: `+1.1 points in facts [−3.0 to +5.2]`."""
        return self._told(words.signed(self.change["value"], self._unit), words.signed_span(self.change, self._unit))

    @property
    def _unit(self) -> str:
        return str(self.entry["unit"])

    def _told(self, size: str, span: str) -> Markup:
        strong = el("strong", f"{size} {words.unit_word(self._unit)}")
        return join([strong, f" in {self.entry['title']} ", el("span.ci", f"[{span}]")])


def headline(run: Run) -> Markup:
    """Name, sentence, tiles and what the run was made of."""
    return el(
        "header",
        el("p.eyebrow", "posttrain report"),
        el("h1", run.name),
        el("p.verdict", *_sentence(run)),
        _also(run),
        _notes(run),
        _tiles(run),
        _made_of(run),
    )


def changes(run: Run) -> list[Change]:
    """Every measure of the last policy that can be compared with the base."""
    stages = run.scorecard["stages"]
    found = []
    for entry in stages[-1]["measures"].values():
        change = words.change_against(entry, stages[0]["name"])
        if change is not None:
            found.append(Change(entry, change))
    return found


def _of(run: Run, role: str, verdict: str) -> list[Change]:
    return [c for c in changes(run) if c.entry.get("role") == role and c.change["verdict"] == verdict]


def _sentence(run: Run) -> list[Markup | str]:
    stages = run.scorecard["stages"]
    if len(stages) == 1:
        return [el("strong", run.base), " is measured as it is; no stage has been evaluated beside it yet."]
    who: list[Markup | str] = [el("strong", run.base), ", taken through ", el("strong", _path(run)), ", "]
    bought, lost = _of(run, "gain", "better"), _of(run, "capability", "worse")
    return [*who, *(["gained ", _list(bought)] if bought else _no_gain(run)), *_cost(run, lost)]


def _no_gain(run: Run) -> list[Markup | str]:
    gain = next((c for c in changes(run) if c.entry.get("role") == "gain"), None)
    return ["is not shown to have gained anything: ", gain.signed] if gain is not None else ["was not measured for a gain"]


def _cost(run: Run, lost: list[Change]) -> list[Markup | str]:
    if lost:
        return [", and lost ", _list(lost), "."]
    capability = next((c for c in changes(run) if c.entry.get("role") == "capability"), None)
    if capability is None:
        return [". Its cost was not measured."]
    if capability.change["verdict"] == "better":
        return [", and lost no capability: it gained ", capability.size, " too."]
    ends = [capability.change["low"], capability.change["high"]]
    # What the interval leaves open is part of the finding: "not shown" of few items is no good news.
    worst = max(-end if capability.entry["better"] == "higher" else end for end in ends)
    unit = capability.entry["unit"]
    left_open = f"; a loss of up to {words.number(worst, unit)} {words.unit_word(unit)} is not excluded." if worst > 0 else "."
    return [". No loss of capability is shown: ", capability.signed, left_open]


def _list(found: list[Change]) -> Markup:
    shown = [c.size for c in found[:_MANY]]
    if len(found) > _MANY:
        shown.append(Markup("{} more measure{}").format(len(found) - _MANY, "s" if len(found) > _MANY + 1 else ""))
    head = Markup(", ").join(shown[:-1])
    return Markup("{} and {}").format(head, shown[-1]) if len(shown) > 1 else shown[0]


def _path(run: Run) -> str:
    """The stages from the base to the last policy."""
    parents = {stage["name"]: stage.get("parent") for stage in run.scorecard["stages"]}
    name, path = run.scorecard["stages"][-1]["name"], []
    while name and name != run.scorecard["stages"][0]["name"] and name not in path:
        path.append(name)
        name = parents.get(name)
    return " → ".join(reversed(path))


def _also(run: Run) -> Markup:
    """What else is shown to have changed, outside of gain and capability; and gains that became losses."""
    worse = _of(run, "gain", "worse") + [c for c in _of(run, "", "worse") if c.entry["unit"] != "tokens"]
    better = [c for c in _of(run, "", "better") if c.entry["unit"] != "tokens"]
    parts = [join([f"Also {word}: ", _list(found), ". "]) for word, found in (("better", better), ("worse", worse)) if found]
    if not changes(run):
        return Markup("")
    how = "Changes are paired over the same items; [brackets] hold the 95\u202f% interval. Every stage stands in the scorecard."
    return el("p.also", *parts, how)


def _notes(run: Run) -> Markup:
    return el("ul.notes", *(el("li", note) for note in run.notes)) if run.notes else Markup("")


def _tiles(run: Run) -> Markup:
    first, last = run.scorecard["stages"][0], run.scorecard["stages"][-1]
    names = _tile_names(last["measures"])
    if not names:
        return Markup("")
    return el("div.tiles", *(_tile(first["measures"].get(name), last["measures"][name], first["name"]) for name in names))


def _tile_names(measures: Mapping[str, Any]) -> list[str]:
    """Gains, what neither gains nor costs, and the first capability: at most six."""
    gains = [name for name, e in measures.items() if e.get("role") == "gain"]
    others = [name for name, e in measures.items() if not e.get("role") and e["unit"] == "share"]
    capability = [name for name, e in measures.items() if e.get("role") == "capability"]
    return [*gains[:2], *others[:2], *capability[:1], *[n for n in capability if measures[n]["unit"] != "share"]][:TILES]


def _tile(before: Mapping[str, Any] | None, entry: Mapping[str, Any], base: str) -> Markup:
    unit = entry["unit"]
    change = words.change_against(entry, base)
    value = el("span.now", words.measured(entry["value"], unit))
    was = el("span.was", words.measured(before["value"], unit), el("span.to", "→")) if before is not None and change else ""
    mark = verdict_badge(change, unit) if change else el("span.badge", words.span(entry, unit))
    return el("div.tile", el("p.what", entry["title"]), el("p.value", was, value), el("p", mark))


def verdict_badge(change: Mapping[str, Any], unit: str) -> Markup:
    """`▲ better +36.0`: sign, word and colour say the same."""
    kind = change["verdict"].replace(" ", "-")
    text = f"{words.MARKS.get(change['verdict'], '')} {change['verdict']} {words.signed(change['value'], unit)}"
    about = f"{words.change_words(change, unit)}; 95 % interval of the paired change"
    return el(f"span.badge.{kind}", text, attrs={"title": about})


def _made_of(run: Run) -> Markup:
    manifests = [s.manifest for s in run.stages if s.manifest] + [p.manifest for p in run.policies]
    any_one = manifests[0] if manifests else {}
    adapter = _adapter(run)
    tokens = sum(m.get("tokens", 0) for m in manifests)
    seconds = sum(m.get("seconds", 0.0) for m in manifests)
    rows: list[tuple[str, str]] = [("base model", run.base)]
    rows += [("adapter", adapter)] if adapter else []
    rows += [("tokens trained", f"{tokens:,}")] if tokens else []
    rows += [("time, all stages", words.duration(seconds))] if manifests else []
    rows += [("device", f"{any_one.get('device', '–')} · {any_one.get('dtype', '–')}")] if manifests else []
    return facts(rows)


def _adapter(run: Run) -> str:
    settings = next(
        (s.manifest["settings"].get("adapter") for s in run.stages if s.manifest and "settings" in s.manifest), None
    )
    if not isinstance(settings, dict):
        return ""
    return "every weight" if settings.get("kind") == "full" else f"LoRA, rank {settings.get('rank')}, {settings.get('targets')}"

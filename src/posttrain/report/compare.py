"""`posttrain compare A B`: two policies on the items that both answered, measure by measure, and what that adds up to.

    change   = B − A over the same items, with its 95 % interval (evaluate/stats.py)
    loss     = a change of A to B whose verdict is "worse", length left out; told first

    verdict  = B dominates A   something is shown better and nothing worse (or the other way round)
               trade-off       something is better and something is worse
               not shown to differ

Where it stands: scores.jsonl of two evaluations in, of one run or of two. They are refused where a change would not mean
what it says: other texts under the same item, other limits of an answer's length, other definitions of a measure.
Left out of the Pareto verdict: length, which leans one way only because a measure has to. Left out altogether: measures
counted in tokens where the two bases cut text into different ones; a correction for many comparisons.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import read_manifest, verify_files
from posttrain.errors import ArtifactError
from posttrain.evaluate import stats
from posttrain.evaluate.scorecard import load_scores, measure_values
from posttrain.evaluate.suites import Measure
from posttrain.records import Score
from posttrain.report import formatting
from posttrain.report.run import EVALUATIONS, read_recipe, read_scorecard, stage_names

# Settings of an evaluation that change what an answer can be.
_SAME = ("max_new_tokens", "code")
Key = tuple[str, str]


class _Side(NamedTuple):
    """One of the two: its evaluation, its scores, and how its run defines the measures."""

    name: str
    manifest: dict[str, Any]
    scores: dict[Key, Score]
    measures: dict[str, Measure]


def compare(a: Path, b: Path) -> tuple[dict[str, Any], str]:
    """Paired comparison of two stages (`RUN/STAGE`, `RUN/base`; a run is its last stage): data and text.

    Raises ArtifactError where one was not evaluated, they share no items, or their evaluations do not mean the same.
    """
    before, after = _side(a), _side(b)
    notes = _check(before, after)
    rows = {name: row for name in before.measures if name in after.measures and (row := _row(name, before, after)) is not None}
    if not rows:
        raise ArtifactError(f"{before.name} and {after.name}", "no measure in common", do="evaluate both on the same suites")
    verdict = _pareto(rows.values())
    shared = len(before.scores.keys() & after.scores.keys())
    losses = [name for name, row in rows.items() if row["change"]["verdict"] == "worse" and row["unit"] != "tokens"]
    found = {
        "a": before.name, "b": after.name, "items": shared, "losses": losses, "measures": rows, "verdict": verdict,
        "notes": notes,
    }  # fmt: skip
    return found, _text(found)


def _side(path: Path) -> _Side:
    """Raises ArtifactError where the path is no evaluated stage of a run."""
    whole = (path / "recipe.toml").is_file()
    run = path if whole else path.parent
    names = ["base", *stage_names(read_recipe(run)[0])]
    scored = [name for name in names if read_manifest(run / EVALUATIONS / name) is not None]
    allowed = f"there is: {', '.join(scored)}" if scored else ""
    if not scored or not (whole or path.name in scored):
        raise ArtifactError(str(path), "not evaluated", allowed=allowed, do="run the recipe first")
    name = scored[-1] if whole else path.name
    folder = run / EVALUATIONS / name
    manifest = read_manifest(folder)
    assert manifest is not None, "it was among the scored"
    verify_files(folder, ("scores.jsonl",))
    scores = {(s.task, s.item): s for s in load_scores(folder / "scores.jsonl")}
    return _Side(str(run / name), manifest, scores, _measures(run))


def _measures(run: Path) -> dict[str, Measure]:
    """The measures of a run's suites as its scorecard defines them, in its order."""
    found: dict[str, Measure] = {}
    for stage in read_scorecard(run)["stages"]:
        for name, e in stage["measures"].items():
            if "tasks" not in e or "of" not in e:
                path = run / "scorecard.json"
                raise ArtifactError(
                    str(path), f"does not say what {name} averages", do=f"remove {path} and run the recipe again"
                )
            found.setdefault(
                name, Measure(name, tuple(e["tasks"]), e["of"], e["unit"], e["better"], e.get("role", ""), e["title"])
            )
    return found


def _check(a: _Side, b: _Side) -> list[str]:
    """Refuse what cannot be compared; returns what a reader must know of the rest."""
    where = f"{a.name} and {b.name}"
    shared = a.scores.keys() & b.scores.keys()
    if not shared:
        raise ArtifactError(where, "no items in common", do="evaluate both on the same suites")
    settings, others = a.manifest.get("settings", {}), b.manifest.get("settings", {})
    for key in _SAME:
        if settings.get(key) != others.get(key):
            found = f"evaluated with {key} = {settings.get(key)} and {others.get(key)}"
            raise ArtifactError(where, found, allowed="the same for both", do="evaluate both with the same recipe")
    changed = sorted(key for key in shared if a.scores[key].prompt != b.scores[key].prompt)
    if changed:
        found = f"{len(changed)} items ask something else, the first is {changed[0][1]} of {changed[0][0]}"
        raise ArtifactError(where, found, allowed="the same text under the same item", do="evaluate both on the same suites")
    for name in a.measures.keys() & b.measures.keys():
        if _definition(a.measures[name]) != _definition(b.measures[name]):
            raise ArtifactError(where, f"the suites define {name} differently", do="evaluate both on the same suites")
    notes = []
    if settings.get("suites") != others.get("suites"):
        notes.append(f"The suites differ; compared are the {len(shared)} items of both. Rules that score may differ too.")
    if not _same_tokens(a, b):
        notes.append("The bases cut text into different tokens: measures counted in tokens are left out.")
    return notes


def _definition(measure: Measure) -> tuple[object, ...]:
    return measure.tasks, measure.of, measure.unit, measure.better


def _same_tokens(a: _Side, b: _Side) -> bool:
    return bool(a.manifest.get("base", {}).get("tokenizer_hash") == b.manifest.get("base", {}).get("tokenizer_hash"))


def _row(name: str, a: _Side, b: _Side) -> dict[str, Any] | None:
    """One measure over the shared items; None where there are none, or where the numbers do not mean the same."""
    measure = b.measures[name]
    if measure.unit != "share" and not _same_tokens(a, b):
        return None
    before, after = (measure_values(measure, list(side.scores.values())) for side in (a, b))
    shared = [key for key in before if key in after]
    if not shared:
        return None
    values = [before[key] for key in shared], [after[key] for key in shared]
    change = stats.difference(*values, measure.unit)
    return {
        "title": measure.title, "unit": measure.unit, "better": measure.better, "role": measure.role, "n": len(shared),
        "a": _interval(stats.interval(values[0], measure.unit)), "b": _interval(stats.interval(values[1], measure.unit)),
        "change": {**_interval(change), "verdict": stats.verdict(change, measure.better, measure.unit)},
    }  # fmt: skip


def _interval(found: stats.Interval) -> dict[str, float]:
    return {"value": round(found.value, 6), "low": round(found.low, 6), "high": round(found.high, 6)}


def _pareto(rows: Iterable[Mapping[str, Any]]) -> str:
    verdicts = {row["change"]["verdict"] for row in rows if row["unit"] != "tokens"}
    if {"better", "worse"} <= verdicts:
        return "trade-off"
    if "better" in verdicts:
        return "B dominates A"
    return "A dominates B" if "worse" in verdicts else "not shown to differ"


def _losses(found: Mapping[str, Any]) -> list[str]:
    rows = [found["measures"][name] for name in found["losses"]]
    told = [f"▼ {row['title']} {formatting.change_words(row['change'], row['unit'])}" for row in rows]
    return [f"B lost against A: {'; '.join(told)}", ""] if told else []


_MEANING = {
    "B dominates A": "at least one measure is shown better, none worse",
    "A dominates B": "at least one measure is shown worse, none better",
    "trade-off": "B is better in some measures and worse in others",
    "not shown to differ": "every interval of a change includes 0",
}


def _text(found: Mapping[str, Any]) -> str:
    cells = [("", "A", "95 %", "B", "95 %", "B − A", "95 %", "verdict", "items")]
    for row in found["measures"].values():
        unit, change = row["unit"], row["change"]
        arrow = "↑" if row["better"] == "higher" else "↓"
        cells.append((
            f"{row['title']} {arrow}", formatting.measured(row["a"]["value"], unit), formatting.span(row["a"], unit),
            formatting.measured(row["b"]["value"], unit), formatting.span(row["b"], unit),
            formatting.signed(change["value"], unit),
            formatting.signed_span(change, unit), f"{formatting.MARKS[change['verdict']]} {change['verdict']}", str(row["n"]),
        ))  # fmt: skip
    lines = [f"A  {found['a']}", f"B  {found['b']}", "", *_losses(found), formatting.aligned(cells), "", *found["notes"]]
    lines.append("Intervals hold 95 %. A change is paired over the same items; ↑ higher is better, ↓ lower is better.")
    lines.append(f"{found['verdict']}: {_MEANING[found['verdict']]} (length apart).")
    return "\n".join(lines)

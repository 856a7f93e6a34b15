"""`posttrain compare A B`: a paired comparison of two policies on the items that both answered, and an overall verdict.

    change   = B − A over the same items, with its 95 % interval (evaluate/stats.py)
    loss     = a change with the verdict "worse", except of length; printed first

    verdict  = B dominates A   at least one measure is better and none is worse (or A dominates B)
               trade-off       some measures are better and some are worse
               not shown to differ

Input: scores.jsonl of two evaluations, of one run or of two. Evaluations that are not comparable are refused: different prompts
under the same item, different limits of the answer length, different definitions of a measure. The verdict ignores length,
which has no better direction. Not included: measures in tokens if the tokenizers differ; a correction for multiple comparisons.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import EVALUATIONS, read_manifest, read_recipe, verify_files
from posttrain.errors import ArtifactError
from posttrain.evaluate import stats
from posttrain.evaluate.scorecard import load_scores, measure_values
from posttrain.evaluate.suites import Measure
from posttrain.records import Score
from posttrain.report import formatting
from posttrain.report.run import read_scorecard, stage_names

# Evaluation settings that both sides must share.
_MUST_MATCH = ("max_new_tokens", "code")
Key = tuple[str, str]


class _Evaluation(NamedTuple):
    """The evaluation of one policy: its manifest, its scores, and the measures as its run defines them."""

    name: str
    manifest: dict[str, Any]
    scores: dict[Key, Score]
    measures: dict[str, Measure]


def compare(a: Path, b: Path) -> tuple[dict[str, Any], str]:
    """Paired comparison of two stages (`RUN/STAGE`, `RUN/base`; a run is its last stage): data and text.

    Raises ArtifactError if one was not evaluated, they share no items, or the evaluations are not comparable.
    """
    before, after = _read_evaluation(a), _read_evaluation(b)
    notes = _check(before, after)
    rows = {name: row for name in before.measures if name in after.measures and (row := _row(name, before, after)) is not None}
    if not rows:
        raise ArtifactError(f"{before.name} and {after.name}", "no measure in common", do="evaluate both on the same suites")
    verdict = _pareto(rows.values())
    shared = len(before.scores.keys() & after.scores.keys())
    losses = [name for name, row in rows.items() if row["change"]["verdict"] == "worse" and row["unit"] != "tokens"]
    comparison = {
        "a": before.name, "b": after.name, "items": shared, "losses": losses, "measures": rows, "verdict": verdict,
        "notes": notes,
    }  # fmt: skip
    return comparison, _text(comparison)


def _read_evaluation(path: Path) -> _Evaluation:
    """Read an evaluation. Raises ArtifactError if the path is not an evaluated stage of a run."""
    is_run = (path / "recipe.toml").is_file()
    run = path if is_run else path.parent
    names = ["base", *stage_names(read_recipe(run)[0])]
    scored = [name for name in names if read_manifest(run / EVALUATIONS / name) is not None]
    allowed = f"there is: {', '.join(scored)}" if scored else ""
    if not scored or not (is_run or path.name in scored):
        raise ArtifactError(str(path), "not evaluated", allowed=allowed, do="run the recipe first")
    name = scored[-1] if is_run else path.name
    folder = run / EVALUATIONS / name
    manifest = read_manifest(folder)
    assert manifest is not None, "`scored` holds only names with a manifest"
    verify_files(folder, ("scores.jsonl",))
    scores = {(s.task, s.item): s for s in load_scores(folder / "scores.jsonl")}
    return _Evaluation(str(run / name), manifest, scores, _measures(run))


def _measures(run: Path) -> dict[str, Measure]:
    """The measures as the scorecard of a run defines them, in its order."""
    measures: dict[str, Measure] = {}
    for stage in read_scorecard(run)["stages"]:
        for name, entry in stage["measures"].items():
            if "tasks" not in entry or "of" not in entry:
                path = run / "scorecard.json"
                raise ArtifactError(str(path), f"has no definition of {name}", do=f"remove {path} and run the recipe again")
            measures.setdefault(
                name,
                Measure(
                    name,
                    tuple(entry["tasks"]),
                    entry["of"],
                    entry["unit"],
                    entry["better"],
                    entry.get("role", ""),
                    entry["title"],
                ),
            )
    return measures


def _check(a: _Evaluation, b: _Evaluation) -> list[str]:
    """Raise ArtifactError if the two are not comparable. Returns notes for the reader."""
    where = f"{a.name} and {b.name}"
    shared = a.scores.keys() & b.scores.keys()
    if not shared:
        raise ArtifactError(where, "no items in common", do="evaluate both on the same suites")
    settings, other_settings = a.manifest.get("settings", {}), b.manifest.get("settings", {})
    for key in _MUST_MATCH:
        if settings.get(key) != other_settings.get(key):
            problem = f"evaluated with {key} = {settings.get(key)} and {other_settings.get(key)}"
            raise ArtifactError(where, problem, allowed="the same for both", do="evaluate both with the same recipe")
    changed = sorted(key for key in shared if a.scores[key].prompt != b.scores[key].prompt)
    if changed:
        problem = f"{len(changed)} items have different prompts, first {changed[0][1]} of {changed[0][0]}"
        raise ArtifactError(where, problem, allowed="the same prompt for the same item", do="evaluate both on the same suites")
    for name in a.measures.keys() & b.measures.keys():
        if _definition(a.measures[name]) != _definition(b.measures[name]):
            raise ArtifactError(where, f"the suites define {name} differently", do="evaluate both on the same suites")
    notes = []
    if settings.get("suites") != other_settings.get("suites"):
        notes.append(f"The suites differ; only the {len(shared)} shared items are compared. The scoring rules may differ too.")
    if not _same_tokens(a, b):
        notes.append("The tokenizers differ: measures in tokens are not compared.")
    return notes


def _definition(measure: Measure) -> tuple[object, ...]:
    return measure.tasks, measure.of, measure.unit, measure.better


def _same_tokens(a: _Evaluation, b: _Evaluation) -> bool:
    return bool(a.manifest.get("base", {}).get("tokenizer_hash") == b.manifest.get("base", {}).get("tokenizer_hash"))


def _row(name: str, a: _Evaluation, b: _Evaluation) -> dict[str, Any] | None:
    """One measure over the shared items. None if there are none or the values are not comparable."""
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


def _interval(interval: stats.Interval) -> dict[str, float]:
    return {"value": round(interval.value, 6), "low": round(interval.low, 6), "high": round(interval.high, 6)}


def _pareto(rows: Iterable[Mapping[str, Any]]) -> str:
    verdicts = {row["change"]["verdict"] for row in rows if row["unit"] != "tokens"}
    if {"better", "worse"} <= verdicts:
        return "trade-off"
    if "better" in verdicts:
        return "B dominates A"
    return "A dominates B" if "worse" in verdicts else "not shown to differ"


def _loss_lines(comparison: Mapping[str, Any]) -> list[str]:
    rows = [comparison["measures"][name] for name in comparison["losses"]]
    losses = [
        f"{formatting.MARKS['worse']} {row['title']} {formatting.change_words(row['change'], row['unit'])}" for row in rows
    ]
    return [f"Losses of B against A: {'; '.join(losses)}", ""] if losses else []


_VERDICT_MEANING = {
    "B dominates A": "at least one measure is better and none is worse",
    "A dominates B": "at least one measure is worse and none is better",
    "trade-off": "B is better in some measures and worse in others",
    "not shown to differ": "the interval of every change includes 0",
}


def _text(comparison: Mapping[str, Any]) -> str:
    cells = [("", "A", "95 %", "B", "95 %", "B − A", "95 %", "verdict", "items")]
    for row in comparison["measures"].values():
        unit, change = row["unit"], row["change"]
        arrow = "↑" if row["better"] == "higher" else "↓"
        cells.append((
            f"{row['title']} {arrow}", formatting.measured(row["a"]["value"], unit), formatting.span(row["a"], unit),
            formatting.measured(row["b"]["value"], unit), formatting.span(row["b"], unit),
            formatting.signed(change["value"], unit),
            formatting.signed_span(change, unit), f"{formatting.MARKS[change['verdict']]} {change['verdict']}", str(row["n"]),
        ))  # fmt: skip
    lines = [
        f"A  {comparison['a']}",
        f"B  {comparison['b']}",
        "",
        *_loss_lines(comparison),
        formatting.aligned(cells),
        "",
        *comparison["notes"],
    ]
    lines.append("Intervals are 95 %. Changes are paired over the same items. ↑ higher is better, ↓ lower is better.")
    lines.append(f"{comparison['verdict']}: {_VERDICT_MEANING[comparison['verdict']]} (ignoring length).")
    return "\n".join(lines)

"""The audit trail: why a row was trained, read backwards from the files of a run.

    row id ─▶ the stages that made it: principle, critique, revision or votes, judge, fingerprints, seed, constitution
           ─▶ the files that have it, with their hashes
           ─▶ the stages that read it, and whether they trained on it

A round's id leads to the rounds of its prompt; the id of a prompt leads to all of its rows. Input: the files of a run. Imports
no torch. Left out: rows of the hub, which are not on this machine.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.constitution.label_figures import label_figures
from posttrain.constitution.principles import Constitution, load_constitution
from posttrain.constitution.revision_figures import contrast_figures, revision_figures, title_of
from posttrain.constitution.row_readers import RowReading, RowReadings, made_by, names_of, read_all
from posttrain.constitution.trail_files import (
    ContrastRecord,
    JudgedRecord,
    RoundRecord,
    RowsStage,
    UnfinishedStage,
    read_rows_stage,
    read_unfinished,
)
from posttrain.constitution.word_diff import word_diff
from posttrain.errors import ArtifactError, RecipeError

_NEAR = 3


class RunTrail(NamedTuple):
    """The finished and unfinished stages of a run that make rows, and the run's recipe."""

    run: Path
    recipe: dict[str, Any]
    stages: tuple[RowsStage, ...]
    unfinished: tuple[UnfinishedStage, ...] = ()


def open_trail(run: Path, recipe: dict[str, Any], *, stage: str | None = None) -> RunTrail:
    """Read the rows of a run, or of one stage. Raises ArtifactError for a damaged file, or a stage that is not in the run."""
    names = [str(table["name"]) for table in recipe.get("stage", [])]
    if stage is not None and stage not in names:
        near = difflib.get_close_matches(stage, names, 1)
        do = f'did you mean "{near[0]}"?' if near else ""
        raise ArtifactError(f"--stage {stage}", "no stage of this run", allowed=f"there is: {', '.join(names)}", do=do)
    tables = [table for table in recipe.get("stage", []) if stage in (None, table["name"])]
    made = [rows for name in names if stage in (None, name) and (rows := read_rows_stage(run / name)) is not None]
    unfinished = [read_unfinished(run / str(table["name"]), str(table.get("kind", ""))) for table in tables]
    begun = [one for one in unfinished if one is not None]
    return RunTrail(run, recipe, tuple(made), tuple(begun))


def constitution_of(stage: RowsStage) -> Constitution | None:
    """The constitution of a stage, if the file still has the stage's fingerprint."""
    name = stage.settings.get("constitution")
    if not isinstance(name, str):
        return None
    try:
        constitution = load_constitution(name)
    except RecipeError:
        return None
    planned = stage.manifest.get("data", {}).get(f"constitution {name}") or stage.table("constitution").get("fingerprint")
    return constitution if planned in (None, constitution.fingerprint) else None


def figures_of(stage: RowsStage) -> dict[str, Any]:
    """The figures of a stage of rows. No text of a prompt is among them."""
    constitution = constitution_of(stage)
    figures: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "rows": len(stage.rows), **_identity(stage)}
    if stage.rounds:
        return {**figures, "revisions": revision_figures(stage, constitution)}
    if stage.judged:
        return {**figures, "labels": label_figures(stage, constitution)}
    if stage.contrasts:
        return {**figures, "contrast": contrast_figures(stage, constitution)}
    return figures


def summary(trail: RunTrail) -> dict[str, Any]:
    """The figures of every stage of rows. Raises ArtifactError if there is none."""
    if not trail.stages and not trail.unfinished:
        raise ArtifactError(
            str(trail.run), "no finished stage makes rows", do="name a row of a data file to see which stages read it"
        )
    return {
        "run": str(trail.recipe.get("name", trail.run.name)),
        "stages": [figures_of(stage) for stage in trail.stages],
        "unfinished": [{"stage": s.name, "kind": s.kind, "audit": s.audit, "gate": s.gate} for s in trail.unfinished],
    }


def trace(trail: RunTrail, row: str, *, stage: str | None = None) -> dict[str, Any]:
    """Where a row comes from and who trained on it. Raises ArtifactError, with near ids, for an id that no row has."""
    readings = read_all(trail.run, trail.recipe)
    names = names_of(row)
    made = [entry for one in trail.stages for entry in _made(one, names, readings)]
    files = _files(names, readings, stage)
    if not made and not files:
        raise _unknown(trail, row, readings, stage)
    return {"row": row, "made": made, "files": files, "notes": list(readings.notes)}


def _made(stage: RowsStage, names: Sequence[str], readings: RowReadings) -> list[dict[str, Any]]:
    """What a stage made of a row or of a prompt: at most one entry."""
    chain = _chain(stage, names)
    if not chain:
        return []
    prompt = chain[0]["prompt_id"]
    origin = [r for r in readings.rows if r.stage == stage.name and prompt in names_of(r.row)]
    sources = {r.source: r.sha256 for r in origin}
    return [
        {
            "stage": stage.name, "kind": stage.kind, **_identity(stage), "prompt_id": prompt,
            "category": chain[0].pop("category", ""), "prompt": chain[0]["prompt"], "sources": sources, "audit": stage.audit,
            "rows": [
                {**{key: value for key, value in entry.items() if key not in ("prompt", "category")},
                 "asked": entry["id"] in names, "read_by": _read_by(stage.name, entry["id"], readings)}
                for entry in chain
            ],
        }
    ]  # fmt: skip


def _identity(stage: RowsStage) -> dict[str, Any]:
    """Who made the rows of a stage: policy, base, judge, seed, constitution."""
    manifest = stage.manifest
    base = manifest.get("base", {})
    stage_seed = stage.settings.get("seed")
    return {
        "fingerprint": manifest["fingerprint"],
        "answered_by": [{"name": name, "fingerprint": manifest.get("inputs", {}).get(name)} for name in stage.answering],
        "inputs": manifest.get("inputs", {}),
        "base": {"model": base.get("model"), "weights_hash": base.get("weights_hash")},
        "judge": stage.table("judge") or None,
        "constitution": stage.table("constitution") or _constitution(stage),
        "seed": manifest.get("seed") if stage_seed is None else stage_seed,
        "warnings": list(manifest.get("warnings", ())),
    }


def _constitution(stage: RowsStage) -> dict[str, Any] | None:
    """Name and fingerprint of a constitution from the settings of a stage, for manifests without a table of it."""
    name = stage.settings.get("constitution")
    marks = stage.manifest.get("data", {})
    return {"name": name, "fingerprint": marks.get(f"constitution {name}")} if name is not None else None


def _chain(stage: RowsStage, names: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the prompt that a name belongs to, in order."""
    titles = constitution_of(stage)
    # The id itself, or the first that it may be a copy of: another row may have the shorter id.
    known = {str(row.get("id")) for row in stage.rows} | {row.id for row in stage.contrasts}
    known |= {name for row in stage.rounds for name in (row.id, row.prompt_id)}
    known |= {name for row in stage.judged for name in (row.id, row.prompt_id)}
    names = [name for name in names if name in known][:1]
    if stage.rounds:
        prompts = {row.prompt_id for row in stage.rounds if row.id in names or row.prompt_id in names}
        rounds = sorted((row for row in stage.rounds if row.prompt_id in prompts), key=lambda row: row.round)
        return [_round(row, titles) for row in rounds]
    if stage.judged:
        prompts = {row.prompt_id for row in stage.judged if row.id in names or row.prompt_id in names}
        return [_judged(row, titles, stage.manifest.get("inputs", {})) for row in stage.judged if row.prompt_id in prompts]
    if stage.contrasts:
        return [_contrast(row, titles) for row in stage.contrasts if row.id in names]
    return [_plain(row, names) for row in stage.rows if row.get("id") in names]


def _round(row: RoundRecord, titles: Constitution | None) -> dict[str, Any]:
    diff = [] if row.revision is None else [list(piece) for piece in word_diff(row.answer, row.revision)]
    return {**row.model_dump(), "title": title_of(titles, row.principle), "diff": diff}


def _judged(row: JudgedRecord, titles: Constitution | None, inputs: dict[str, str]) -> dict[str, Any]:
    """A pair, with the fingerprints of the policies that answered if the stage read them."""
    chosen = None if row.outcome != "labelled" or row.probability is None else "a" if row.probability >= 0.5 else "b"
    votes = [{**vote.model_dump(), "title": title_of(titles, vote.principle)} for vote in row.votes]
    policies = {"a_policy": inputs.get(row.a_by), "b_policy": inputs.get(row.b_by)}
    return {**row.model_dump(), **policies, "votes": votes, "chosen": chosen}


def _contrast(row: ContrastRecord, titles: Constitution | None) -> dict[str, Any]:
    diff = [list(piece) for piece in word_diff(row.rejected, row.chosen)]
    named = [{"id": name, "title": title_of(titles, name)} for name in row.principles]
    return {**row.model_dump(), "prompt_id": row.id, "principles": named, "diff": diff}


def _plain(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A row of a stage whose kind left no record of how it was made."""
    return {"id": row["id"], "prompt_id": row["id"], "prompt": [], "row": row}


def _read_by(stage: str, row: str, readings: RowReadings) -> list[dict[str, Any]]:
    return [
        {"stage": r.stage, "kind": r.kind, "fingerprint": r.fingerprint, "as": r.row, "use": r.use}
        for r in readings.rows
        if made_by(r.source) == stage and row in names_of(r.row)
    ]


def _files(names: Sequence[str], readings: RowReadings, stage: str | None) -> list[dict[str, Any]]:
    """The files that have a row of this id, each with the stages that read it."""
    found: dict[str, list[RowReading]] = {}
    for reading in readings.rows:
        mine = stage is None or reading.stage == stage
        if mine and made_by(reading.source) is None and (names[0] == reading.row or set(names) & set(names_of(reading.row))):
            found.setdefault(reading.source, []).append(reading)
    return [
        {
            "path": path, "sha256": rows[0].sha256,
            "changed": any(r.read_sha256 not in (None, r.sha256) for r in rows),
            "texts": [list(pair) for pair in max((r.texts for r in rows), key=len)],
            "read_by": [
                {"stage": r.stage, "kind": r.kind, "fingerprint": r.fingerprint, "as": r.row, "use": r.use} for r in rows
            ],
        }
        for path, rows in found.items()
    ]  # fmt: skip


def _unknown(trail: RunTrail, row: str, readings: RowReadings, stage: str | None) -> ArtifactError:
    known = [str(entry["id"]) for made in trail.stages for entry in made.rows if "id" in entry]
    for made in trail.stages:
        known += [name for one in made.rounds for name in (one.id, one.prompt_id)]
        known += [name for one in made.judged for name in (one.id, one.prompt_id)]
    known += [r.row for r in readings.rows if stage in (None, r.stage)]
    near = difflib.get_close_matches(row, list(dict.fromkeys(known)), _NEAR, 0.5)
    where = f'{trail.run} · row "{row}"'
    notes = f" ({'; '.join(readings.notes)})" if readings.notes else ""
    return ArtifactError(
        where, f"no row of {'this run' if stage is None else stage} has this id{notes}",
        allowed=f"near: {', '.join(near)}" if near else f"{len(set(known)):,} rows are known",
        do="`posttrain audit RUN` lists the stages; ids are in rows.jsonl",
    )  # fmt: skip

"""Which stages of a run read which rows, and whether they trained on them.

Data is read again as training read it, so ids, copies by weight and held-out rows are those of the stage. Rows that were
dropped are known by name as far as the stage's data report names them. Imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from posttrain.artifacts import read_manifest
from posttrain.constitution.trail_files import read_json
from posttrain.data.formats import read_demonstrations, read_preferences, read_prompts, read_texts
from posttrain.data.prepare import in_validation
from posttrain.data.sources import Loaded, SourceRows, load, locate
from posttrain.errors import DataError
from posttrain.records import Message, PreferencePair
from posttrain.settings import ROWS_OF, Source
from posttrain.stages import KINDS, ROWS_FILE
from posttrain.stages.kind import PROMPTS, Content

# Suffixes of the ids of copies: by weight, and of rows whose id occurs again.
_COPY = re.compile(r"^(.*)[#~]\d+$", re.DOTALL)


class RowReading(NamedTuple):
    """A row as a stage read it: the source, its hash then and now, its id, its texts, and what the stage did with it."""

    stage: str
    kind: str
    fingerprint: str | None
    source: str
    sha256: str
    read_sha256: str | None
    row: str
    use: str
    texts: tuple[tuple[str, str], ...]

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "texts": [list(pair) for pair in self.texts]}


class RowReadings(NamedTuple):
    """The readings of a run, and sources that could not be read."""

    rows: tuple[RowReading, ...]
    notes: tuple[str, ...]


def names_of(row: str) -> list[str]:
    """An id, and the ids that it may be a copy of."""
    names = [row]
    while (match := _COPY.match(names[-1])) is not None:
        names.append(match[1])
    return names


def read_all(run: Path, recipe: Mapping[str, Any]) -> RowReadings:
    """Every row that a stage of the recipe reads. Sources that cannot be read here give notes."""
    rows: list[RowReading] = []
    notes: list[str] = []
    for table in recipe.get("stage", []):
        for field, contents in _fields(str(table.get("kind"))):
            loaded = _load(run, _sources(table.get(field, ())), notes)
            if not loaded.sources:
                continue
            try:
                rows += _read(run, table, field, contents, loaded, _seed(recipe, run / str(table["name"])))
            except DataError as error:
                notes.append(f"not searched: {error}")
    return RowReadings(tuple(rows), tuple(dict.fromkeys(notes)))


def _fields(kind: str) -> list[tuple[str, tuple[Content, ...]]]:
    """The settings of a kind that name data. A kind that this version does not know reads prompts from `data`."""
    return [(entry.field, entry.contents) for entry in KINDS[kind].inputs] if kind in KINDS else [("data", PROMPTS)]


def _sources(value: Any) -> list[Source]:
    entries = [value] if isinstance(value, str | dict) else value if isinstance(value, list | tuple) else []
    found = []
    for entry in entries:
        try:
            found.append(Source.model_validate(entry))
        except ValidationError:
            continue
    return found


def _seed(recipe: Mapping[str, Any], folder: Path) -> int:
    """The seed that mixed the sources: the recipe's, as the manifest has it."""
    settings = (read_manifest(folder) or {}).get("settings", {})
    seed = settings.get("seed", recipe.get("seed", 0))
    return seed if isinstance(seed, int) else 0


def _load(run: Path, sources: Sequence[Source], notes: list[str]) -> Loaded:
    """The sources that can be read here; the others give notes."""
    found: list[tuple[Source, SourceRows]] = []
    for source in sources:
        try:
            if source.stage is not None:
                source = source.at(run / source.stage / ROWS_FILE)
                if source.file is None or not source.file.is_file():
                    raise DataError(f'data "{source.path}"', "not made yet")
            elif locate(source.path) is None:
                raise DataError(f'data "{source.path}"', "a hub id")
            found += load((source,)).sources
        except DataError as error:
            notes.append(f"not searched: {error}")
    return Loaded(tuple(found))


def _read(
    run: Path, table: Mapping[str, Any], field: str, contents: tuple[Content, ...], loaded: Loaded, seed: int
) -> list[RowReading]:
    """The rows of a stage's sources, mixed as it mixed them. Raises DataError for rows of another layout."""
    name, kind = str(table["name"]), str(table.get("kind"))
    manifest = read_manifest(run / name)
    uses = _Uses.of(run / name, manifest, field)
    fingerprint = None if manifest is None else str(manifest["fingerprint"])
    hashes = {source.path: rows.sha256 for source, rows in loaded.sources}
    read_hashes = {} if manifest is None else manifest.get("data", {})
    return [
        RowReading(
            name, kind, fingerprint, row.source, hashes[row.source], read_hashes.get(row.source), row.id,
            uses.of_row(row.id, row.prompt), row.texts,
        )
        for row in _records(loaded, contents, seed)
    ]  # fmt: skip


class _Row(NamedTuple):
    """A row of any content: its id, its source, its prompt, and its texts with their roles."""

    id: str
    source: str
    prompt: tuple[Message, ...]
    texts: tuple[tuple[str, str], ...]


def _records(loaded: Loaded, contents: tuple[Content, ...], seed: int) -> list[_Row]:
    if contents == ("preferences",):
        return [_Row(r.id, r.source, r.prompt, _pair_texts(r)) for r in read_preferences(loaded, seed=seed).records]
    if contents == ("demonstrations",):
        if "text" in loaded.columns and "messages" not in loaded.columns:
            return [_Row(t.id, t.source, (), (("text", t.text),)) for t in read_texts(loaded, seed=seed).records]
        return [_Row(d.id, d.source, d.messages, _turns(d.messages)) for d in read_demonstrations(loaded, seed=seed).records]
    return [_Row(p.id, p.source, p.messages, _turns(p.messages)) for p in read_prompts(loaded, seed=seed).records]


def _pair_texts(pair: PreferencePair) -> tuple[tuple[str, str], ...]:
    return (*_turns(pair.prompt), ("chosen", pair.chosen[0].content), ("rejected", pair.rejected[0].content))


def _turns(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((m.role, m.content) for m in messages)


class _Uses(NamedTuple):
    """What a stage did with its rows: the share held out, rows that it dropped or left out, and whether it is finished."""

    finished: bool
    verb: str
    validation: float
    dropped: dict[str, str]

    @classmethod
    def of(cls, folder: Path, manifest: Mapping[str, Any] | None, field: str) -> "_Uses":
        if manifest is None:
            return cls(False, "", 0.0, {})
        settings = manifest.get("settings", {}).get("stage", {})
        # A stage with `gold` holds prompts out only for it.
        held_out = settings.get("validation", 0.0) if field == "data" and settings.get("gold", True) else 0.0
        path = folder / "data_report.json"
        report = read_json(path) if path.is_file() else {}
        report = report if field == "data" else report.get("ptx", {})
        dropped = {str(row.get("row")): f"dropped: {row.get('reason')}" for row in report.get("dropped_rows", ())}
        dropped |= {str(row): "left out: it repeats an evaluation prompt" for row in report.get("contaminated_rows", ())}
        dropped |= {str(row): "left out: it repeats an earlier prompt" for row in report.get("duplicate_rows", ())}
        verb = "made rows from it" if manifest.get("kind") == "rows" else "trained on it"
        return cls(True, verb, float(held_out), dropped)

    def of_row(self, row: str, prompt: Sequence[Message]) -> str:
        if not self.finished:
            return "the stage is not finished"
        if row in self.dropped:
            return self.dropped[row]
        return "held out for validation" if prompt and in_validation(prompt, self.validation) else self.verb


def made_by(source: str) -> str | None:
    """The stage that makes the rows of a source, or None."""
    return source.removeprefix(ROWS_OF) if source.startswith(ROWS_OF) else None

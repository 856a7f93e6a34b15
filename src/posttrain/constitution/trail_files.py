"""The files that stages of rows leave in a run, read for the audit trail and the report.

    rounds.jsonl    every round of critique and revision of every prompt       -> RoundRecord
    judged.jsonl    every pair that was judged, with the vote of each principle -> JudgedRecord
    rows.jsonl      what later stages train on                                  -> dict, ContrastRecord

What a stage shows depends on the files that it has, not on the name of its kind. Files are checked when they are read. Imports
no torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from posttrain.artifacts import partial_folder, read_jsonl, read_manifest
from posttrain.errors import ArtifactError
from posttrain.stages import ROWS_FILE

ROUNDS_FILE, JUDGED_FILE, AUDIT_FILE, GATE_FILE = "rounds.jsonl", "judged.jsonl", "judge_audit.json", "gate.json"
# The author of an answer that a data file has.
DATA = "data"
REVISED, NOTHING_FOUND, DROPPED = "revised", "nothing found", "dropped"


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class TurnRecord(_Record):
    """A message of a prompt."""

    role: str
    content: str


class RoundRecord(_Record):
    """One round of critique and revision of one prompt."""

    id: str
    prompt_id: str
    category: str = ""
    source: str = ""
    round: int
    prompt: list[TurnRecord]
    answer: str
    principle: str
    detection: float | None = None
    critique: str | None = None
    revision: str | None = None
    outcome: str
    reason: str = ""
    gate: float | None = None
    policy: str = ""
    seed: int | None = None

    @property
    def revised(self) -> bool:
        """Whether the revision was kept."""
        return self.outcome == REVISED and self.revision is not None

    @property
    def looked(self) -> bool:
        """Whether the policy said if the answer has the fault."""
        return self.outcome == NOTHING_FOUND or self.found

    @property
    def found(self) -> bool:
        """Whether the policy found the fault. A critique that says that nothing is to be changed finds none."""
        return self.outcome != NOTHING_FOUND and (
            self.outcome == REVISED or self.critique is not None or self.detection is not None
        )

    @property
    def after(self) -> str:
        """The text that the next round starts from."""
        return self.revision if self.revised and self.revision is not None else self.answer


class VoteRecord(_Record):
    """The vote of one principle: the probability that A is better, and that of each order."""

    principle: str
    weight: float = 1.0
    probability: float | None = None
    first: float | None = None
    second: float | None = None
    why: str = ""

    @property
    def decisive(self) -> bool:
        """Whether the vote prefers one of the answers."""
        return self.probability is not None and self.probability != 0.5


class JudgedRecord(_Record):
    """One pair of answers that was judged."""

    id: str
    prompt_id: str
    category: str = ""
    source: str = ""
    prompt: list[TurnRecord]
    a: str
    b: str
    a_by: str = ""
    b_by: str = ""
    human: float | None = None
    votes: list[VoteRecord]
    probability: float | None = None
    outcome: str
    reason: str = ""
    seed: int | None = None


class ContrastRecord(_Record):
    """A pair whose chosen answer was given with principles in the system prompt."""

    id: str
    prompt: list[TurnRecord]
    chosen: str
    rejected: str
    principles: list[str]


R = TypeVar("R", bound=_Record)


class RowsStage(NamedTuple):
    """A finished stage that makes rows. Of `rounds`, `judged` and `contrasts`, at most one has records."""

    name: str
    kind: str
    manifest: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    rounds: tuple[RoundRecord, ...] = ()
    judged: tuple[JudgedRecord, ...] = ()
    contrasts: tuple[ContrastRecord, ...] = ()
    audit: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the stage, with defaults."""
        table = self.manifest.get("settings", {}).get("stage", {})
        return table if isinstance(table, dict) else {}

    @property
    def init(self) -> str:
        """The policy that answers."""
        return str(self.settings.get("init", "base"))

    @property
    def answering(self) -> list[str]:
        """The policies that answered; none if all answers are those of the data."""
        authors = dict.fromkeys(name for row in self.judged for name in (row.a_by, row.b_by) if name != DATA)
        return list(authors) if self.judged else [self.init]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Ids or tags of principles that the stage did not use."""
        names = self.settings.get("leave_out", ())
        return tuple(map(str, names)) if isinstance(names, list | tuple) else ()

    def table(self, key: str) -> dict[str, Any]:
        """A table of the manifest, empty if it is missing."""
        value = self.manifest.get(key)
        return value if isinstance(value, dict) else {}


def read_rows_stage(folder: Path) -> RowsStage | None:
    """A stage of rows, or None if the folder has none. Raises ArtifactError for a missing or damaged file."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("kind") != "rows":
        return None
    rows = _json_lines(folder / ROWS_FILE)
    files = manifest.get("files", {})
    rounds = _records(RoundRecord, folder / ROUNDS_FILE) if ROUNDS_FILE in files else ()
    judged = _records(JudgedRecord, folder / JUDGED_FILE) if JUDGED_FILE in files else ()
    pairs = not rounds and not judged and all({"chosen", "rejected", "principles"} <= row.keys() for row in rows)
    contrasts = _records(ContrastRecord, folder / ROWS_FILE) if pairs else ()
    audit = read_json(folder / AUDIT_FILE) if AUDIT_FILE in files else None
    return RowsStage(
        str(manifest.get("name") or folder.name),
        str(manifest.get("stage", "")),
        manifest,
        rows,
        rounds,
        judged,
        contrasts,
        audit,
    )


class UnfinishedStage(NamedTuple):
    """A stage that asked a judge and was not finished, with what its folder says of the judge and the gate."""

    name: str
    kind: str
    audit: dict[str, Any] | None
    gate: dict[str, Any] | None

    @property
    def labels(self) -> bool:
        """Whether the stage labels pairs; the others revise answers."""
        return self.kind == "label"


def read_unfinished(folder: Path, kind: str) -> UnfinishedStage | None:
    """An unfinished stage that has audited a judge, or None. Raises ArtifactError for a damaged file."""
    partial = partial_folder(folder)
    files = {name: partial / name for name in (AUDIT_FILE, GATE_FILE)}
    if read_manifest(folder) is not None or not any(path.is_file() for path in files.values()):
        return None
    audit, gate = (read_json(path) if path.is_file() else None for path in files.values())
    # A stage that went on after the audit was allowed to.
    refused = audit is not None and audit.get("passes") is False and not any(partial.glob("checkpoints/*.jsonl"))
    return UnfinishedStage(folder.name, kind, audit if refused else None, gate)


def _records(kind: type[R], path: Path) -> tuple[R, ...]:
    rows = _json_lines(path)
    try:
        return tuple(TypeAdapter(list[kind]).validate_python(list(rows)))  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"row {int(first['loc'][0]) + 1} · {'.'.join(map(str, first['loc'][1:]))}"
        raise _damaged(path, f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _json_lines(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        raise _damaged(path, "is missing")
    try:
        rows = tuple(read_jsonl(path))
    except (ValueError, RecursionError):
        raise _damaged(path, "not readable as JSON lines") from None
    if not all(isinstance(row, dict) for row in rows):
        raise _damaged(path, "not rows of JSON objects")
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ArtifactError for a damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _damaged(path, "not readable as JSON") from None
    if not isinstance(value, dict):
        raise _damaged(path, "not a JSON object")
    return value


def _damaged(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(str(path), problem, do=f"remove {path.parent} and run the recipe again")

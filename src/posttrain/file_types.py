"""What the files of a run hold: the types of their values, checked where they are read.

A file that was edited or damaged must end in an error that names it, not somewhere in a table or a chart. Only what readers
rely on is checked; further values are allowed, so that a newer version's files can be read.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from posttrain.errors import ArtifactError
from posttrain.records import Score

Number = int | float


class _Table(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Manifest(_Table):
    fingerprint: str
    kind: str = ""
    name: str = ""
    stage: str = ""
    settings: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    base: dict[str, str | None] = {}
    data: dict[str, str] = {}
    rows: dict[str, int] = {}
    files: dict[str, str] = {}
    libraries: dict[str, str] = {}
    metrics: dict[str, Number | None] = {}
    warnings: list[str] = []
    steps: int | None = None
    tokens: int | None = None
    seconds: Number | None = None


class _Change(_Table):
    against: str
    value: Number
    low: Number
    high: Number
    verdict: str


class _Measure(_Table):
    value: Number
    low: Number
    high: Number
    n: int
    unit: str
    better: str
    title: str
    role: str
    changes: list[_Change]


class _StageScores(_Table):
    name: str
    kind: str
    parent: str | None
    measures: dict[str, _Measure]


class _Scorecard(_Table):
    run: str
    stages: list[_StageScores]
    tax: list[dict[str, Any]]


_MANIFEST, _SCORECARD = TypeAdapter(_Manifest), TypeAdapter(_Scorecard)
_METRICS = TypeAdapter(list[dict[str, Number | str | None]], config=ConfigDict(strict=True))
_SCORES = TypeAdapter(list[Score])


def check_manifest(value: Any, where: str, *, do: str) -> None:
    """Raise ArtifactError for a manifest with a value of another type."""
    _check(_MANIFEST, value, where, "not a manifest", do)


def check_scorecard(value: Any, where: str, *, do: str) -> None:
    """Raise ArtifactError for a scorecard with a value of another type."""
    _check(_SCORECARD, value, where, "not a scorecard", do)


def check_metrics(rows: Any, where: str, *, do: str) -> None:
    """Raise ArtifactError for metrics that are not rows of numbers and texts."""
    _check(_METRICS, rows, where, "not rows of metrics", do)


def scores_of(rows: list[Any], where: str, *, do: str) -> list[Score]:
    """Rows of scores.jsonl as records. Raises ArtifactError."""
    found: list[Score] = _check(_SCORES, rows, where, "not readable as scores", do)
    return found


def _check(kind: TypeAdapter[Any], value: Any, where: str, what: str, do: str) -> Any:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        found = f"{what}: {place} is {str(first['input'])[:60]!r}"
        raise ArtifactError(where, found, allowed=first["msg"][:1].lower() + first["msg"][1:], do=do) from None
    except RecursionError:
        raise ArtifactError(where, f"{what}: nested too deeply", do=do) from None

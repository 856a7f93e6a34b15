"""The types of values in the files of a run, checked when the files are read.

A damaged file gives an error that names it, instead of a failure in a table or a chart. Only values that readers use are
checked. Other values are allowed, so that files of newer versions can be read.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from posttrain.errors import ArtifactError, RecipeError
from posttrain.records import Score

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Number = int | float


class _FileTable(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Manifest(_FileTable):
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


class _Change(_FileTable):
    against: str
    value: Number
    low: Number
    high: Number
    verdict: str


class _Measure(_FileTable):
    value: Number
    low: Number
    high: Number
    n: int
    unit: str
    better: str
    title: str
    role: str
    changes: list[_Change]


class _StageScores(_FileTable):
    name: str
    kind: str
    parent: str | None
    measures: dict[str, _Measure]


class _Scorecard(_FileTable):
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
    scores: list[Score] = _check(_SCORES, rows, where, "not readable as scores", do)
    return scores


def invalid_setting(mistake: "ErrorDetails", where: str, settings: Iterable[str]) -> RecipeError:
    """An error of pydantic about a table of a user's file, which may have these settings."""
    name = str(next((part for part in reversed(mistake["loc"]) if isinstance(part, str)), ""))
    if mistake["type"] == "extra_forbidden":
        return RecipeError(where, f'unknown setting "{name}"', allowed=f"there is: {', '.join(settings)}")
    if mistake["type"] == "missing":
        return RecipeError(where, f'"{name}" is missing', do="add it")
    message = mistake["msg"]
    return RecipeError(where, f"{name} = {str(mistake['input'])[:80]!r}", allowed=message[:1].lower() + message[1:])


def _check(kind: TypeAdapter[Any], value: Any, where: str, problem_kind: str, do: str) -> Any:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"])) or "the file"
        problem = f"{problem_kind}: {path} is {str(first['input'])[:60]!r}"
        raise ArtifactError(where, problem, allowed=first["msg"][:1].lower() + first["msg"][1:], do=do) from None
    except RecursionError:
        raise ArtifactError(where, f"{problem_kind}: nested too deeply", do=do) from None

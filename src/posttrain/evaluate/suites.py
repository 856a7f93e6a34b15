"""Suites: TOML files that define tasks and measures. No torch.

The recipe names suites; `evaluate/run.py` answers their tasks; `evaluate/scorecard.py` computes the measures. A task has items,
a kind of answer and a scorer. A measure is the mean of the scores of one or several tasks.

    [[task]]     name, answer = "choices" | "generate" | "perplexity", items = a file,
                 scorer = "checks" | "refusal" (generated answers only)
    [[measure]]  name, tasks, of = "score" | "ended" | "tokens", better, role, title
                 a task without a measure of its own score gets one with its name

Item files are JSON lines: choices {id, question, choices, answer}, generate {id, prompt[, checks]}, perplexity
{id, text}. A path is relative to the suite file; `starter/…` is in this package.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

import posttrain
from posttrain.artifacts import fingerprint
from posttrain.errors import RecipeError
from posttrain.evaluate import checks, refusal
from posttrain.evaluate.stats import Unit
from posttrain.file_types import invalid_setting
from posttrain.reading import Unreadable, decode_text, json_lines, parse_toml, unusable

PACKAGE = Path(posttrain.__file__).parent
BUILT_IN = {"starter": PACKAGE / "starter" / "suites" / "starter.toml"}
# Increase when the same items give different answers or scores, so that finished evaluations are run again.
SUITE_VERSION = 1

Answer = Literal["choices", "generate", "perplexity"]
Scorer = Literal["choice", "checks", "refusal", "nats"]
Better = Literal["higher", "lower"]
Role = Literal["capability", "gain", ""]
Item = dict[str, Any]
_SCORERS: dict[str, tuple[str, ...]] = {
    "choices": ("choice",),
    "generate": ("checks", "refusal"),
    "perplexity": ("nats",),
}
_FIELDS: dict[str, dict[str, type]] = {
    "choices": {"id": str, "question": str, "choices": list, "answer": int},
    "generate": {"id": str, "prompt": str},
    "perplexity": {"id": str, "text": str},
}
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_]{0,63}$")]
SAMPLES = 6


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure: the mean of `of` over all items of its tasks."""

    name: str
    tasks: tuple[str, ...]
    of: Literal["score", "ended", "tokens"]
    unit: Unit
    better: Better
    role: Role = ""
    title: str = ""
    column: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """A task: items, the kind of answer, and the scorer."""

    name: str
    answer: Answer
    scorer: Scorer
    items: tuple[Item, ...]
    measures: tuple[Measure, ...]
    samples: tuple[str, ...] = ()

    @property
    def better(self) -> Better:
        """The better direction of the task's score."""
        return next(m.better for m in self.measures if m.of == "score")


class _SuiteTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _TaskTable(_SuiteTable):
    name: _Name
    answer: Answer
    scorer: Scorer | None = None
    items: str


class _MeasureTable(_SuiteTable):
    name: _Name
    tasks: tuple[str, ...]
    of: Literal["score", "ended", "tokens"] = "score"
    better: Better | None = None
    role: Role = ""
    title: str = ""


class _SuiteFile(_SuiteTable):
    name: _Name
    samples: tuple[str, ...] = ()
    task: tuple[_TaskTable, ...]
    measure: tuple[_MeasureTable, ...] = ()


def load_suites(names: Sequence[str], *, limit: int = 0) -> tuple[Task, ...]:
    """The tasks of built-in suites ("starter") and suite files, `limit` items of each (0: all).

    Raises RecipeError for an unknown suite, a file that is not a suite, an unknown task, scorer or check, bad items.
    """
    tasks_by_suite: dict[str, tuple[Task, ...]] = {}
    for name in names:
        path = _locate(name)
        suite = _parse(path, _where(path))
        if suite.name in tasks_by_suite:
            raise RecipeError(_where(path), f'a second suite named "{suite.name}"', do="name each suite once")
        tasks_by_suite[suite.name] = _tasks(suite, path)
    return first_items((task for tasks in tasks_by_suite.values() for task in tasks), limit)


def first_items(tasks: Iterable[Task], limit: int) -> tuple[Task, ...]:
    """The tasks with `limit` items each (0: all)."""
    return tuple(replace(task, items=task.items[: limit or None]) for task in tasks)


def evaluation_prompts(tasks: Iterable[Task]) -> frozenset[str]:
    """Texts that training data must not contain: prompts, questions, prose and the sample prompts."""
    texts = {str(item.get(key, "")) for task in tasks for item in task.items for key in ("prompt", "question", "text")}
    return frozenset((texts | {s for task in tasks for s in task.samples}) - {""})


def sample_prompts(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The prompts that every policy answers for the report: those of the first suite that has any."""
    return next((task.samples for task in tasks if task.samples), ())[:SAMPLES]


def suite_fingerprint(tasks: Iterable[Task]) -> str:
    """A fingerprint of all items, measures, sample prompts and scoring rules."""
    content = [
        [
            t.name,
            t.answer,
            t.scorer,
            list(t.items),
            [[m.name, m.of, m.better, list(m.tasks)] for m in t.measures],
            list(t.samples),
        ]
        for t in tasks
    ]
    return fingerprint([SUITE_VERSION, refusal.rule_fingerprint(), content])


def all_measures(tasks: Iterable[Task]) -> tuple[Measure, ...]:
    """All measures without duplicates: by suite, in the order of the file."""
    measures = dict.fromkeys(measure for task in tasks for measure in task.measures)
    suites = list(dict.fromkeys(measure.name.split("/")[0] for measure in measures))
    return tuple(sorted(measures, key=lambda m: (suites.index(m.name.split("/")[0]), m.column)))


def _locate(name: str) -> Path:
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    problem = f'"{name}" is not a suite' if path.suffix != ".toml" else f"there is no file {name}"
    raise RecipeError(
        "[evaluation] suites",
        problem,
        allowed=f"there is: {', '.join(BUILT_IN)}",
        do="or name a suite file (.toml)",
    )


def _where(path: Path) -> str:
    return f"suite {path.name}"


def _parse(path: Path, where: str) -> _SuiteFile:
    try:
        raw = parse_toml(decode_text(path.read_bytes()))
        return _SuiteFile.model_validate(raw)
    except OSError as error:
        raise RecipeError(where, error.strerror or str(error), do="name a readable file") from None
    except Unreadable as bad:
        raise RecipeError(where, bad.found, do=bad.do) from None
    except ValidationError as error:
        raise _invalid_suite(error, raw, where) from None


def _invalid_suite(error: ValidationError, raw: dict[str, Any], where: str) -> RecipeError:
    """The first validation error as a RecipeError that names the task or measure."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    place, fields = where, _SuiteFile.model_fields
    if len(loc) > 2 and isinstance(loc[1], int):
        place = f'{where} · {loc[0]} "{raw[str(loc[0])][loc[1]].get("name", loc[1] + 1)}"'
        fields = (_TaskTable if loc[0] == "task" else _MeasureTable).model_fields
    return invalid_setting(first, place, fields)


def _tasks(suite: _SuiteFile, path: Path) -> tuple[Task, ...]:
    where = _where(path)
    _refuse_duplicates(where, "task", [t.name for t in suite.task])
    _refuse_duplicates(where, "measure", [m.name for m in suite.measure])
    scorers = {t.name: _scorer(t, where) for t in suite.task}
    measures = _measures(suite, scorers, where)
    tasks = []
    for table in suite.task:
        items = _items(table, scorers[table.name], path, where)
        full_name = f"{suite.name}/{table.name}"
        measures_of_task = tuple(m for m in measures if full_name in m.tasks)
        tasks.append(Task(full_name, table.answer, scorers[table.name], items, measures_of_task, suite.samples))
    return tuple(tasks)


def _refuse_duplicates(where: str, kind: str, names: list[str]) -> None:
    duplicates = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if duplicates:
        raise RecipeError(where, f'a second {kind} named "{duplicates[0]}"', do="give each a different name")


def _scorer(table: _TaskTable, where: str) -> Scorer:
    allowed = _SCORERS[table.answer]
    scorer = table.scorer or (allowed[0] if len(allowed) == 1 else None)
    if scorer not in allowed:
        problem = f'scorer = "{scorer}"' if scorer else '"scorer" is missing'
        raise RecipeError(
            f'{where} · task "{table.name}"',
            f'{problem} with answer = "{table.answer}"',
            allowed=f"there is: {', '.join(allowed)}",
        )
    return scorer  # type: ignore[return-value]  # narrowed by the membership test above


def _measures(suite: _SuiteFile, scorers: dict[str, Scorer], where: str) -> tuple[Measure, ...]:
    measures = [_measure(suite, table, scorers, where) for table in suite.measure]
    single_tasks = {m.tasks[0] for m in measures if m.of == "score" and len(m.tasks) == 1}
    for name, scorer in scorers.items():
        full_name = f"{suite.name}/{name}"
        if full_name not in single_tasks:
            measures.append(
                Measure(
                    full_name,
                    (full_name,),
                    "score",
                    _unit("score", scorer),
                    _default_better("score", scorer),
                    "",
                    name.replace("_", " "),
                )
            )
    _refuse_duplicates(where, "measure", [m.name for m in measures])
    return tuple(replace(measure, column=column) for column, measure in enumerate(measures))


def _measure(suite: _SuiteFile, table: _MeasureTable, scorers: dict[str, Scorer], where: str) -> Measure:
    where_measure = f'{where} · measure "{table.name}"'
    unknown = [name for name in table.tasks if name not in scorers]
    if unknown or not table.tasks:
        problem = f'"{unknown[0]}" is not a task of this suite' if unknown else "tasks is empty"
        raise RecipeError(where_measure, problem, allowed=f"there is: {', '.join(scorers)}")
    answers = {t.name: t.answer for t in suite.task}
    not_generated = [name for name in table.tasks if answers[name] != "generate"]
    if table.of != "score" and not_generated:
        raise RecipeError(
            where_measure, f'of = "{table.of}" of the task "{not_generated[0]}"', allowed='tasks with answer = "generate"'
        )
    units = {_unit(table.of, scorers[name]) for name in table.tasks}
    if len(units) > 1:
        raise RecipeError(
            where_measure, f"pools different units ({', '.join(sorted(units))})", do="define one measure per unit"
        )
    full_names = tuple(f"{suite.name}/{name}" for name in table.tasks)
    better = table.better or _default_better(table.of, scorers[table.tasks[0]])
    title = table.title or table.name.replace("_", " ")
    return Measure(f"{suite.name}/{table.name}", full_names, table.of, units.pop(), better, table.role, title)


def _unit(of: str, scorer: Scorer) -> Unit:
    if of == "tokens":
        return "tokens"
    return "nats" if of == "score" and scorer == "nats" else "share"


def _default_better(of: str, scorer: Scorer) -> Better:
    return "lower" if _unit(of, scorer) != "share" else "higher"


def _items(table: _TaskTable, scorer: Scorer, suite_path: Path, where: str) -> tuple[Item, ...]:
    where_task = f'{where} · task "{table.name}"'
    path = PACKAGE / table.items if table.items.startswith("starter/") else suite_path.parent / table.items
    items: list[Item] = []
    try:
        for number, item in json_lines(decode_text(path.read_bytes())):
            items.append(_item(item, table.answer, scorer, f"{where_task} · {path.name} line {number}"))
    except FileNotFoundError:
        raise RecipeError(where_task, f"there is no file {table.items}", do="name a path relative to the suite file") from None
    except OSError as error:
        raise RecipeError(f"{where_task} · {path.name}", error.strerror or str(error), do="name a readable file") from None
    except Unreadable as bad:
        line = f" line {bad.line}" if bad.line else ""
        raise RecipeError(f"{where_task} · {path.name}{line}", bad.found, do=bad.do) from None
    if not items:
        raise RecipeError(where_task, f"{table.items} has no items", do="add one item per line")
    _refuse_duplicates(f"{where_task} · {path.name}", "item", [str(item["id"]) for item in items])
    return tuple(items)


def _item(item: Any, answer: Answer, scorer: Scorer, where: str) -> Item:
    if not isinstance(item, dict):
        raise RecipeError(where, f"a {type(item).__name__}", allowed="a JSON object", do="correct the line")
    if (reason := unusable(item)) is not None:
        raise RecipeError(where, reason, do="correct the line")
    fields = _FIELDS[answer] | ({"checks": list} if scorer == "checks" else {})
    for name, kind in fields.items():
        if not isinstance(item.get(name), kind) or isinstance(item[name], bool):
            raise RecipeError(
                where, f'"{name}" is missing or not of type {kind.__name__}', allowed=f"fields: {', '.join(fields)}"
            )
    if answer == "choices" and not _choices_fit(item):
        raise RecipeError(where, "invalid choices", allowed="at least two different texts, and answer is the index of one")
    if scorer == "checks":
        _check_checks(item["checks"], where)
    if answer != "choices" and not item["prompt" if answer == "generate" else "text"].strip():
        raise RecipeError(where, "an empty text", do="write one or remove the line")
    checked: Item = item
    return checked


def _choices_fit(item: Item) -> bool:
    choices = item["choices"]
    texts = all(isinstance(c, str) and c for c in choices)
    return texts and len(set(choices)) == len(choices) >= 2 and 0 <= item["answer"] < len(choices)


def _check_checks(values: list[Any], where: str) -> None:
    if not values or not all(isinstance(c, dict) for c in values):
        raise RecipeError(where, "`checks` is not a list of tables", do='write for example [{"kind": "lines", "n": 3}]')
    try:
        for value in values:
            checks.check(value, "")
    except ValueError as error:
        raise RecipeError(where, str(error), do="correct the check") from None

"""`posttrain data check`: a file rendered exactly as a stage of a recipe would render it, with statistics.

It calls the functions that the stages call, so it shows the data that they see. Only the limit on dropped rows is lifted, so
that a bad file can be inspected.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.data.formats import DEMONSTRATION_LAYOUTS, PREFERENCE_LAYOUTS, content_of
from posttrain.data.report import format_report
from posttrain.data.sources import read_rows
from posttrain.errors import DataError, RecipeError
from posttrain.recipe import Recipe
from posttrain.stages import KINDS, Stage
from posttrain.stages.kind import Content, Preparation, Prepared, load_function
from posttrain.stages.shared_settings import TrainingSettings

_TITLES: dict[Content, str] = {"demonstrations": "demonstrations", "preferences": "preference pairs", "prompts": "prompts"}


class Check(NamedTuple):
    """A check: the stage whose settings apply, with the file as its data, and the base that renders it."""

    stage: Stage
    content: Content
    seed: int
    model: str
    template: str


def prepare_stage(stage: Stage, chat: ChatFormat, how: Preparation) -> Prepared:
    """The data of a stage as it will use it. Raises DataError as the stage would."""
    prepared: Prepared = load_function(KINDS[stage.kind].prepare)(stage, chat, how)
    return prepared


def plan_check(file: str, recipe: Recipe | None, stage_name: str | None, *, model: str, template: str) -> Check:
    """Choose the stage whose limits, and the base whose renderer, apply to a file. Raises DataError or RecipeError."""
    columns = list(read_rows(file)[0].value)
    content = content_of(columns)
    if content is None:
        raise DataError(
            f'data "{file}"', f"columns {', '.join(columns)}", allowed=f"{DEMONSTRATION_LAYOUTS} · {PREFERENCE_LAYOUTS}",
            do="rename the columns",
        )  # fmt: skip
    kinds = [name for name, kind in KINDS.items() if kind.inputs[0].contents[0] == content]
    if recipe is None:
        kind = next(name for name in kinds if _required(name) <= {"kind", "name", "data"})
        stage = KINDS[kind].settings(kind=kind, name="check", data=file)
        if model == "random:tiny" and template == "auto":
            template = "gemma"
        return Check(stage, content, 0, model, template)
    fitting = [s for s in recipe.stage if s.kind in kinds]
    wanted = " or ".join(kinds)
    there = ", ".join(s.name for s in fitting) or f"no {wanted} stage"
    if stage_name is not None:
        fitting = [s for s in recipe.stage if s.name == stage_name]
    if not fitting or fitting[0].kind not in kinds:
        found = f'"{stage_name}"' if stage_name else f"no {wanted} stage in the recipe"
        raise RecipeError("--stage", f"{found} for a file of {_TITLES[content]}", allowed=f"there is: {there}")
    return Check(fitting[0].model_copy(update={"data": file}), content, recipe.seed, recipe.base.model, recipe.base.template)


def _required(kind: str) -> set[str]:
    """The settings of a kind that have no default."""
    return {name for name, field in KINDS[kind].settings.model_fields.items() if field.is_required()}


def check_rows(
    check: Check, chat: ChatFormat, *, context: int, evaluation_prompts: Collection[str] = ()
) -> tuple[dict[str, Any], str]:
    """The report as data and as text, for a base with a context of `context` tokens."""
    report = prepare_stage(check.stage, chat, Preparation(check.seed, evaluation_prompts, context, allow_dropped=1.0)).report
    title = f"{_TITLES[check.content]} as {check.model} ({chat.template_name} template) would train on them"
    dropped = sum(report["dropped"].values())
    text = format_report(report, title)
    if isinstance(check.stage, TrainingSettings) and dropped > check.stage.allow_dropped * report["mixed_rows"]:
        allowed = f"{check.stage.allow_dropped:.0%}"
        text += f"\n\nwarning: {dropped} of {report['mixed_rows']} rows dropped; training refuses more than {allowed}"
    return report, text

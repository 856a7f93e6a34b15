"""`posttrain data check`: a file rendered exactly as a stage of a recipe would render it, with the numbers about it.

Where it stands: it calls what the training stages call, so that it cannot show anything else than training sees; only
the limit on dropped rows is lifted, since looking at a bad file is the point.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.data.formats import (
    DEMONSTRATION_LAYOUTS,
    PREFERENCE_LAYOUTS,
    kind_of,
    read_demonstrations,
    read_preferences,
)
from posttrain.data.prepare import PreparedPairs, PreparedRows, prepare_demonstrations, prepare_pairs
from posttrain.data.prompts import PreparedPrompts, prepare_prompts
from posttrain.data.ptx import prepare_ptx, with_ptx
from posttrain.data.report import format_report
from posttrain.data.sources import read_rows
from posttrain.errors import DataError, RecipeError
from posttrain.settings import DpoStage, PpoStage, Recipe, RewardStage, SftStage, Stage


class Check(NamedTuple):
    """What to look at, and as which stage."""

    stage: Stage
    seed: int
    model: str
    template: str


def prepare_stage(
    stage: Stage,
    chat: ChatFormat,
    *,
    seed: int,
    evaluation_prompts: Collection[str],
    context: int,
    allow_dropped: float | None = None,
) -> PreparedRows | PreparedPairs | PreparedPrompts:
    """A stage's rows as it will train on them on a base that can hold `context` tokens. Raises DataError as the stage would."""
    if isinstance(stage, PpoStage):
        prompts = prepare_prompts(
            stage.data, chat, seed=seed, max_prompt_tokens=stage.max_prompt_tokens, evaluation_prompts=evaluation_prompts,
            validation=stage.validation if stage.gold else 0.0,
        )  # fmt: skip
        if not stage.ptx_data:
            return prompts
        mix = prepare_ptx(stage, chat, seed=seed, evaluation_prompts=evaluation_prompts, context=context).report
        return prompts._replace(report=with_ptx(prompts.report, mix))
    allowed = stage.allow_dropped if allow_dropped is None else allow_dropped
    keywords: dict[str, Any] = {
        "max_tokens": stage.max_tokens, "validation": stage.validation, "allow_dropped": allowed,
        "evaluation_prompts": evaluation_prompts, "context": context,
    }  # fmt: skip
    if isinstance(stage, SftStage):
        return prepare_demonstrations(read_demonstrations(stage.data, seed=seed), chat, **keywords)
    margins = isinstance(stage, RewardStage)
    return prepare_pairs(read_preferences(stage.data, seed=seed, margins=margins), chat, **keywords)


def plan_check(file: str, recipe: Recipe | None, stage_name: str | None, *, model: str, template: str) -> Check:
    """Which stage's limits and which base's renderer a file is looked at with. Raises DataError or RecipeError."""
    columns = list(read_rows(file)[0].value)
    kind = kind_of(columns)
    if kind is None:
        raise DataError(
            f'data "{file}"', f"columns {', '.join(columns)}", allowed=f"{DEMONSTRATION_LAYOUTS} · {PREFERENCE_LAYOUTS}",
            do="rename the columns",
        )  # fmt: skip
    if recipe is None:
        made: Stage = (
            SftStage(kind="sft", name="check", data=file) if kind == "sft" else DpoStage(kind="dpo", name="check", data=file)
        )
        if model == "random:tiny" and template == "auto":
            template = "gemma"
        return Check(made, 0, model, template)
    kinds = ("sft",) if kind == "sft" else ("dpo", "reward")
    fitting = [s for s in recipe.stage if s.kind in kinds]
    there = ", ".join(s.name for s in fitting) or f"no {kind} stage"
    if stage_name is not None:
        fitting = [s for s in recipe.stage if s.name == stage_name]
    if not fitting or fitting[0].kind not in kinds:
        found = f'"{stage_name}"' if stage_name else f"no {kind} stage in the recipe"
        raise RecipeError("--stage", f"{found} for this {kind} data", allowed=f"there is: {there}")
    return Check(fitting[0].model_copy(update={"data": file}), recipe.seed, recipe.base.model, recipe.base.template)


def check_rows(
    check: Check, chat: ChatFormat, *, context: int, evaluation_prompts: Collection[str] = ()
) -> tuple[dict[str, Any], str]:
    """The report as data and as text, for a base that can hold `context` tokens."""
    prepared = prepare_stage(
        check.stage, chat, seed=check.seed, evaluation_prompts=evaluation_prompts, context=context, allow_dropped=1.0
    )
    kind = "demonstrations" if check.stage.kind == "sft" else "preference pairs"
    title = f"{kind} as {check.model} ({chat.template_name} template) would train on them"
    report = prepared.report
    dropped = sum(report["dropped"].values())
    text = format_report(report, title)
    if not isinstance(check.stage, PpoStage) and dropped > check.stage.allow_dropped * report["mixed_rows"]:
        allowed = f"{check.stage.allow_dropped:.0%}"
        text += f"\n\nwarning: {dropped} of {report['mixed_rows']} rows dropped; training refuses more than {allowed}"
    return report, text

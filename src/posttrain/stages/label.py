"""The kind `label`: preferences of a judge between answers, by a constitution. `constitution/label.py` does the work."""

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.errors import RecipeError
from posttrain.settings import Name, as_sources
from posttrain.stages.judge_settings import POLICY, REWARD, JudgedSettings, check_judge, judge_reads, judge_settings, weak_judge
from posttrain.stages.kind import PROMPTS, Earlier, Input, Reads, Section, Sizes, StageKind, Work


class LabelStage(JudgedSettings):
    """Preference pairs with probabilities from a judge: policies answer, and principles vote on each two answers."""

    kind: Literal["label"]
    """Stage kind."""
    policies: tuple[Name, ...] = ()
    """Policies that answer besides `init`: `base` or earlier stages."""
    answers: Annotated[int, Field(ge=0, le=64)] = 2
    """Answers of each policy to a prompt; all pairs of a prompt's answers are judged. 0 judges the two answers of each pair in
    the data, which must be preferences, and measures the agreement with their labels."""
    principles: Annotated[int, Field(ge=0)] = 0
    """Principles that vote on the answers to a prompt, drawn for each prompt by their weights; 0 takes all."""
    if_judge_refused: Literal["stop", "contrast"] = "stop"
    """What to do if the judge fails its audit: `stop`, or make the pairs as a contrast stage does, which needs no judge."""


def answering(stage: LabelStage) -> tuple[str, ...]:
    """The policies that answer the prompts."""
    return (stage.init, *stage.policies) if stage.answers else ()


def _reads(stage: LabelStage) -> Reads:
    judge = judge_reads(stage.judge)
    contrast = (stage.init,) if stage.if_judge_refused == "contrast" else ()
    return judge._replace(policies=(*answering(stage), *contrast, *judge.policies))


def _check(stage: LabelStage, earlier: Earlier) -> None:
    place = earlier.place
    check_judge(stage.judge, earlier)
    for name in stage.policies:
        earlier.check_policy("policies", name, "base")
    policies = (stage.init, *stage.policies)
    twice = next((name for name in policies if policies.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(place, f'the policy "{twice}" answers twice', allowed="each once", do="raise answers instead")
    if stage.answers == 0 and stage.policies:
        raise RecipeError(place, "policies with answers = 0", allowed="answers of the data are judged", do="remove policies")
    if stage.answers == 1 and not stage.policies:
        found = "answers = 1 of one policy"
        raise RecipeError(place, found, allowed="two or more answers a prompt", do="raise answers, or name policies")
    if stage.answers > 1 and stage.temperature == 0:
        found = f"temperature = 0 with answers = {stage.answers}, which are all equal"
        raise RecipeError(place, found, allowed="a temperature above 0", do="raise it, or set answers = 1 and name policies")
    if stage.allow_weak_judge and stage.if_judge_refused == "contrast":
        found = 'allow_weak_judge = true with if_judge_refused = "contrast"'
        raise RecipeError(place, found, allowed="one of the two", do="remove one")
    for source in as_sources(stage.data):
        if stage.answers == 0 and earlier.rows.get(source.stage or "", "preferences") != "preferences":
            found = f'data = "stage:{source.stage}" makes {earlier.rows[source.stage or ""]}, and answers = 0 needs pairs'
            raise RecipeError(place, found, allowed="preferences", do="raise answers, or give preferences")


def _estimate(stage: LabelStage, report: dict[str, Any], sizes: Sizes) -> Work:
    """The answers, and, if the judge is a model of this run, both orders of every comparison."""
    samples = report["train_rows"] * stage.answers * len(answering(stage))
    new = samples * stage.max_new_tokens
    tokens = report["tokens"] * len(answering(stage)) + new
    if judge_settings(stage.judge).name.startswith((POLICY, REWARD)):
        # The prompt and two answers of the greatest length; the text of the question is not counted.
        pair = report["tokens"] / report["train_rows"] + (2 * stage.max_new_tokens if stage.answers else 0)
        tokens += round(2 * report["comparisons"] * pair)
    return Work(report["train_rows"], tokens, new, 2.0 * (tokens * sizes.body + new * sizes.head))


KIND = StageKind(
    settings=LabelStage,
    makes="rows",
    content="preferences",
    code=1,
    inputs=(Input("data", PROMPTS),),
    prepare="posttrain.constitution.label_data:prepare_label",
    run="posttrain.constitution.label:write_label",
    reads=_reads,
    check=_check,
    estimate=_estimate,
    documents="posttrain.constitution.documents:judged_documents",
    refuses=weak_judge,
    sections=(Section("labels", "AI labels", "posttrain.report.constitution:labels"),),
)

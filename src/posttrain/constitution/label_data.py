"""The data of the label stage: prompts to answer, or pairs whose two answers are judged, and the principles that vote."""

import random
from typing import Any, NamedTuple

from posttrain.constitution.contrast_pairs import prepare_contrast
from posttrain.constitution.draws import draw_by_weight
from posttrain.constitution.principles import Constitution, Principle, load_constitution
from posttrain.data.chat import ChatFormat
from posttrain.data.formats import read_preferences
from posttrain.data.prepare import prepare_pairs
from posttrain.data.prompts import PromptRow, check_room, prepare_prompts
from posttrain.errors import DataError
from posttrain.stages.contrast import ContrastStage
from posttrain.stages.kind import Preparation
from posttrain.stages.label import LabelStage, answering
from posttrain.stages.shared_settings import own_seed

# Who gave the answers that the data has.
DATA = "data"


class AuthoredAnswer(NamedTuple):
    """An answer to a prompt, who gave it, and whether it ended by itself."""

    text: str
    by: str
    ended: bool = True


class LabelItem(NamedTuple):
    """A prompt and the principles that vote on its answers. `answers` are those of the data, if these are judged, and `human`
    is the probability that people prefer the first of them."""

    row: PromptRow
    principles: list[Principle]
    answers: tuple[AuthoredAnswer, ...] = ()
    human: float | None = None


class PreparedLabel(NamedTuple):
    """The prompts, the principles in use, and the report on the data."""

    items: list[LabelItem]
    constitution: Constitution
    report: dict[str, Any]


def prepare_label(stage: LabelStage, chat: ChatFormat, how: Preparation) -> PreparedLabel:
    """Read prompts or pairs and draw principles. Raises DataError if nothing is left or a prompt leaves no room for its answer,
    and RecipeError for a constitution that cannot be used."""
    where = f'stage "{stage.name}"'
    constitution = load_constitution(stage.constitution).without(stage.leave_out, where)
    constitution.having("comparison", f"constitution {stage.constitution}")
    seed = own_seed(stage, how.seed)
    if stage.answers:
        prompts = prepare_prompts(
            stage.data, chat, seed=how.seed, max_prompt_tokens=stage.max_prompt_tokens,
            evaluation_prompts=how.evaluation_prompts,
        )  # fmt: skip
        check_room(prompts.train, max_new_tokens=stage.max_new_tokens, context=how.context, where=where)
        items, report = [LabelItem(row, []) for row in prompts.train], prompts.report
    else:
        items, report = _answered(stage, chat, how, seed)
    if stage.if_judge_refused == "contrast":
        prepare_contrast(contrast_of(stage), chat, how)  # report its errors before asking the judge
    items = [item._replace(principles=_voters(constitution, stage, item.row.id, seed)) for item in items]
    answers = stage.answers * len(answering(stage))
    pairs = answers * (answers - 1) // 2 if answers else 1
    return PreparedLabel(items, constitution, report | {"comparisons": pairs * sum(len(item.principles) for item in items)})


def contrast_of(stage: LabelStage) -> ContrastStage:
    """The contrast stage that makes the pairs if the judge is refused. With principles = 0 it draws as many as by default."""
    count = stage.principles or ContrastStage.model_fields["principles"].default
    return ContrastStage(
        kind="contrast", name=stage.name, init=stage.init, data=stage.data, constitution=stage.constitution,
        leave_out=stage.leave_out, principles=count, max_prompt_tokens=stage.max_prompt_tokens,
        max_new_tokens=stage.max_new_tokens, temperature=stage.temperature, seed=stage.seed,
    )  # fmt: skip


def _voters(constitution: Constitution, stage: LabelStage, row: str, seed: int) -> list[Principle]:
    """The principles that vote on the answers to a prompt, in the order of the constitution."""
    drawn = {principle.id for principle in draw_by_weight(constitution.principle, row, count=stage.principles, seed=seed)}
    return [principle for principle in constitution.principle if principle.id in drawn]


def _answered(stage: LabelStage, chat: ChatFormat, how: Preparation, seed: int) -> tuple[list[LabelItem], dict[str, Any]]:
    """The pairs of the data. Which answer comes first is drawn for each pair: chance agreement is then one half."""
    read = read_preferences(stage.data, seed=how.seed, probabilities=True)
    prepared = prepare_pairs(
        read, chat, max_tokens=how.context, validation=0.0, allow_dropped=1.0, evaluation_prompts=how.evaluation_prompts,
        context=how.context,
    )  # fmt: skip
    records = {record.id: record for record in read.records}
    items = []
    for row in prepared.train:
        if len(row.prompt_ids) > stage.max_prompt_tokens:
            continue
        pair = records[row.id]
        text = "\n\n".join(message.content for message in pair.prompt)
        category = "" if pair.category == pair.source else pair.category
        prompt = PromptRow(pair.id, row.prompt_ids, text, pair.prompt, pair.source, category)
        answers = AuthoredAnswer(pair.chosen[0].content, DATA), AuthoredAnswer(pair.rejected[0].content, DATA)
        swapped = random.Random(f"{seed}|{pair.id}|sides").random() < 0.5
        human = 1 - pair.probability if swapped else pair.probability
        items.append(LabelItem(prompt, [], answers[::-1] if swapped else answers, human))
    long = len(prepared.train) - len(items)
    limit = f"longer than max_prompt_tokens = {stage.max_prompt_tokens}"
    if not items:
        raise DataError(f'stage "{stage.name}"', f"every prompt is {limit}", do="raise max_prompt_tokens or give other data")
    dropped = prepared.report["dropped"] | ({limit: long} if long else {})
    return items, prepared.report | {"train_rows": len(items), "dropped": dropped}

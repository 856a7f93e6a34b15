"""Preference pairs without a judge: the answer with principles in the system prompt is chosen over the plain answer.

The contrast stage writes such pairs (after Yang et al. 2024, RLCD), and so does a label stage whose judge failed its audit.
Answers are saved in parts, so that a stopped stage resumes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from posttrain.constitution.draws import draw_by_weight
from posttrain.constitution.principles import Constitution, Principle, load_constitution
from posttrain.constitution.prompts import contrast
from posttrain.constitution.saved_parts import in_parts
from posttrain.data.chat import ChatFormat
from posttrain.data.made_rows import reasons_text, turns_of, write_made_rows
from posttrain.data.prompts import PromptRow, check_room, prepare_prompts
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.records import Rollout
from posttrain.stages.contrast import ContrastStage
from posttrain.stages.kind import Preparation, Result
from posttrain.stages.shared_settings import own_seed
from posttrain.train.stage import StageContext

# Prompts whose answers are saved at once.
PART = 128


class Drawn(NamedTuple):
    """A prompt, the principles that were drawn for it, and its token ids with them in the system prompt."""

    row: PromptRow
    principles: list[Principle]
    ids: list[int]


class PreparedContrast(NamedTuple):
    """The prompts with their principles, and the report on the data."""

    drawn: list[Drawn]
    report: dict[str, Any]


def prepare_contrast(stage: ContrastStage, chat: ChatFormat, how: Preparation) -> PreparedContrast:
    """Draw principles for the prompts. Raises DataError if no prompt is left, or one leaves no room for its answer with or
    without principles, and RecipeError for a constitution that cannot be used."""
    where = f'stage "{stage.name}"'
    constitution = load_constitution(stage.constitution).without(stage.leave_out, where)
    prompts = prepare_prompts(
        stage.data, chat, seed=how.seed, max_prompt_tokens=stage.max_prompt_tokens, evaluation_prompts=how.evaluation_prompts
    )
    seed = own_seed(stage, how.seed)
    drawn = draw_principles(constitution, prompts.train, chat, count=stage.principles, seed=seed)
    longest = [PromptRow(f"{d.row.id} with {len(d.principles)} principles", d.ids, "") for d in drawn]
    check_room([*prompts.train, *longest], max_new_tokens=stage.max_new_tokens, context=how.context, where=where)
    return PreparedContrast(drawn, prompts.report)


def draw_principles(
    constitution: Constitution, rows: Sequence[PromptRow], chat: ChatFormat, *, count: int, seed: int
) -> list[Drawn]:
    """`count` principles for each prompt (0: all), without repetition, by weight."""
    drawn = []
    for row in rows:
        chosen = draw_by_weight(constitution.principle, row.id, count=count, seed=seed)
        drawn.append(Drawn(row, chosen, chat.encode_prompt(contrast(chosen, row.messages))))
    return drawn


def make_contrast(context: StageContext, stage: ContrastStage) -> Result:
    """Answer every prompt with and without principles and write the pairs. Raises DataError for data that cannot be used."""
    drawn, report = prepare_contrast(stage, context.base.chat, context.preparation)
    policy = context.policies.activate(stage.init)
    rows = in_parts(
        context, drawn, lambda part, number: _answer(context, stage, part, policy, number),
        name=stage.name, doing="answering with and without principles", size=PART,
    )  # fmt: skip
    usable = [row for row in rows if "dropped" not in row]
    dropped = Counter(row["dropped"] for row in rows if "dropped" in row)
    result = write_made_rows(context.folder, usable, report, planned=context.data, where=f'stage "{stage.name}"')
    warnings = (f"{dropped.total():,} of {len(rows):,} pairs are dropped: {reasons_text(dropped)}",) if dropped else ()
    return Result({**result.manifest, "pairs_dropped": dict(dropped)}, (*result.warnings, *warnings))


def _answer(
    context: StageContext, stage: ContrastStage, part: Sequence[Drawn], policy: str, number: int
) -> list[dict[str, Any]]:
    """The pairs of one part. A pair that cannot be used has a reason under `dropped`."""
    seed = own_seed(stage, context.recipe.seed)
    settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, (seed * 1_000_003 + number) % 2**31)
    # Both answers of a prompt run in one batch; prompts that begin alike share what is computed.
    rollouts = generate(context.base, [ids for d in part for ids in (d.ids, d.row.ids)], settings, policy)
    return [_pair(d, rollouts[2 * i], rollouts[2 * i + 1]) for i, d in enumerate(part)]


def _pair(drawn: Drawn, with_principles: Rollout, plain: Rollout) -> dict[str, Any]:
    chosen, rejected = with_principles.text.strip(), plain.text.strip()
    row = {
        "id": drawn.row.id, "prompt": turns_of(drawn.row.messages), "chosen": chosen,
        "rejected": rejected, "principles": [principle.id for principle in drawn.principles],
    }  # fmt: skip
    if not chosen or not rejected:
        return {**row, "dropped": "with an empty answer"}
    if not with_principles.ended or not plain.ended:
        return {**row, "dropped": "with an answer that does not end"}
    return {**row, "dropped": "with equal answers"} if chosen == rejected else row

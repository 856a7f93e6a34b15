"""Render the data of each kind of stage for training. `stages/` refers to these functions as `prepare`."""

from typing import Any, NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.data.formats import read_demonstrations, read_preferences
from posttrain.data.prepare import PreparedPairs, PreparedRows, TrainRow, prepare_demonstrations, prepare_pairs
from posttrain.data.prompts import PreparedPrompts, check_room, prepare_prompts
from posttrain.data.ptx import prepare_ptx, with_ptx
from posttrain.stages.kind import Preparation
from posttrain.stages.ppo import PpoStage
from posttrain.stages.shared_settings import TrainingSettings


def sft_rows(stage: TrainingSettings, chat: ChatFormat, how: Preparation) -> PreparedRows:
    """Demonstrations. Raises DataError as the stage would."""
    return prepare_demonstrations(read_demonstrations(stage.data, seed=how.seed), chat, **_limits(stage, how))


def preference_rows(stage: TrainingSettings, chat: ChatFormat, how: Preparation) -> PreparedPairs:
    """Preference pairs with the probabilities of their labels. Raises DataError as the stage would."""
    return prepare_pairs(read_preferences(stage.data, seed=how.seed, probabilities=True), chat, **_limits(stage, how))


def preference_rows_with_margins(stage: TrainingSettings, chat: ChatFormat, how: Preparation) -> PreparedPairs:
    """Preference pairs with their margins and probabilities. Raises DataError as the stage would."""
    pairs = read_preferences(stage.data, seed=how.seed, margins=True, probabilities=True)
    return prepare_pairs(pairs, chat, **_limits(stage, how))


class PpoData(NamedTuple):
    """Prompts to train on and to measure gold on, the rows of the pretraining mix, and the report on both."""

    prompts: PreparedPrompts
    ptx: list[TrainRow]
    report: dict[str, Any]


def ppo_data(stage: PpoStage, chat: ChatFormat, how: Preparation) -> PpoData:
    """Prompts with room for their completions, and the pretraining mix. Raises DataError as the stage would."""
    prompts = prepare_prompts(
        stage.data, chat, seed=how.seed, max_prompt_tokens=stage.max_prompt_tokens,
        evaluation_prompts=how.evaluation_prompts, validation=stage.validation if stage.gold else 0.0,
    )  # fmt: skip
    rows = [*prompts.train, *prompts.validation]
    check_room(rows, max_new_tokens=stage.max_new_tokens, context=how.context, where=f'stage "{stage.name}"')
    if not stage.ptx_data:
        return PpoData(prompts, [], prompts.report)
    ptx = prepare_ptx(stage, chat, seed=how.seed, evaluation_prompts=how.evaluation_prompts, context=how.context)
    return PpoData(prompts, ptx.train, with_ptx(prompts.report, ptx.report))


def _limits(stage: TrainingSettings, how: Preparation) -> dict[str, Any]:
    return {
        "max_tokens": stage.max_tokens, "validation": stage.validation, "evaluation_prompts": how.evaluation_prompts,
        "allow_dropped": stage.allow_dropped if how.allow_dropped is None else how.allow_dropped, "context": how.context,
    }  # fmt: skip

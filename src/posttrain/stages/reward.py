"""The kind `reward`: a reward model from preference pairs. `train/reward.py` does the work."""

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.stages.kind import Chart, Input, Reads, Section, Sizes, StageKind, Work, training_work
from posttrain.stages.shared_settings import TrainingSettings


class RewardStage(TrainingSettings):
    """A reward model: a scalar head and an adapter that score completions, from preference pairs."""

    kind: Literal["reward"]
    """Stage kind."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's scores in the loss, which keeps scores near 0; 0.01 is usual, 0 turns it off."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Peak learning rate."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of prompts held out to measure the reward model. A hash of the first user turn selects them."""


def _estimate(stage: RewardStage, report: dict[str, Any], sizes: Sizes) -> Work:
    """Training without the head over the vocabulary: a score is one product for each completion."""
    return training_work(stage, report, sizes._replace(target=0))


KIND = StageKind(
    settings=RewardStage,
    makes="reward model",
    code=1,
    inputs=(Input("data", ("preferences",)),),
    prepare="posttrain.data.stage_data:preference_rows_with_margins",
    run="posttrain.train.reward:train_reward",
    reads=lambda stage: Reads((stage.init,)),
    estimate=_estimate,
    charts=(
        Chart("loss", ("loss",)),
        Chart("accuracy", ("accuracy",)),
        Chart("scores of both sides", ("chosen_score", "rejected_score"), False),
        Chart("mean of a pair's scores", ("center",), False),
    ),
    sections=(Section("reward", "Reward model", "posttrain.report.rewards:rewards"),),
)

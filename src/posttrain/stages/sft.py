"""The kind `sft`: supervised fine-tuning on demonstrations. `train/sft.py` does the work."""

from typing import Literal

from posttrain.stages.kind import Chart, Input, Reads, StageKind, training_work
from posttrain.stages.shared_settings import TrainingSettings


class SftStage(TrainingSettings):
    """Supervised fine-tuning on demonstrations."""

    kind: Literal["sft"]
    """Stage kind."""


KIND = StageKind(
    settings=SftStage,
    makes="policy",
    code=1,
    inputs=(Input("data", ("demonstrations",)),),
    prepare="posttrain.data.stage_data:sft_rows",
    run="posttrain.train.sft:train_sft",
    reads=lambda stage: Reads((stage.init,)),
    estimate=training_work,
    charts=(Chart("loss", ("loss",)), Chart("trained tokens per step", ("targets",), False)),
)

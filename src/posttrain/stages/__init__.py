"""The table of the kinds of stage. A file for each kind has its settings, inputs, artifact, checks, estimate, work and charts.

A new kind needs a file here, a line of `KINDS`, and a file that does its work (docs/extending.md).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from posttrain.settings import Data, Source, as_sources
from posttrain.stages import contrast, critique, dpo, label, ppo, reward, sft
from posttrain.stages.kind import Artifact, StageKind
from posttrain.stages.shared_settings import StageSettings

KINDS: dict[str, StageKind] = {
    "sft": sft.KIND,
    "dpo": dpo.KIND,
    "reward": reward.KIND,
    "ppo": ppo.KIND,
    "contrast": contrast.KIND,
    "critique": critique.KIND,
    "label": label.KIND,
}

if TYPE_CHECKING:
    Stage = StageSettings
else:
    Stage = Annotated[Union[tuple(kind.settings for kind in KINDS.values())], Field(discriminator="kind")]  # noqa: UP007

# The file in the folder of a stage that makes rows.
ROWS_FILE = "rows.jsonl"


def makes(kind: str) -> Artifact:
    """The artifact of this kind of stage. A kind that this version does not know counts as making a policy."""
    return KINDS[kind].makes if kind in KINDS else "policy"


def data_of(stage: StageSettings) -> dict[str, tuple[Source, ...]]:
    """The sources of each setting of a stage that names data."""
    fields = {entry.field: _data(stage, entry.field) for entry in KINDS[stage.kind].inputs}
    return {field: as_sources(data) for field, data in fields.items() if data}


def row_stages(stage: StageSettings) -> tuple[str, ...]:
    """Names of the earlier stages whose rows a stage reads."""
    return tuple(source.stage for sources in data_of(stage).values() for source in sources if source.stage is not None)


def with_rows_of(stage: StageSettings, run: Path) -> StageSettings:
    """The stage, with the file in the run folder set for each source `stage:NAME`."""
    if not row_stages(stage):
        return stage
    located = {
        field: tuple(s.at(run / s.stage / ROWS_FILE) if s.stage is not None else s for s in sources)
        for field, sources in data_of(stage).items()
    }
    return stage.model_copy(update=located)


def _data(stage: Any, field: str) -> Data:
    data: Data = getattr(stage, field)
    return data

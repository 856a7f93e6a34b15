"""The kind `contrast`: preferences from a constitution without a judge. `constitution/contrast.py` does the work."""

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.errors import RecipeError
from posttrain.stages.kind import PROMPTS, Earlier, Input, Reads, Section, Sizes, StageKind, Work
from posttrain.stages.shared_settings import AnsweringSettings


class ContrastStage(AnsweringSettings):
    """Preference pairs: the answer that a policy gives with principles in its system prompt is chosen over its plain answer."""

    kind: Literal["contrast"]
    """Stage kind."""
    principles: Annotated[int, Field(ge=0)] = 3
    """Principles in the system prompt of an answer, drawn for each prompt by their weights; 0 takes all."""


def _check(stage: ContrastStage, earlier: Earlier) -> None:
    if not stage.constitution:
        raise RecipeError(earlier.place, "constitution is empty", allowed="a built-in name or a file (.toml)", do="name one")


def _estimate(stage: ContrastStage, report: dict[str, Any], sizes: Sizes) -> Work:
    """Two prompts and two answers each; the tokens of the principles are not counted."""
    new = 2 * report["train_rows"] * stage.max_new_tokens
    tokens = 2 * report["tokens"] + new
    return Work(report["train_rows"], tokens, new, 2.0 * (tokens * sizes.body + new * sizes.head))


KIND = StageKind(
    settings=ContrastStage,
    makes="rows",
    content="preferences",
    code=1,
    inputs=(Input("data", PROMPTS),),
    prepare="posttrain.constitution.contrast_pairs:prepare_contrast",
    run="posttrain.constitution.contrast:write_contrast",
    reads=lambda stage: Reads((stage.init,)),
    check=_check,
    estimate=_estimate,
    documents="posttrain.constitution.principles:fingerprints_of",
    sections=(Section("contrast", "Contrast", "posttrain.report.constitution:contrasts"),),
)

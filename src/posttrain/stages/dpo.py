"""The kind `dpo`: direct preference optimisation against a fixed reference. `train/dpo.py` does the work."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from posttrain.errors import RecipeError
from posttrain.losses.dpo_variants import VARIANTS
from posttrain.settings import Name
from posttrain.stages.kind import Chart, Earlier, Input, Reads, Sizes, StageKind, Work, training_work
from posttrain.stages.shared_settings import TrainingSettings

# The names come from the table, so that one file adds a variant.
if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(VARIANTS)]


class DpoStage(TrainingSettings):
    """Direct preference optimisation against a fixed reference."""

    kind: Literal["dpo"]
    """Stage kind."""
    reference: Name | Literal["init", "base"] = "init"
    """The policy in the denominator of the log-ratios; `init` is the policy that training starts from."""
    loss: LossName = "sigmoid"
    """`sigmoid` (DPO, and cDPO with label smoothing), `robust` (rDPO), `ipo` or `hinge` (SLiC)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the loss keeps the policy near the reference; its unit depends on the loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels (`sigmoid` and `robust` only)."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-5
    """Peak learning rate; a tenth of SFT's."""


def _reads(stage: DpoStage) -> Reads:
    return Reads((stage.init, stage.init if stage.reference == "init" else stage.reference))


def _check(stage: DpoStage, earlier: Earlier) -> None:
    earlier.check_policy("reference", stage.reference, "init", "base")
    smoothing = VARIANTS[stage.loss].smoothing
    if stage.label_smoothing and smoothing == "none":
        smoothed = " or ".join(name for name, variant in VARIANTS.items() if variant.smoothing != "none")
        raise RecipeError(earlier.place, f'label_smoothing with loss = "{stage.loss}"', allowed=smoothed, do="remove it")
    if smoothing == "required" and not stage.label_smoothing:
        found = f'loss = "{stage.loss}" without label_smoothing'
        raise RecipeError(earlier.place, found, allowed="0 < label_smoothing < 0.5", do="set it")


def _estimate(stage: DpoStage, report: dict[str, Any], sizes: Sizes) -> Work:
    """Training, and the log-probabilities of the reference once for each pair in training."""
    work = training_work(stage, report, sizes)
    reference = report["tokens"] * 2 * sizes.body + report["trained_tokens"] * 2 * sizes.head
    return work._replace(operations=work.operations + min(1.0, stage.epochs) * reference)


KIND = StageKind(
    settings=DpoStage,
    makes="policy",
    code=2,
    inputs=(Input("data", ("preferences",)),),
    prepare="posttrain.data.stage_data:preference_rows",
    run="posttrain.train.dpo:train_dpo",
    reads=_reads,
    check=_check,
    estimate=_estimate,
    charts=(
        Chart("loss", ("loss",)),
        Chart("margin", ("margin",)),
        Chart("accuracy", ("accuracy",)),
        Chart("log-ratio to the reference, nats", ("chosen_log_ratio", "rejected_log_ratio")),
        Chart("KL to the reference, nats per token", ("dpo/kl",)),
        Chart("log-probability, nats", ("chosen_logprob", "rejected_logprob"), False),
        Chart("ranks chosen above rejected", ("ranking_accuracy",), False),
        Chart("gradient weight", ("gradient_weight",), False),
    ),
)

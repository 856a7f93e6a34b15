"""Settings that several kinds of stage share."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.settings import Data, Name, Settings


class StageSettings(Settings):
    """Settings of every stage."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"name"})

    kind: str
    """Stage kind."""
    name: Name
    """Name of the stage, its folder and its policy."""
    init: Name | Literal["base"] = "base"
    """The policy that training starts from: `base` or an earlier stage."""
    data: Data
    """A data file, or a list of files or `{path, weight}` to mix."""


class AnsweringSettings(StageSettings):
    """Settings of every stage in which policies answer prompts by a constitution."""

    constitution: str = "starter"
    """A constitution that comes with posttrain, or a constitution file (.toml)."""
    leave_out: tuple[str, ...] = ()
    """Ids or tags of principles that are not used, so that what the others cover can be measured."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest prompt in tokens, without principles; longer prompts are left out, counted and shown."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    """Longest answer in tokens; pairs and revisions with an answer that does not end are dropped, counted and shown."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of the draws of principles and of the samples; none takes the recipe's."""


class OptimisedSettings(StageSettings):
    """Settings of every stage that trains."""

    no_effect: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "checkpoint_minutes"})

    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Peak learning rate. LoRA needs about ten times the rate of full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up (cosine and linear end at a tenth of the peak)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between checkpoints; with 0 only `checkpoint_minutes` counts."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 2.0
    """Minutes between checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of a new adapter or head, of dropout, of the order of the data and of samples; the default is the recipe's seed.
    Give each member of an ensemble, and each repetition of a stage, a different seed."""


class TrainingSettings(OptimisedSettings):
    """Settings of every stage that trains on fixed rows."""

    epochs: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Passes over the data; fractions are allowed."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Rows (conversations or pairs) in one optimiser step."""
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens; longer rows are cut (SFT) or dropped (pairs), counted and shown."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Share of prompts held out for the validation loss. A hash of the first user turn selects them."""
    keep: Literal["best", "last"] = "last"
    """Which weights are published: those with the lowest validation loss, or those of the last step."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this number of validations without a new best loss; 0 never stops early."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between validations; 0 validates at the end only (with patience: four times an epoch)."""
    allow_dropped: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the rows that may be dropped (too long, empty, duplicate sides) before it is an error."""


def own_seed(stage: AnsweringSettings | OptimisedSettings, default: int) -> int:
    """The stage's own seed, or the recipe's, which is the default."""
    return default if stage.seed is None else stage.seed

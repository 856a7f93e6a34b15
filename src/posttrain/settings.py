"""Every setting of a run: typed, frozen, documented.

Where it stands: `recipe.py` reads TOML into these tables and checks what they say of each other. Stages are told apart by
`kind`. The string under each field feeds `docs/configuration.md`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

# Sizes that a number of a recipe may have, where its own setting does not say less: whole ones fit 32 bits, others float32.
SMALLEST, LARGEST_WHOLE, LARGEST = 1e-12, 2**31, 1e37

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="after")
    @classmethod
    def _of_a_usual_size(cls, value: Any) -> Any:
        """Numbers whose products and quotients stay finite; the zero below zero is zero."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        largest = LARGEST_WHOLE if isinstance(value, int) else LARGEST
        if abs(value) > largest or 0 < abs(value) < SMALLEST:
            raise PydanticCustomError("size", f"0, or {SMALLEST:g} to {largest:g} in size")
        return 0.0 if isinstance(value, float) and value == 0 else value


class Base(_Settings):
    """The pretrained model that everything starts from."""

    model: str
    """A hub id, a folder, a `.gguf` file, `package:gemma3-270m`, `package:smollm2-135m-instruct` or `random:tiny`."""
    template: Literal["auto", "gemma", "chatml", "llama3", "plain"] = "auto"
    """Chat template: `auto` (the model's own), `gemma`, `chatml`, `llama3` or `plain`."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the frozen weights; `auto` is bfloat16 where the processor multiplies it natively, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a CUDA device where there is one."""
    recompute: bool = False
    """Whether training keeps of each layer its input alone, and computes the rest again in the backward: less memory, one more
    forward a step. No result depends on it, so it may be changed between a stop and a resume."""


class Adapter(_Settings):
    """What is trained on top of the frozen base."""

    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank matrices; `full` trains and stores every weight."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank R of the low-rank matrices."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the low-rank product is multiplied by alpha / R."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs set to zero while training; ppo stages train without."""
    targets: Literal["all", "attention", "mlp"] | tuple[str, ...] = "all"
    """Linear layers that get an adapter: `all`, `attention`, `mlp`, or a list of layer names such as `q_proj`."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard` scales by alpha / R, `rslora` by alpha / sqrt(R) (Kalajdzievski 2023)."""
    train_tokens: tuple[str, ...] = ()
    """Tokens whose embedding rows are trained beside the adapter, for template tokens that the base never saw."""


class Source(_Settings):
    """One of several data files that are mixed."""

    path: str
    """A file (.jsonl .json .parquet .csv), a `save_to_disk` folder, a hub dataset id, or `starter/<file>`."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share of this source's rows that is used: 0.5 takes half of them, 2 takes each twice."""


class _Stage(_Settings):
    name: Name
    """Name of the stage, its folder and its policy."""
    init: Name | Literal["base"] = "base"
    """The policy that training starts from: `base` or an earlier stage."""


class _Optimised(_Stage):
    data: str | tuple[Source, ...]
    """A data file, or a list of `{path, weight}` to mix."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Peak learning rate. LoRA wants about ten times the rate of full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up (cosine and linear end at a tenth of the peak)."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between checkpoints; 0 leaves it to `checkpoint_minutes`."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 2.0
    """Minutes between checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of a new adapter or head, of dropout, of the order of the data and of samples; none takes the recipe's. Members of
    an ensemble, and repetitions of a stage, differ in it."""


class _Training(_Optimised):
    epochs: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Passes over the data; fractions are allowed."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Rows (conversations or pairs) of one optimiser step."""
    max_tokens: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens; longer rows are cut (SFT) or dropped (pairs), counted and shown."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.05
    """Share of the prompts (by a hash of the first user turn) that is kept for the validation loss."""
    keep: Literal["best", "last"] = "last"
    """Which weights are published: of the lowest validation loss, or of the last step."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many validations without a new best; 0 never stops early."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps between validations; 0 validates at the end only (with patience: four times an epoch)."""
    allow_dropped: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the rows that may be dropped (too long, empty, duplicate sides) before it is an error."""


class SftStage(_Training):
    """Supervised fine-tuning on demonstrations."""

    kind: Literal["sft"]
    """Stage kind."""


class DpoStage(_Training):
    """Direct preference optimisation against a fixed reference."""

    kind: Literal["dpo"]
    """Stage kind."""
    reference: Name | Literal["init", "base"] = "init"
    """The policy that the log-ratios are taken against; `init` is the policy that training starts from."""
    loss: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid"
    """`sigmoid` (DPO, and cDPO with label smoothing), `robust` (rDPO), `ipo` or `hinge` (SLiC)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference; its unit depends on the loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels (`sigmoid` and `robust` only)."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-5
    """Peak learning rate; a tenth of SFT's."""


class RewardStage(_Training):
    """A reward model: a scalar head and an adapter that score completions, from preference pairs."""

    kind: Literal["reward"]
    """Stage kind."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's scores in the loss, which keeps scores near 0; 0.01 is usual where it is used."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Peak learning rate."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of the prompts (by a hash of the first user turn) that is kept for measuring the reward model."""


class RewardPart(_Settings):
    """One part of what a ppo stage is paid by; the parts are added."""

    models: tuple[Name, ...] = ()
    """Reward stages whose models score a completion; several are an ensemble."""
    function: str = ""
    """A Python function `package.module:function` of `(prompts, completions)` instead of models. It is run."""
    combine: Literal["mean", "min", "mean_minus_variance"] = "mean"
    """How the scores of an ensemble become one."""
    variance_weight: Annotated[float, Field(ge=0)] = 0.1
    """What the ensemble's variance costs with `mean_minus_variance`."""
    weight: float = 1.0
    """What the part is multiplied by; a negative one makes it a cost."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a call of the function, or importing it, may take."""


class PpoStage(_Optimised):
    """Proximal policy optimisation against reward models, functions, or a sum of both."""

    kind: Literal["ppo"]
    """Stage kind."""
    reward: str | tuple[RewardPart, ...]
    """What scores completions: a reward stage, a function `package.module:function` (it is run), or a list of parts."""
    gold: str | tuple[RewardPart, ...] = ()
    """What the policy should be good at and is not trained on, written as `reward` is: it is measured on held-out prompts,
    stops the run where it falls while the score rises, and chooses the policy that is published. None measures nothing."""
    gold_every: Annotated[int, Field(ge=1)] = 1
    """Iterations between evaluations by gold."""
    gold_prompts: Annotated[int, Field(ge=2)] = 64
    """Held-out prompts that the policy answers at an evaluation, at most."""
    gold_patience: Annotated[int, Field(ge=0)] = 1
    """Last evaluations whose mean must have fallen below the best one for the run to be stopped; 0 never stops."""
    gold_compare: tuple[Name, ...] = ()
    """Earlier policies, such as one of a dpo stage, that are evaluated beside this one, to be compared at equal KL."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of the prompts (by a hash of the first user turn) that is kept for `gold`; without gold none is kept."""
    reference: Name | Literal["init", "base"] = "init"
    """The policy that the KL is taken against; `init` is the policy that training starts from."""
    estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """Advantages: `gae` with a value function, or `rloo` or `grpo` from several completions a prompt."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """How often the policy samples and learns."""
    prompts: Annotated[int, Field(ge=1)] = 32
    """Prompts of an iteration."""
    completions: Annotated[int, Field(ge=1)] = 1
    """Completions of each prompt; `rloo` and `grpo` need at least 2."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest prompt in tokens; longer ones are left out, counted and shown."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Temperature of the samples, of the reference and of the update alike."""
    ppo_epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over an iteration's completions."""
    minibatch: Annotated[int, Field(ge=1)] = 16
    """Prompts of one optimiser step; where it is more than there are, a pass is one step."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far a token's probability ratio counts before it is clipped."""
    value_clip: Annotated[float, Field(ge=0)] = 0.0
    """How far a value may move in an iteration before it is clipped, in units of the score; 0 does not clip."""
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value function's loss."""
    value_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-4
    """Peak learning rate of what only the value function has; its gradient is clipped by itself."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's lambda."""
    value: Literal["auto", "own", "shared"] = "auto"
    """The value function: `own` (an adapter of its own) or `shared` (a head on the policy). `auto` is `own`; `shared` with full
    weights, where there is no other."""
    value_init: Literal["auto", "reward", "policy"] | Name = "auto"
    """Where the value function starts: `reward` (the reward model with its head), another reward stage, or `policy` (the init
    policy's adapter, a head of zeros). `auto` is `reward`; `policy` where no model scores, or with `value = "shared"`."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """What a nat of KL from the reference costs of the reward; with `target_kl` where it starts."""
    target_kl: Annotated[float, Field(ge=0)] = 0.0
    """KL of a completion, in nats, that the coefficient is moved towards; 0 keeps it fixed."""
    kl_horizon: Annotated[int, Field(ge=1)] = 10_000
    """Completions over which the coefficient follows `target_kl`."""
    max_kl: Annotated[float, Field(ge=0)] = 50.0
    """KL of a completion, in nats, at which the stage stops; 0 never does."""
    max_update_kl: Annotated[float, Field(ge=0)] = 0.0
    """Approximate KL from the policy that sampled, in nats a token, above which no further pass is taken; 0 takes all."""
    min_entropy: Annotated[float, Field(ge=0)] = 0.01
    """Entropy of the samples, in nats a token, below which the stage stops: they are all the same; 0 never does."""
    max_mismatch: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of sampled tokens whose probability in training may be more than a tenth off before the stage stops."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the policy's entropy, in nats a token, that every optimiser step raises; 0 raises none."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """What a completion that does not end loses of its score."""
    whiten_rewards: bool = False
    """Whether rewards are divided by their standard deviation over the iteration (`gae` only)."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the log-likelihood of `ptx_data`, the mean over its tokens, in every optimiser step (PPO-ptx); 0 has none."""
    ptx_data: str | tuple[Source, ...] = ""
    """Demonstrations, or rows of plain text (`text`), that are mixed into the update: `minibatch` of them a step."""
    ptx_max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest row of `ptx_data` in tokens; longer rows are cut, counted and shown."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate falls after the warm-up."""


# What `value_init` says without naming a stage.
VALUE_WORDS = frozenset({"auto", "reward", "policy"})


def reward_parts(written: str | tuple[RewardPart, ...]) -> tuple[RewardPart, ...]:
    """`reward` or `gold` as a list of parts: a text with a colon names a function, any other a reward stage."""
    if isinstance(written, tuple):
        return written
    return (RewardPart(function=written) if ":" in written else RewardPart(models=(written,)),) if written else ()


def part_name(part: RewardPart) -> str:
    """What a part is called in metrics: its models or its function, in letters that every tracker takes."""
    return part.function.replace(":", ".") or "-".join(part.models)


Stage = Annotated[SftStage | DpoStage | RewardStage | PpoStage, Field(discriminator="kind")]
STAGE_KINDS: dict[str, type[SftStage | DpoStage | RewardStage | PpoStage]] = {
    "sft": SftStage, "dpo": DpoStage, "reward": RewardStage, "ppo": PpoStage,
}  # fmt: skip


class Evaluation(_Settings):
    """What the base and every policy are measured on."""

    suites: tuple[str, ...] = ("starter",)
    """Names of built-in suites, or paths of suite files (TOML)."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Items of each task that are used, the first ones; 0 uses all."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    """Longest answer in tokens; an answer that has not stopped by then counts as not stopping."""
    sample_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    """Longest answer to a sample prompt in tokens."""
    samples: tuple[str, ...] = ()
    """Prompts that every policy answers side by side in the report; none takes the six of the starter suite."""


class Recipe(_Settings):
    """A whole run."""

    name: Name
    """Name of the run and of its folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random: same seed, same run."""
    base: Base
    """The pretrained model."""
    adapter: Adapter = Adapter()
    """What is trained on top of it."""
    stage: tuple[Stage, ...]
    """The stages, in order."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl."""

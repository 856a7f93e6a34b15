"""The kind `ppo`: a policy learns from the scores of its own completions. `train/ppo.py` does the work."""

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.errors import RecipeError, nearest
from posttrain.settings import Data, Name
from posttrain.stages.kind import (
    PROMPTS,
    Chart,
    Earlier,
    Input,
    Iterations,
    Reads,
    RewardFunction,
    Section,
    Sizes,
    StageKind,
    Work,
)
from posttrain.stages.reward_parts import RewardPart, check_parts, reward_parts
from posttrain.stages.shared_settings import OptimisedSettings


class PpoStage(OptimisedSettings):
    """Proximal policy optimisation against reward models, functions, or a sum of both."""

    kind: Literal["ppo"]
    """Stage kind."""
    reward: str | tuple[RewardPart, ...]
    """What scores completions: a reward stage, a function `package.module:function` (it is run), or a list of parts."""
    gold: str | tuple[RewardPart, ...] = ()
    """A scorer that the policy is not trained on, written like `reward`. It is measured on held-out prompts, stops the run if
    it falls while the score rises, and chooses the policy that is published. Without it nothing is measured."""
    gold_every: Annotated[int, Field(ge=1)] = 1
    """Iterations between evaluations by gold."""
    gold_prompts: Annotated[int, Field(ge=2)] = 64
    """The largest number of held-out prompts that the policy answers in an evaluation."""
    gold_patience: Annotated[int, Field(ge=0)] = 1
    """The run stops if the mean of this number of last evaluations is below the best one; 0 never stops."""
    gold_compare: tuple[Name, ...] = ()
    """Earlier policies, such as that of a dpo stage, that are evaluated too, for a comparison at equal KL."""
    validation: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of prompts held out for `gold`; without gold, none. A hash of the first user turn selects them."""
    reference: Name | Literal["init", "base"] = "init"
    """The reference policy of the KL; `init` is the policy that training starts from."""
    estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """Advantages: `gae` with a value function, or `rloo` or `grpo` from several completions a prompt."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """How often the policy samples and learns."""
    prompts: Annotated[int, Field(ge=1)] = 32
    """Prompts in an iteration."""
    completions: Annotated[int, Field(ge=1)] = 1
    """Completions of each prompt; `rloo` and `grpo` need at least 2."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest prompt in tokens; longer ones are left out, counted and shown."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 64
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Temperature of the samples, of the reference and of the update."""
    ppo_epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over an iteration's completions."""
    minibatch: Annotated[int, Field(ge=1)] = 16
    """Prompts in one optimiser step; if there are fewer prompts, a pass is one step."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far the probability ratio of a token may be from 1 before it is clipped."""
    value_clip: Annotated[float, Field(ge=0)] = 0.0
    """How far a value may move in an iteration before it is clipped, in units of the score; 0 does not clip."""
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value function's loss."""
    value_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-4
    """Peak learning rate of the weights that only the value function has; their gradient is clipped separately."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's lambda."""
    value: Literal["auto", "own", "shared"] = "auto"
    """The value function: `own` (a separate adapter) or `shared` (a head on the policy). `auto` is `own`, and `shared` with
    full weights, which allow no other."""
    value_init: Literal["auto", "reward", "policy"] | Name = "auto"
    """Where the value function starts: `reward` (the reward model with its head), another reward stage, or `policy` (the init
    policy's adapter, a head of zeros). `auto` is `reward`, and `policy` if no model scores or with `value = "shared"`."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """The cost in reward of one nat of KL from the reference; with `target_kl` the start of this cost."""
    target_kl: Annotated[float, Field(ge=0)] = 0.0
    """KL of a completion, in nats, that the adaptive coefficient aims at; 0 keeps the coefficient fixed."""
    kl_horizon: Annotated[int, Field(ge=1)] = 10_000
    """Completions over which the coefficient follows `target_kl`."""
    max_kl: Annotated[float, Field(ge=0)] = 50.0
    """KL of a completion, in nats, at which the stage stops; 0 never stops."""
    max_update_kl: Annotated[float, Field(ge=0)] = 0.0
    """Approximate KL from the sampling policy, in nats a token, above which the remaining passes are skipped; 0 skips none."""
    min_entropy: Annotated[float, Field(ge=0)] = 0.01
    """Entropy of the samples, in nats a token, below which the stage stops, because all samples are alike; 0 never stops."""
    max_mismatch: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of sampled tokens whose probability in training may be more than a tenth off before the stage stops."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the bonus for the policy's entropy, in nats a token; 0 gives none."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """What is subtracted from the score of a completion that does not end."""
    whiten_rewards: bool = False
    """Whether rewards are divided by their standard deviation over the iteration (`gae` only)."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean log-likelihood of the tokens of `ptx_data` in every optimiser step (PPO-ptx); 0 turns it off."""
    ptx_data: Data = ""
    """Demonstrations, or rows of plain text (`text`), that are mixed into the update: `minibatch` rows a step."""
    ptx_max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest row of `ptx_data` in tokens; longer rows are cut, counted and shown."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 5e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate falls after the warm-up."""


# The values of `value_init` that are not names of stages.
VALUE_WORDS = frozenset({"auto", "reward", "policy"})
# Settings that only the value function reads.
_OF_GAE = frozenset(
    {"value", "value_init", "value_coef", "value_learning_rate", "value_clip", "gamma", "lam", "whiten_rewards"}
)


def _reads(stage: PpoStage) -> Reads:
    parts = reward_parts(stage.reward) + reward_parts(stage.gold)
    models = {name for part in parts for name in part.models} | ({stage.value_init} - VALUE_WORDS)
    policies = (stage.init, stage.init if stage.reference == "init" else stage.reference, *stage.gold_compare)
    functions = tuple(RewardFunction(part.function, part.timeout) for part in parts if part.function)
    return Reads(policies, tuple(sorted(models)), functions)


def _check(stage: PpoStage, earlier: Earlier) -> None:
    place = earlier.place
    if earlier.full and (stage.value == "own" or stage.value_init not in ("auto", "policy")):
        # Only one set of weights is in memory, so the value function must be a head on it.
        found = f'value = "{stage.value}", value_init = "{stage.value_init}" with [adapter] kind = "full"'
        raise RecipeError(place, found, allowed='value = "shared", a head on the policy', do="remove both settings")
    earlier.check_policy("reference", stage.reference, "init", "base")
    if not stage.reward:
        raise RecipeError(place, "reward has no part", allowed="a reward stage, a function or a list of parts", do="give one")
    check_parts(place, "reward", reward_parts(stage.reward), earlier.reward_models)
    check_parts(place, "gold", reward_parts(stage.gold), earlier.reward_models)
    if stage.gold and not stage.validation:
        raise RecipeError(place, "gold with validation = 0", allowed="0 < validation < 0.5", do="gold needs held-out prompts")
    if stage.gold_compare and not stage.gold:
        raise RecipeError(place, "gold_compare without gold", do="set gold, or remove it")
    for name in stage.gold_compare:
        earlier.check_policy("gold_compare", name)
    _check_estimator(place, stage)
    _check_coefficients(place, stage)
    _check_value(place, stage, earlier.reward_models)


def _check_estimator(place: str, stage: PpoStage) -> None:
    if stage.estimator != "gae" and stage.completions < 2:
        found = f'estimator = "{stage.estimator}" with completions = {stage.completions}'
        raise RecipeError(place, found, allowed="at least 2 completions of a prompt", do="raise completions, or use gae")
    only_gae = sorted(_OF_GAE & stage.model_fields_set)
    if stage.estimator != "gae" and only_gae:
        found = f'{", ".join(only_gae)} with estimator = "{stage.estimator}"'
        raise RecipeError(place, found, allowed='estimator = "gae"', do="remove it")


def _check_coefficients(place: str, stage: PpoStage) -> None:
    if stage.target_kl and not stage.kl_coef:
        found = f"target_kl = {stage.target_kl:g} with kl_coef = 0, which a factor cannot change"
        raise RecipeError(place, found, allowed="kl_coef above 0", do="set kl_coef to its start value")
    if "kl_horizon" in stage.model_fields_set and not stage.target_kl:
        found = "kl_horizon without target_kl"
        raise RecipeError(place, found, allowed="target_kl above 0", do="set target_kl, or remove kl_horizon")
    if bool(stage.ptx_coef) != bool(stage.ptx_data):
        found = f"ptx_coef = {stage.ptx_coef:g} without ptx_data" if stage.ptx_coef else "ptx_data with ptx_coef = 0"
        raise RecipeError(place, found, allowed="both or neither", do="set both, or remove both")


def _check_value(place: str, stage: PpoStage, reward_models: tuple[str, ...]) -> None:
    if stage.value == "shared" and stage.value_init not in ("auto", "policy"):
        found = f'value_init = "{stage.value_init}" with value = "shared"'
        raise RecipeError(place, found, allowed="auto or policy: the head is on the policy's adapter", do="remove it")
    models = [name for part in reward_parts(stage.reward) for name in part.models]
    there = ["auto", *(["reward"] if models else []), "policy", *reward_models]
    if stage.value_init not in there:
        found = f'value_init = "{stage.value_init}" is not an earlier reward stage'
        raise RecipeError(place, found, allowed=f"there is: {', '.join(there)}", do=nearest(stage.value_init, there))
    written, meant = "value_init" in stage.model_fields_set, models[:1] if stage.value_init == "reward" else []
    if written and stage.value_init in VALUE_WORDS and stage.value_init in reward_models and meant != [stage.value_init]:
        found = f'value_init = "{stage.value_init}" is a keyword and also a reward stage'
        raise RecipeError(place, found, do="give the stage another name")


def gold_that_pays(stage: PpoStage) -> tuple[str, ...]:
    """A warning if gold, or a part of it, is also part of the reward."""
    reward, gold = (
        {name for part in reward_parts(written) for name in (*part.models, part.function) if name}
        for written in (stage.reward, stage.gold)
    )
    both = ", ".join(sorted(reward & gold))
    warning = f"gold is also part of the reward: {both}; it cannot show faults of the score, so give another gold scorer"
    return (warning,) if both else ()


def _estimate(stage: PpoStage, report: dict[str, Any], sizes: Sizes) -> Work:
    """Sampling, forwards to judge (policy, reference, value, reward models), the passes of policy and value, and gold."""
    # Whether the value function has a separate adapter, and so separate forward and training passes.
    own_value = stage.estimator == "gae" and stage.value != "shared" and not sizes.full
    models = sum(len(part.models) for part in reward_parts(stage.reward))
    rows = stage.iterations * min(stage.prompts, report["train_rows"]) * stage.completions
    targets = rows * stage.max_new_tokens
    tokens = round(rows * report["tokens"] / report["train_rows"]) + targets
    a_pass = tokens * sizes.token * (1 + own_value) + targets * sizes.target
    operations = tokens * 2.0 * (3 + own_value + models) * sizes.body + targets * 6 * sizes.head + stage.ppo_epochs * a_pass
    if "ptx" in report:  # one row for each prompt of a pass
        seen = stage.ppo_epochs * rows / stage.completions / report["ptx"]["rows"]
        operations += seen * (report["ptx"]["tokens"] * sizes.token + report["ptx"]["trained_tokens"] * sizes.target)
    if stage.gold:
        # One evaluation before the first step, and two on fresh answers at the end.
        answers = min(stage.gold_prompts, report["validation_rows"]) * (stage.iterations // stage.gold_every + 3)
        models += sum(len(part.models) for part in reward_parts(stage.gold))
        operations += answers * (tokens * 2.0 * (3 + models) * sizes.body + targets * 6 * sizes.head) / rows
    return Work(rows, tokens, targets, operations)


_CHARTS = (
    Chart("score", ("score",)),
    Chart("KL to the reference, nats per completion", ("ppo/kl",)),
    Chart("gold on held-out prompts", ("gold",)),
    Chart("mean of each part of the score", ("score part",)),
    Chart("disagreement of an ensemble's members", ("ensemble part",)),
    Chart("loss", ("loss",)),
    Chart("score minus KL and penalty", ("reward",)),
    Chart("tokens per completion", ("length",)),
    Chart("share that ended", ("ended",)),
    Chart("repeated runs of four tokens", ("repetition",), False),
    Chart("standard deviation of the scores", ("score_spread",), False),
    Chart("policy loss", ("policy_loss",), False),
    Chart("value loss", ("value_loss",), False),
    Chart("loss of the pretraining mix, nats per token", ("ptx_loss",), False),
    Chart("advantages before whitening", ("advantage", "advantage_spread"), False),
    Chart("explained variance of the returns", ("explained_variance",), False),
    Chart("share of clipped tokens", ("clip_fraction",), False),
    Chart("share of clipped values", ("value_clip_fraction",), False),
    Chart("ratio to the policy that sampled", ("ratio",), False),
    Chart("approximate KL to the policy that sampled", ("approximate_kl",), False),
    Chart("KL by the k3 estimator, nats per completion", ("positive_kl",), False),
    Chart("KL coefficient", ("kl_coef",), False),
    Chart("entropy, nats per token", ("entropy",), False),
    Chart("score on held-out prompts", ("gold_score",), False),
    Chart("KL to the start on held-out prompts", ("gold_kl",), False),
    Chart("standard error of gold", ("gold_se",), False),
    Chart("standard error of the score on held-out prompts", ("gold_score_se",), False),
    Chart("tokens with different log-probabilities in the sampler", ("mismatch",), False),
)
_ITERATIONS = Iterations(
    marks=("ppo/score", "ppo/kl", "ppo/entropy", "ppo/length", "time/rollout"),
    once=frozenset((
        "ppo/score", "ppo/reward", "ppo/kl", "ppo/positive_kl", "ppo/kl_coef", "ppo/entropy", "ppo/length", "ppo/ended",
        "ppo/mismatch", "ppo/score_spread", "ppo/advantage", "ppo/advantage_spread", "ppo/repetition",
        "ppo/explained_variance", "ppo/gold", "ppo/gold_se", "ppo/gold_score", "ppo/gold_score_se", "ppo/gold_kl",
        "time/rollout_tokens_per_second",
    )),
    parts={"ppo/score/": "score part", "ppo/ensemble_spread/": "ensemble part"},
)  # fmt: skip

KIND = StageKind(
    settings=PpoStage,
    makes="policy",
    code=2,
    inputs=(Input("data", PROMPTS), Input("ptx_data", ("demonstrations",))),
    prepare="posttrain.data.stage_data:ppo_data",
    run="posttrain.train.ppo:train_ppo",
    reads=_reads,
    check=_check,
    estimate=_estimate,
    warnings=gold_that_pays,
    charts=_CHARTS,
    iterations=_ITERATIONS,
    sections=(Section("gold", "Over-optimisation", "posttrain.report.overoptimisation:overoptimisation"),),
)

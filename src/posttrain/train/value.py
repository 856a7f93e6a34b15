"""PPO's value function: an adapter of its own with a head, or a head on the policy's adapter.

    V(state) = w . h - shift,   h: the last hidden state before a token

With `value = "own"` its adapter starts as a copy of a reward model's, with that head, or of the init policy's, with a head of
zeros. With `value = "shared"` it is a head of zeros on the policy's adapter, or on its full weights: no second forward pass,
and one gradient.
"""

from typing import NamedTuple

from torch import nn

from posttrain.errors import AdapterError
from posttrain.models.heads import ScoreHead, zero_head
from posttrain.stages.ppo import PpoStage
from posttrain.stages.reward_parts import reward_parts
from posttrain.train.stage import StageContext, seed_of, start_adapter


class ValueFunction(NamedTuple):
    """The adapter whose hidden states it reads, the head that reads them, and the trained parameters of both."""

    adapter: str
    head: ScoreHead
    parameters: dict[str, nn.Parameter]


def start_value(context: StageContext, stage: PpoStage, policy: str) -> ValueFunction | None:
    """The value function at the first step, without dropout; None for estimators that need none.

    Raises AdapterError where `value_init` names an adapter without a head.
    """
    base = context.base
    if stage.estimator != "gae":
        return None
    width = base.model.get_input_embeddings().weight.shape[1]
    if stage.value == "shared" or (stage.value == "auto" and context.recipe.adapter.kind == "full"):
        head = zero_head(width, device=base.device)
        return ValueFunction(policy, head, {"value.score.weight": head.weight})
    source, name = value_source(stage), value_name(stage)
    if source == "policy":
        adapter = start_adapter(context, stage.init, name, seed=seed_of(stage, context.recipe))
        adapter.head = zero_head(width, device=base.device)
    else:
        adapter = base.adapters.copy(context.policies.activate(source), name)
    if adapter.head is None:
        raise AdapterError(f'stage "{stage.name}"', f'value_init = "{source}" has no head', allowed="a reward model, or policy")
    adapter.without_dropout()
    adapter.requires_grad_(True)
    return ValueFunction(name, adapter.head, {f"value.{n}": p for n, p in adapter.parameters().items()})


def value_name(stage: PpoStage) -> str:
    """The name of the value function's own adapter while it is trained."""
    return f"{stage.name} value in training"


def value_source(stage: PpoStage) -> str:
    """The reward stage that the value function starts as a copy of, or "policy" where the reward has no model."""
    if stage.value_init in ("auto", "reward"):
        return next((name for part in reward_parts(stage.reward) for name in part.models), "policy")
    return stage.value_init

"""The models of PPO and their outputs for a packed batch: log-probabilities, values, scores.

Policy, reference, reward models and value function are adapters on one base, or full weights that are loaded into it in turn.

N: tokens of the completions, D: width.
"""

from typing import NamedTuple

from torch import Tensor

from posttrain.models.base_model import BaseModel
from posttrain.models.batches import DeviceBatch
from posttrain.train.gold import GoldMeasure
from posttrain.train.rewards import RewardScorer
from posttrain.train.value import ValueFunction


class Roles(NamedTuple):
    """The policy (an adapter), its reference (a stage), the reward, the value function and gold."""

    base: BaseModel
    temperature: float
    policy: str
    reference: str
    scorer: RewardScorer
    value: ValueFunction | None
    gold: GoldMeasure | None

    def _hidden(self, batch: DeviceBatch, adapter: str) -> Tensor:
        """The hidden state that each token of the completions is predicted from [N, D]."""
        return self.base.hidden(batch.ids_T, batch.positions_T, batch.segments, adapter)[batch.source_N]

    def logprobs(self, batch: DeviceBatch, adapter: str) -> Tensor:
        """log p of every token of the completions [N] at the stage's temperature."""
        return self._predict(self._hidden(batch, adapter), batch, adapter)

    def _predict(self, hidden_ND: Tensor, batch: DeviceBatch, adapter: str) -> Tensor:
        return self.base.logprobs(hidden_ND / self.temperature, batch.target_N, adapter)

    def outputs(self, batch: DeviceBatch) -> tuple[Tensor, Tensor | None]:
        """Policy log-probabilities of the completions' tokens [N], and their values [N] where the value function is shared."""
        hidden_ND = self._hidden(batch, self.policy)
        logprobs_N = self._predict(hidden_ND, batch, self.policy)
        return logprobs_N, self.value.head.score(hidden_ND) if self.value is not None and self.shared else None

    @property
    def shared(self) -> bool:
        """Whether the value function is a head on the policy's adapter."""
        return self.value is not None and self.value.adapter == self.policy

    def own_values(self, batch: DeviceBatch) -> Tensor:
        """The value before every token of the completions [N], where the value function has an adapter of its own."""
        assert self.value is not None
        return self.value.head.score(self._hidden(batch, self.value.adapter))

"""One optimiser step of PPO: the gradients of the policy, of the value function and of the pretraining mix, then AdamW.

    L = L_policy + value_coef · L_value + ptx_coef · L_ptx          each a mean over the tokens of the step (`losses/ppo.py`)

A minibatch is packed into batches that are computed one after the other. A value function with an adapter of its own has its
own forward and backward passes, after those of the policy, so that the activations of both are never in memory together. A
shared value function is a second output of the policy's forward pass.

N: tokens of a batch.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.data.prepare import TrainRow
from posttrain.errors import TrainingError
from posttrain.losses.output import LossOutput
from posttrain.losses.ppo import PolicyTokens, ValueTokens, policy_loss, value_loss
from posttrain.models.batches import DeviceBatch
from posttrain.stages.ppo import PpoStage
from posttrain.train.memory import ActivationCounter
from posttrain.train.ptx import ptx_batches, ptx_loss
from posttrain.train.roles import Roles
from posttrain.train.rollouts import Rollouts, pack_prompts
from posttrain.train.step import StepTaken, TrainingSteps


class RolloutBatch(NamedTuple):
    """Packed prompts with their completions, the ids of the prompts, and the rollout's numbers for each token [N]."""

    batch: DeviceBatch
    row_ids: tuple[str, ...]
    old_N: Tensor
    value_N: Tensor
    advantage_N: Tensor
    return_N: Tensor


class PpoUpdate:
    """The losses of a stage and the rows of its pretraining mix."""

    def __init__(self, stage: PpoStage, roles: Roles, ptx: Sequence[TrainRow], seed: int) -> None:
        self.stage, self.roles, self.ptx, self.seed = stage, roles, ptx, seed

    def step(
        self, training: TrainingSteps, rollouts: Rollouts, chosen: Sequence[int], names: Sequence[str], *, first: bool
    ) -> tuple[StepTaken, dict[str, float]]:
        """Learn from the chosen prompts of the rollouts. `names`: of all prompts, for errors. `first`: of the iteration.

        Raises NonFiniteError before a bad step, TrainingError where the policy is not the sampler before the first step.
        """
        batches = self._pack(rollouts, chosen, names)
        mix = ptx_batches(self.roles.base, self.ptx, training.step, size=self.stage.minibatch, seed=self.seed)
        started, activations = time.monotonic(), ActivationCounter(self.roles.base)
        minibatch_tokens = sum(len(rows.old_N) for rows in batches)
        for rows in batches:
            with activations.counted():
                loss = self._policy_loss(rows, minibatch_tokens)
            if first:
                self._check_unmoved(loss)
            training.backward(loss, rows.row_ids)
        if self.roles.value is not None and not self.roles.shared:
            for rows in batches:
                with activations.counted():
                    loss = self._value_loss(rows, self.roles.own_values(rows.batch), minibatch_tokens)
                training.backward(loss, rows.row_ids)
        mix_targets = sum(len(micro.payload.target_N) for micro in mix)
        for micro in mix:
            with activations.counted():
                loss = ptx_loss(self.roles.base, self.roles.policy, micro, step_targets=mix_targets, coef=self.stage.ptx_coef)
            training.backward(loss, micro.row_ids)
        tokens = sum(rows.batch.tokens for rows in batches) + sum(micro.tokens for micro in mix)
        taken = training.optimise(tokens=tokens)
        speed = {"time/update_tokens_per_second": tokens / (time.monotonic() - started)}
        return taken, {**self._means(taken.sums), "memory/activations": activations.largest, **speed}

    def _pack(self, rollouts: Rollouts, chosen: Sequence[int], names: Sequence[str]) -> list[RolloutBatch]:
        """The chosen prompts with their completions, as many in a batch as fit."""
        spans, device = rollouts.tokens_of(), self.roles.base.device
        numbers = (rollouts.old_N, rollouts.value_N, rollouts.advantage_N, rollouts.return_N)
        batches = []
        for positions, batch in pack_prompts(rollouts.prompts, rollouts.completions, chosen, device):
            tokens = torch.cat([torch.arange(start, stop) for i in positions for start, stop in spans[i]])
            old_N, value_N, advantage_N, return_N = (x[tokens].to(device) for x in numbers)
            batches.append(RolloutBatch(batch, tuple(names[i] for i in positions), old_N, value_N, advantage_N, return_N))
        return batches

    def _policy_loss(self, rows: RolloutBatch, minibatch_tokens: int) -> LossOutput:
        """The policy's loss, and the value function's where both have one forward."""
        stage = self.stage
        logprobs_N, value_N = self.roles.outputs(rows.batch)
        tokens = PolicyTokens(logprobs_N, rows.old_N, rows.advantage_N)
        out = policy_loss(tokens, clip=stage.clip_range, step_tokens=minibatch_tokens, entropy_coef=stage.entropy_coef)
        policy = LossOutput(out.loss, {**out.metrics, "tokens": torch.tensor(len(logprobs_N))})
        if value_N is None:
            return policy
        value = self._value_loss(rows, value_N, minibatch_tokens)
        return LossOutput(policy.loss + value.loss, policy.metrics | value.metrics)

    def _value_loss(self, rows: RolloutBatch, value_N: Tensor, minibatch_tokens: int) -> LossOutput:
        tokens = ValueTokens(value_N, rows.value_N, rows.return_N)
        out = value_loss(tokens, clip=self.stage.value_clip, step_tokens=minibatch_tokens)
        return LossOutput(self.stage.value_coef * out.loss, out.metrics)

    def _check_unmoved(self, loss: LossOutput) -> None:
        if float(loss.metrics["ppo/approximate_kl"]) != 0:
            raise TrainingError(
                f'stage "{self.stage.name}"', "the policy is not the one that sampled, before the first step of an iteration",
                do="this is a defect of posttrain, or of the machine: two equal computations differ",
            )  # fmt: skip

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of a step from the sums over its tokens."""
        means = {name: value / sums["tokens"] for name, value in sums.items() if name.startswith("ppo/")}
        loss = means["ppo/policy_loss"] + self.stage.value_coef * means.get("ppo/value_loss", 0.0)
        if "ptx/nll" in sums:
            means["ppo/ptx_loss"] = sums["ptx/nll"] / sums["ptx/targets"]
            loss += self.stage.ptx_coef * means["ppo/ptx_loss"]
        return {"ppo/loss": loss, **means}

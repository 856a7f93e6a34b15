"""One iteration's rollouts as PPO trains on them: what was sampled, what it scored, and what each token was worth.

    reward_t = -kl_coef (log pi_old - log ref)_t,   and at the last token  + score - missing_eos_penalty [no end]
    advantages by `losses/gae.py`, from the values of the tokens (gae) or from whole completions (rloo, grpo)

Everything is kept in flat tensors over the tokens of all completions, in their order, so that it lies on disk as it is.

N: tokens of all completions, B: completions, P: prompts, G: completions a prompt.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.losses import gae as estimators
from posttrain.losses.kl import k1, k3
from posttrain.stages.ppo import PpoStage


class Rollouts(NamedTuple):
    """What an iteration trains on; one advantage, return and old value a token."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    old_N: Tensor
    value_N: Tensor
    advantage_N: Tensor
    return_N: Tensor
    stats: dict[str, float]

    def tokens_of(self) -> list[list[tuple[int, int]]]:
        """Where the tokens of each completion lie [prompt][completion] -> (start, stop)."""
        places, start = [], 0
        for group in self.completions:
            own = []
            for completion in group:
                own.append((start, start + len(completion)))
                start += len(completion)
            places.append(own)
        return places


class Sampled(NamedTuple):
    """Completions with their log-probabilities under policy, sampler and reference, values and scores."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    ended_B: Tensor
    score_B: Tensor
    old_N: Tensor
    sampler_N: Tensor
    reference_N: Tensor
    value_N: Tensor


# A token's ratio of trainer to sampler outside of these is a mismatch.
MISMATCH = (0.9, 1.1)
# Tokens in a row that count as repeated where they come again.
REPEATED = 4


def judge_rollouts(sampled: Sampled, stage: PpoStage, kl_coef: float) -> Rollouts:
    """Rewards, advantages and the iteration's figures."""
    lengths = [len(c) for group in sampled.completions for c in group]
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    kl_N = k1(sampled.old_N, sampled.reference_N)
    kl_B = torch.zeros(len(lengths)).index_add(0, row_N, kl_N)
    score_B = sampled.score_B - stage.missing_eos_penalty * (1 - sampled.ended_B.float())
    group = len(sampled.completions[0])
    if stage.estimator == "gae":
        found = _by_values(sampled, stage, kl_N, score_B, lengths, kl_coef)
        advantage_N = estimators.whiten(found.advantage_BL, torch.ones_like(found.advantage_BL))
    else:
        whole_B = score_B - kl_coef * kl_B
        estimate = estimators.rloo if stage.estimator == "rloo" else estimators.grpo
        advantage_N = estimate(whole_B.view(-1, group)).flatten()[row_N]
        found = estimators.Advantages(advantage_N, torch.zeros_like(advantage_N))
    ratio_N = (sampled.old_N - sampled.sampler_N).exp()
    stats = {
        "ppo/score": float(sampled.score_B.mean()), "ppo/reward": float((score_B - kl_coef * kl_B).mean()),
        "ppo/kl": float(kl_B.mean()), "ppo/positive_kl": float(k3(sampled.old_N, sampled.reference_N).sum()) / len(lengths),
        "ppo/kl_coef": kl_coef, "ppo/entropy": -float(sampled.old_N.mean()),
        "ppo/length": sum(lengths) / len(lengths), "ppo/ended": float(sampled.ended_B.float().mean()),
        "ppo/mismatch": float(((ratio_N < MISMATCH[0]) | (ratio_N > MISMATCH[1])).float().mean()),
        "ppo/score_spread": float(sampled.score_B.std()) if len(lengths) > 1 else 0.0,
        "ppo/advantage": float(found.advantage_BL.mean()), "ppo/advantage_spread": float(found.advantage_BL.std(correction=0)),
        "ppo/repetition": sum(repetition(c) for group in sampled.completions for c in group) / len(lengths),
    }  # fmt: skip
    if stage.estimator == "gae":
        left = (found.return_BL - sampled.value_N).var(correction=0)
        stats["ppo/explained_variance"] = float(1 - left / found.return_BL.var(correction=0).clamp(min=1e-8))
    return Rollouts(sampled.prompts, sampled.completions, sampled.old_N, sampled.value_N, advantage_N, found.return_BL, stats)


def repetition(completion: list[int]) -> float:
    """Share of a completion's runs of four tokens that stand in it before; 0 for one of fewer than five tokens."""
    runs = [tuple(completion[k : k + REPEATED]) for k in range(len(completion) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _by_values(
    sampled: Sampled, stage: PpoStage, kl_N: Tensor, score_B: Tensor, lengths: list[int], kl_coef: float
) -> estimators.Advantages:
    """GAE over a table of the completions; flat again [N]."""
    mask_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    reward_BL, value_BL = torch.zeros(mask_BL.shape), torch.zeros(mask_BL.shape)
    reward_BL[mask_BL], value_BL[mask_BL] = -kl_coef * kl_N, sampled.value_N
    reward_BL[torch.arange(len(lengths)), torch.tensor(lengths) - 1] += score_B
    if stage.whiten_rewards:
        reward_BL = estimators.whiten(reward_BL, mask_BL, shift_mean=False)
    found = estimators.gae(reward_BL=reward_BL, value_BL=value_BL, mask_BL=mask_BL, gamma=stage.gamma, lam=stage.lam)
    return estimators.Advantages(found.advantage_BL[mask_BL], found.return_BL[mask_BL])


def to_tensors(rollouts: Rollouts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """For the disk."""
    tensors = {
        "old": rollouts.old_N, "value": rollouts.value_N, "advantage": rollouts.advantage_N, "return": rollouts.return_N,
    }  # fmt: skip
    return tensors, {"prompts": rollouts.prompts, "completions": rollouts.completions, "stats": rollouts.stats}


def from_tensors(tensors: dict[str, Tensor], state: dict[str, Any]) -> Rollouts:
    """What `to_tensors` wrote."""
    old, value, advantage, returns = (tensors[name] for name in ("old", "value", "advantage", "return"))
    return Rollouts(state["prompts"], state["completions"], old, value, advantage, returns, dict(state["stats"]))

"""One iteration's rollouts as PPO trains on them: the completions, their scores, and the advantage of each token.

    reward_t = -kl_coef (log pi_old - log ref)_t,   and at the last token  + score - missing_eos_penalty [no end]
    advantages by `losses/gae.py`, from the values of the tokens (gae) or from whole completions (rloo, grpo)

Tensors are flat over the tokens of all completions, in their order; they are written to disk in that form.

N: tokens of all completions, B: completions, P: prompts, G: completions a prompt.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.data.packing import split_by_tokens
from posttrain.losses import gae as estimators
from posttrain.losses.kl import k1, k3
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, pack_trees
from posttrain.stages.ppo import PpoStage


class Rollouts(NamedTuple):
    """What an iteration trains on: one old log-probability, old value, advantage and return a token [N]."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    old_N: Tensor
    value_N: Tensor
    advantage_N: Tensor
    return_N: Tensor
    stats: dict[str, float]

    def tokens_of(self) -> list[list[tuple[int, int]]]:
        """The span of each completion in the flat tensors: [prompt][completion] -> (start, stop)."""
        spans, start = [], 0
        for group in self.completions:
            ends = list(accumulate((len(completion) for completion in group), initial=start))
            spans.append(list(pairwise(ends)))
            start = ends[-1]
        return spans


class ScoredSamples(NamedTuple):
    """Completions with their log-probabilities under policy, sampler and reference, their values and their scores."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    ended_B: Tensor
    score_B: Tensor
    old_N: Tensor
    sampler_N: Tensor
    reference_N: Tensor
    value_N: Tensor


class PackedPrompts(NamedTuple):
    """A packed batch, and the positions of its prompts in the iteration."""

    positions: list[int]
    batch: DeviceBatch


# A ratio of a token's probability in training to that of the sampler is a mismatch outside of this range.
MISMATCH = (0.9, 1.1)
# Tokens of a run that counts as a repetition where it occurs again.
REPEATED = 4


def estimate_advantages(samples: ScoredSamples, stage: PpoStage, kl_coef: float) -> Rollouts:
    """Rewards, advantages and statistics of an iteration."""
    lengths = [len(c) for group in samples.completions for c in group]
    row_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    kl_N = k1(samples.old_N, samples.reference_N)
    kl_B = torch.zeros(len(lengths)).index_add(0, row_N, kl_N)
    score_B = samples.score_B - stage.missing_eos_penalty * (1 - samples.ended_B.float())
    group = len(samples.completions[0])
    if stage.estimator == "gae":
        raw = _gae(samples, stage, kl_N, score_B, lengths, kl_coef)
        advantage_N = estimators.whiten(raw.advantage_BL, torch.ones_like(raw.advantage_BL))
    else:
        whole_B = score_B - kl_coef * kl_B
        estimate = estimators.rloo if stage.estimator == "rloo" else estimators.grpo
        advantage_N = estimate(whole_B.view(-1, group)).flatten()[row_N]
        raw = estimators.Advantages(advantage_N, torch.zeros_like(advantage_N))
    ratio_N = (samples.old_N - samples.sampler_N).exp()
    stats = {
        "ppo/score": float(samples.score_B.mean()), "ppo/reward": float((score_B - kl_coef * kl_B).mean()),
        "ppo/kl": float(kl_B.mean()), "ppo/positive_kl": float(k3(samples.old_N, samples.reference_N).sum()) / len(lengths),
        "ppo/kl_coef": kl_coef, "ppo/entropy": -float(samples.old_N.mean()),
        "ppo/length": sum(lengths) / len(lengths), "ppo/ended": float(samples.ended_B.float().mean()),
        "ppo/mismatch": float(((ratio_N < MISMATCH[0]) | (ratio_N > MISMATCH[1])).float().mean()),
        "ppo/score_spread": float(samples.score_B.std()) if len(lengths) > 1 else 0.0,
        "ppo/advantage": float(raw.advantage_BL.mean()), "ppo/advantage_spread": float(raw.advantage_BL.std(correction=0)),
        "ppo/repetition": sum(repetition(c) for group in samples.completions for c in group) / len(lengths),
    }  # fmt: skip
    if stage.estimator == "gae":
        unexplained = (raw.return_BL - samples.value_N).var(correction=0)
        stats["ppo/explained_variance"] = float(1 - unexplained / raw.return_BL.var(correction=0).clamp(min=1e-8))
    return Rollouts(samples.prompts, samples.completions, samples.old_N, samples.value_N, advantage_N, raw.return_BL, stats)


def repetition(completion: list[int]) -> float:
    """Share of a completion's runs of four tokens that occur in it earlier; 0 for fewer than five tokens."""
    runs = [tuple(completion[k : k + REPEATED]) for k in range(len(completion) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _gae(
    samples: ScoredSamples, stage: PpoStage, kl_N: Tensor, score_B: Tensor, lengths: list[int], kl_coef: float
) -> estimators.Advantages:
    """GAE over the completions as padded rows; the results are flat again [N]."""
    mask_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    reward_BL, value_BL = torch.zeros(mask_BL.shape), torch.zeros(mask_BL.shape)
    reward_BL[mask_BL], value_BL[mask_BL] = -kl_coef * kl_N, samples.value_N
    reward_BL[torch.arange(len(lengths)), torch.tensor(lengths) - 1] += score_B
    if stage.whiten_rewards:
        reward_BL = estimators.whiten(reward_BL, mask_BL, shift_mean=False)
    rows = estimators.gae(reward_BL=reward_BL, value_BL=value_BL, mask_BL=mask_BL, gamma=stage.gamma, lam=stage.lam)
    return estimators.Advantages(rows.advantage_BL[mask_BL], rows.return_BL[mask_BL])


def pack_prompts(
    prompts: Sequence[list[int]], completions: Sequence[list[list[int]]], chosen: Sequence[int], device: torch.device
) -> list[PackedPrompts]:
    """Pack the chosen prompts with their completions into batches of at most `MICRO_TOKENS` tokens."""
    lengths = [len(prompts[i]) + sum(map(len, completions[i])) for i in chosen]
    groups = [[chosen[k] for k in group] for group in split_by_tokens(lengths, MICRO_TOKENS[device.type])]
    return [PackedPrompts(group, pack_trees(((prompts[i], completions[i]) for i in group), device)) for group in groups]


def to_tensors(rollouts: Rollouts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parts of a checkpoint."""
    tensors = {
        "old": rollouts.old_N, "value": rollouts.value_N, "advantage": rollouts.advantage_N, "return": rollouts.return_N,
    }  # fmt: skip
    return tensors, {"prompts": rollouts.prompts, "completions": rollouts.completions, "stats": rollouts.stats}


def from_tensors(tensors: dict[str, Tensor], state: dict[str, Any]) -> Rollouts:
    """Read what `to_tensors` returned."""
    old, value, advantage, returns = (tensors[name] for name in ("old", "value", "advantage", "return"))
    return Rollouts(state["prompts"], state["completions"], old, value, advantage, returns, dict(state["stats"]))

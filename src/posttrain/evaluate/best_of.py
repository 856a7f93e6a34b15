"""Best-of-n: sample n completions and keep the one that a reward model scores highest. Its gain and its KL.

Given N samples of a prompt in the order of their scores, s_(1) <= ... <= s_(N), the best of n drawn without replacement is
the i-th with probability C(i-1, n-1) / C(N, n). This gives an unbiased estimate without new samples:

    E[value of the best of n] = sum_i C(i-1, n-1) / C(N, n) value_(i)                 (as pass@k: Chen et al. 2021, eq. 1)

The value is the score itself or the gold score of the same completion. Ties are broken at random. The KL of the resulting
policy from the sampled one is

    KL <= log n - (n-1)/n           equality without ties (Stiennon et al. 2020; a bound: Beirami et al. 2024)

`kl` subtracts the effect of ties among the N samples: a tie that covers the scores between shares a and b of the distribution
is one atom, chosen with probability b^n - a^n.

Used by `posttrain evaluate RUN/sft --best-of RUN/rm --prompts FILE` and by benchmarks. Numbers are float64.

P: prompts, N: completions of a prompt.
"""

from collections.abc import Iterator, Sequence
from math import log
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from posttrain.evaluate.reward_model import score_completions
from posttrain.evaluate.stats import mean
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.base_model import BaseModel
from posttrain.progress import Progress
from posttrain.records import Rollout

Numbers = NDArray[numpy.float64]


class Candidates(NamedTuple):
    """Completions [P][N] of prompts with their scores [P, N] and, if measured, their gold scores [P, N]."""

    rollouts: list[list[Rollout]]
    score_PN: Numbers
    gold_PN: Numbers | None = None


def order_weights(total: int, n: int) -> Numbers:
    """Probability [N] that the i-th smallest of `total` is the largest of n drawn without replacement."""
    assert 1 <= n <= total, "n must be between 1 and total"
    weight = numpy.zeros(total)
    weight[-1] = n / total
    for i in range(total, n, -1):  # C(i-2, n-1) / C(i-1, n-1) = (i-n) / (i-1)
        weight[i - 2] = weight[i - 1] * (i - n) / (i - 1)
    return weight


def best_of(score_PN: Numbers, value_PN: Numbers, n: int) -> Numbers:
    """Expected value [P] of the completion with the highest score among n. Ties are broken at random."""
    weight_N = order_weights(score_PN.shape[1], n)
    return numpy.asarray([weight_N @ _in_order(s, v) for s, v in zip(score_PN, value_PN, strict=True)])


def _in_order(score_N: Numbers, value_N: Numbers) -> Numbers:
    """Values in the order of their scores. Values with equal scores are replaced by their mean."""
    _, group_N = numpy.unique(score_N, return_inverse=True)
    mean_G = numpy.bincount(group_N, weights=value_N) / numpy.bincount(group_N)
    values: Numbers = mean_G[numpy.sort(group_N)]
    return values


def kl_bound(n: int) -> float:
    """log n - (n-1)/n, nats."""
    return log(n) - (n - 1) / n


def kl_of_ties(score_PN: Numbers, n: int) -> Numbers:
    """KL [P] of best-of-n in nats: the bound minus the effect of ties."""
    return numpy.asarray([kl_bound(n) - sum(_saved(a, b, n) for a, b in _ties(score_N)) for score_N in score_PN])


def _ties(score_N: Numbers) -> list[tuple[float, float]]:
    """The range of every tie in the distribution of scores, as shares."""
    _, count_G = numpy.unique(score_N, return_counts=True)
    end_G = numpy.cumsum(count_G) / len(score_N)
    return [(b - c / len(score_N), b) for b, c in zip(end_G.tolist(), count_G.tolist()) if c > 1]


def _saved(a: float, b: float, n: int) -> float:
    """The integral from a to b of n u^(n-1) log(n u^(n-1)) du, minus the contribution of one atom between a and b."""
    mass = b**n - a**n
    if mass == 0:  # underflow of float64
        return 0.0
    return _antiderivative(b, n) - _antiderivative(a, n) - mass * log(mass / (b - a))


def _antiderivative(u: float, n: int) -> float:
    """u^n (log n + (n-1) (log u - 1/n)); its difference between 0 and 1 is the bound."""
    return u**n * (log(n) + (n - 1) * (log(u) - 1 / n)) if u > 0 else 0.0


def measure_best_of(score_PN: Numbers, gold_PN: Numbers | None = None) -> dict[str, Any]:
    """Best-of-n for every n up to N: KL, expected score and its gain over one sample, and the same for gold if given.

    Intervals are for means over prompts (`stats.mean`) at a fixed number of samples.
    """
    prompts, total = score_PN.shape
    rows = []
    for n in range(1, total + 1):
        row: dict[str, Any] = {"n": n, "kl_bound": kl_bound(n), "kl": float(kl_of_ties(score_PN, n).mean())}
        for name, value_PN in (("score", score_PN), ("gold", gold_PN)):
            if value_PN is not None:
                best_P = best_of(score_PN, value_PN, n)
                row[name] = mean(best_P.tolist())._asdict()
                row[f"{name}_gain"] = mean((best_P - value_PN.mean(1)).tolist())._asdict()
        rows.append(row)
    distinct = float(numpy.mean([len(numpy.unique(score_N)) for score_N in score_PN])) / total
    return {"prompts": prompts, "samples": total, "different": distinct, "best_of": rows}


def sample_candidates(
    base: BaseModel, policy: str, reward: str, prompts: Sequence[Sequence[int]], settings: SamplingSettings, *, samples: int,
    label: str = "best of n",
) -> Candidates:  # fmt: skip
    """Sample `samples` completions of every prompt (ids) from a policy and score them with a reward model on the same base."""
    progress = Progress(label, len(prompts) * samples)
    answers = generate(
        base, prompts, settings, policy, completions=samples,
        advance=lambda rows, tokens: progress.update(rows, tokens=tokens),
    )  # fmt: skip
    rollouts = [answers[k : k + samples] for k in range(0, len(answers), samples)]
    return Candidates(rollouts, scores_of(base, reward, rollouts))


def scores_of(base: BaseModel, reward: str, rollouts: Sequence[Sequence[Rollout]]) -> Numbers:
    """Scores [P, N] of completions by a reward model. A completion that did not end is scored at its last token."""
    prompts = [list(prompt_rollouts[0].prompt_ids) for prompt_rollouts in rollouts]
    scores = score_completions(
        base, reward, prompts, [[r.completion_ids for r in prompt_rollouts] for prompt_rollouts in rollouts]
    )
    return numpy.asarray(scores, dtype=numpy.float64)


def rows(names: Sequence[str], candidates: Candidates) -> Iterator[dict[str, Any]]:
    """Every completion with its score and, if measured, its gold score."""
    for p, (name, prompt_rollouts) in enumerate(zip(names, candidates.rollouts, strict=True)):
        for k, rollout in enumerate(prompt_rollouts):
            gold = {} if candidates.gold_PN is None else {"gold": float(candidates.gold_PN[p, k])}
            score = {"score": float(candidates.score_PN[p, k]), **gold}
            yield {"prompt": name, "answer": rollout.text, "ended": rollout.ended, **score}


def displayed_n(samples: int) -> list[int]:
    """The values of n in the table: powers of two and the number of samples."""
    return sorted({2**k for k in range(samples.bit_length()) if 2**k <= samples} | {samples})


def table(result: dict[str, Any]) -> str:
    """The result of `measure_best_of` as a table for the terminal."""
    names = [name for name in ("score", "gold") if name in result["best_of"][0]]
    head = f"{'n':>5}  {'KL at most':>10}  {'KL':>6}" + "".join(f"  {name:>7}  {'gain (95 % interval)':<24}" for name in names)
    lines = [head.rstrip()]
    for n in displayed_n(result["samples"]):
        row = result["best_of"][n - 1]
        line = f"{n:>5}  {row['kl_bound']:>10.3f}  {row['kl']:>6.3f}"
        for name in names:
            gain = row[f"{name}_gain"]
            gain_text = f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
            line += f"  {row[name]['value']:>7.3f}  {gain_text:<24}"
        lines.append(line.rstrip())
    footer = f"{result['prompts']} prompts, {result['samples']} samples each, {result['different']:.0%} of them different"
    return "\n".join([*lines, footer + "; KL in nats per completion"])

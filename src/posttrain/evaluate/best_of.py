"""Best-of-n: sample n completions, keep the one that a reward model scores highest. What it brings, and how far it goes.

With N samples of a prompt in the order of their scores, s_(1) <= ... <= s_(N), the best of n of them, drawn without
replacement, is the i-th with probability C(i-1, n-1) / C(N, n); so without bias and without drawing anything again

    E[value of the best of n] = sum_i C(i-1, n-1) / C(N, n) value_(i)                 (as pass@k: Chen et al. 2021, eq. 1)

where the value is the score itself or what somebody else (gold) says of the same completion. Between equal scores the choice
is a fair draw. The policy that this makes is, of the one sampled from,

    KL <= log n - (n-1)/n           equal where no two scores are (Stiennon et al. 2020; a bound: Beirami et al. 2024)

`kl` takes off what equal scores seen among the N samples save: a completion that holds all scores between shares a and b of
the distribution is chosen with probability b^n - a^n instead of being told apart from itself.

Where it stands: `posttrain evaluate RUN/sft --best-of RUN/rm --prompts FILE`; benchmarks. Numbers are float64.

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
    """Completions [P][N] of prompts with their scores [P, N], and what a gold scorer says of them."""

    rollouts: list[list[Rollout]]
    score_PN: Numbers
    gold_PN: Numbers | None = None


def order_weights(total: int, n: int) -> Numbers:
    """Probability [N] that the i-th smallest of `total` is the largest of n drawn without replacement."""
    assert 1 <= n <= total, "as many as there are"
    weight = numpy.zeros(total)
    weight[-1] = n / total
    for i in range(total, n, -1):  # C(i-2, n-1) / C(i-1, n-1) = (i-n) / (i-1)
        weight[i - 2] = weight[i - 1] * (i - n) / (i - 1)
    return weight


def best_of(score_PN: Numbers, value_PN: Numbers, n: int) -> Numbers:
    """Expected value [P] of the completion with the highest score among n; equal scores are drawn from fairly."""
    weight_N = order_weights(score_PN.shape[1], n)
    return numpy.asarray([weight_N @ _in_order(s, v) for s, v in zip(score_PN, value_PN, strict=True)])


def _in_order(score_N: Numbers, value_N: Numbers) -> Numbers:
    """Values in the order of their scores; those of equal scores become their mean."""
    _, group_N = numpy.unique(score_N, return_inverse=True)
    mean_G = numpy.bincount(group_N, weights=value_N) / numpy.bincount(group_N)
    found: Numbers = mean_G[numpy.sort(group_N)]
    return found


def kl_bound(n: int) -> float:
    """log n - (n-1)/n, nats."""
    return log(n) - (n - 1) / n


def kl_of_ties(score_PN: Numbers, n: int) -> Numbers:
    """KL [P] of best-of-n, nats, with what equal scores save taken off the bound."""
    return numpy.asarray([kl_bound(n) - sum(_saved(a, b, n) for a, b in _ties(score_N)) for score_N in score_PN])


def _ties(score_N: Numbers) -> list[tuple[float, float]]:
    """Where the scores that several completions share begin and end in the distribution of scores."""
    _, count_G = numpy.unique(score_N, return_counts=True)
    end_G = numpy.cumsum(count_G) / len(score_N)
    return [(b - c / len(score_N), b) for b, c in zip(end_G.tolist(), count_G.tolist()) if c > 1]


def _saved(a: float, b: float, n: int) -> float:
    """integral from a to b of n u^(n-1) log(n u^(n-1)) du, less what one atom between a and b brings."""
    mass = b**n - a**n
    if mass == 0:  # so far down that float64 does not know it
        return 0.0
    return _antiderivative(b, n) - _antiderivative(a, n) - mass * log(mass / (b - a))


def _antiderivative(u: float, n: int) -> float:
    """u^n (log n + (n-1) (log u - 1/n)); its difference from 0 to 1 is the bound."""
    return u**n * (log(n) + (n - 1) * (log(u) - 1 / n)) if u > 0 else 0.0


def measure_best_of(score_PN: Numbers, gold_PN: Numbers | None = None) -> dict[str, Any]:
    """Best-of-n for every n up to N: KL, expected score, and its gain over one sample; the same of gold where it is given.

    Intervals are of means over prompts (`stats.mean`): other prompts, the same number of samples.
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
    different = float(numpy.mean([len(numpy.unique(score_N)) for score_N in score_PN])) / total
    return {"prompts": prompts, "samples": total, "different": different, "best_of": rows}


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
    """Scores [P, N] of completions by a reward model. One that did not end is scored at its last token."""
    prompts = [list(own[0].prompt_ids) for own in rollouts]
    found = score_completions(base, reward, prompts, [[r.completion_ids for r in own] for own in rollouts])
    return numpy.asarray(found, dtype=numpy.float64)


def rows(names: Sequence[str], candidates: Candidates) -> Iterator[dict[str, Any]]:
    """Every completion with its score, and what gold says of it where it was asked."""
    for p, (name, own) in enumerate(zip(names, candidates.rollouts, strict=True)):
        for k, rollout in enumerate(own):
            gold = {} if candidates.gold_PN is None else {"gold": float(candidates.gold_PN[p, k])}
            score = {"score": float(candidates.score_PN[p, k]), **gold}
            yield {"prompt": name, "answer": rollout.text, "ended": rollout.ended, **score}


def shown(samples: int) -> list[int]:
    """The n that a table shows: powers of two, and all samples."""
    return sorted({2**k for k in range(samples.bit_length()) if 2**k <= samples} | {samples})


def table(found: dict[str, Any]) -> str:
    """The rows of `measure_best_of` that a terminal shows."""
    names = [name for name in ("score", "gold") if name in found["best_of"][0]]
    head = f"{'n':>5}  {'KL at most':>10}  {'KL':>6}" + "".join(f"  {name:>7}  {'gain (95 % interval)':<24}" for name in names)
    lines = [head.rstrip()]
    for n in shown(found["samples"]):
        row = found["best_of"][n - 1]
        line = f"{n:>5}  {row['kl_bound']:>10.3f}  {row['kl']:>6.3f}"
        for name in names:
            gain = row[f"{name}_gain"]
            spread = f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
            line += f"  {row[name]['value']:>7.3f}  {spread:<24}"
        lines.append(line.rstrip())
    about = f"{found['prompts']} prompts, {found['samples']} samples each, {found['different']:.0%} of them different"
    return "\n".join([*lines, about + "; KL in nats a completion"])

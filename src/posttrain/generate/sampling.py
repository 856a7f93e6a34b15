"""Sampling: from logits to tokens. Pure functions, no model.

The settings of a row apply in this order, as in transformers:

    z_t = z_t / penalty where z_t > 0 else z_t penalty      if t occurred before   repetition penalty (Keskar et al. 2019)
    z_t = z_t + bias_t                                                             logit bias
    z_t = -inf for tokens that end                          before min_new_tokens  minimum length
    p = softmax(z / temperature)
    keep p_t >= the k-th largest                                                   top-k (Fan et al. 2018)
    keep the smallest set of likeliest with mass top_p                             top-p (Holtzman et al. 2020)
    keep p_t >= min_p max p                                                        min-p (Nguyen et al. 2024)

Tokens tied with the last one kept are kept too, so no cut depends on an order. Temperature 0 takes the likeliest token (the
first of equals) and its log-probability at temperature 1. Each row draws one random number, a function of (seed, index,
position) alone; the token is where the number falls in the cumulative distribution.

R: rows, b: rows of a block, V: vocabulary, W: tokens of a block of the vocabulary, C: such blocks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.errors import ModelError
from posttrain.kernels import token_chooser

# Tokens of the vocabulary per block, when a token is looked up.
BLOCK = 512
# Rows processed at once on a CPU, so that their float32 logits stay in the CPU cache over all passes.
BLOCK_ROWS = 4
# Candidates that top-p checks before it sorts the whole vocabulary.
CANDIDATES = 1024
# Lower temperatures underflow float32 and are raised to this, where only the likeliest token has any weight.
MIN_TEMPERATURE = 1e-30
_MASK = 2**64 - 1


class SamplingSettings(NamedTuple):
    """How to choose tokens. `logprobs=False` saves passes over the vocabulary if log-probabilities are not needed."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = True
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0

    @property
    def cuts(self) -> bool:
        """Whether top-k, top-p or min-p exclude tokens."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def shifts(self) -> bool:
        """Whether the penalty or the bias changes logits."""
        return self.repetition_penalty != 1 or bool(self.logit_bias)

    @property
    def plain(self) -> bool:
        """Whether tokens are sampled from the model's own distribution."""
        return self.temperature in (0, 1) and not self.cuts and not self.shifts and not self.min_new_tokens


class Draw(NamedTuple):
    """The inputs of one row to one choice: settings, a number in [0, 1), tokens that occurred before, forbidden tokens."""

    settings: SamplingSettings
    uniform: float = 0.0
    seen: Sequence[int] = ()
    forbidden: Sequence[int] = ()

    @property
    def moves(self) -> bool:
        """Whether logits are changed in this choice."""
        return self.settings.shifts or bool(self.forbidden)


class ChosenTokens(NamedTuple):
    """Tokens with their log-probabilities under the sampling distribution and the model's own, all [R].

    If a row's logits are not finite, `finite` is false and its token is meaningless.
    """

    tokens: list[int]
    logprobs: list[float]
    model_logprobs: list[float]
    finite: list[bool]


def check_settings(settings: SamplingSettings, vocabulary: int) -> None:
    """Raise ModelError for invalid settings."""
    s = settings
    ids = [*s.stop_ids, *(token for token, _ in s.logit_bias)]
    unknown = next((i for i in ids if not 0 <= i < vocabulary), None)
    problems = [
        (s.max_new_tokens >= 0, f"max_new_tokens = {s.max_new_tokens}", "0 or more"),
        (0 <= s.temperature < math.inf, f"temperature = {s.temperature}", "0 or more"),
        (0 < s.top_p <= 1, f"top_p = {s.top_p}", "more than 0, at most 1"),
        (s.top_k >= 0, f"top_k = {s.top_k}", "0 (all tokens) or more"),
        (0 <= s.min_p <= 1, f"min_p = {s.min_p}", "0 to 1"),
        (0.01 <= s.repetition_penalty <= 100, f"repetition_penalty = {s.repetition_penalty}", "0.01 to 100"),
        (
            0 <= s.min_new_tokens <= s.max_new_tokens,
            f"min_new_tokens = {s.min_new_tokens}", f"0 to max_new_tokens ({s.max_new_tokens})",
        ),
        (all(s.stop), "an empty stop string", "strings of at least one character"),
        (unknown is None, f"token id {unknown} in stop_ids or logit_bias", f"0 to {vocabulary - 1}"),
        (0 <= s.top_logprobs <= vocabulary, f"top_logprobs = {s.top_logprobs}", f"0 to {vocabulary}"),
        (all(math.isfinite(bias) for _, bias in s.logit_bias), "a logit_bias that is not finite", "finite numbers"),
    ]  # fmt: skip
    for valid, problem, allowed in problems:
        if not valid:
            raise ModelError("generation", problem, allowed=allowed)


def uniform(seed: int, index: int, position: int) -> float:
    """A random number in [0, 1) for each token of each row: the mixing function of SplitMix64 (Steele et al. 2014), chained."""
    return (_mix(_mix(_mix(seed) + index) + position) >> 11) / 2**53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def draw_numbers(draws: Sequence[Draw], device: torch.device) -> Tensor:
    """The inputs of `choose_tokens` as one float64 tensor [4, R]: random number, temperature, whether the row is greedy,
    whether it samples from the model's own distribution. Copied to the device before the forward, so that it does not wait."""
    settings = [draw.settings for draw in draws]
    temperatures = [_temperature(s) or 1.0 for s in settings]
    rows = [[draw.uniform for draw in draws], temperatures, [not s.temperature for s in settings], [s.plain for s in settings]]
    return torch.tensor(rows, dtype=torch.float64).to(device)


def choose_tokens(logits_RV: Tensor, draws: Sequence[Draw], numbers_4R: Tensor | None = None) -> ChosenTokens:
    """The next token of each row, independent of the other rows. Synchronises with the device once."""
    choose = token_chooser(logits_RV)
    if choose is None:
        return _chosen(_choose_all(logits_RV, draws, numbers_4R))
    # The compiled function handles all rows without changed logits and cuts. It supports forbidden tokens.
    uncompiled = [r for r, draw in enumerate(draws) if draw.settings.shifts or draw.settings.cuts]
    rows = [(draw.uniform, _temperature(draw.settings), draw.settings.logprobs) for draw in draws]
    chosen_rows = choose(logits_RV, rows, [draw.forbidden for draw in draws])
    if uncompiled:
        computed = zip(*_choose_all(logits_RV[uncompiled], [draws[r] for r in uncompiled], None), strict=True)
        for r, row in zip(uncompiled, computed, strict=True):
            chosen_rows[r] = row
    return _chosen(list(zip(*chosen_rows, strict=True)))


def _temperature(settings: SamplingSettings) -> float:
    return max(settings.temperature, MIN_TEMPERATURE) if settings.temperature else 0.0


def _chosen(columns: Sequence[Sequence[float]]) -> ChosenTokens:
    token_R, logprob_R, model_R, finite_R = columns
    return ChosenTokens(
        [int(token) for token in token_R], list(logprob_R), list(model_R), [bool(finite) for finite in finite_R]
    )


def _choose_all(logits_RV: Tensor, draws: Sequence[Draw], numbers_4R: Tensor | None) -> list[list[float]]:
    """Choose with torch operations: tokens, both log-probabilities and whether the logits are finite, [4, R]."""
    numbers_4R = draw_numbers(draws, logits_RV.device) if numbers_4R is None else numbers_4R
    size = BLOCK_ROWS if logits_RV.device.type == "cpu" else len(draws)
    parts = [
        _choose(logits_RV[i : i + size], draws[i : i + size], numbers_4R[:, i : i + size]) for i in range(0, len(draws), size)
    ]
    columns: list[list[float]] = torch.cat(parts, 1).tolist()
    return columns


def token_logprobs(logits_NV: Tensor, tokens: Sequence[int]) -> list[float]:
    """log p of a token of each row under the model's own distribution."""
    z_NV = logits_NV.float()
    index_N1 = torch.tensor(tokens, device=z_NV.device)[:, None]
    logprobs: list[float] = (z_NV.gather(1, index_N1)[:, 0] - torch.logsumexp(z_NV, 1)).tolist()
    return logprobs


def top_tokens(logits_RV: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row with their log-probabilities under the model's own distribution, likeliest first."""
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(counts)
    for row, count in enumerate(counts):
        if count:
            z_V = logits_RV[row].float()
            values_n, ids_n = z_V.topk(count)
            tops[row] = tuple(zip(ids_n.tolist(), (values_n - torch.logsumexp(z_V, 0)).tolist(), strict=True))
    return tops


def _choose(logits_bV: Tensor, draws: Sequence[Draw], numbers_4b: Tensor) -> Tensor:
    """Tokens, both log-probabilities and whether the logits are finite [4, b], float64."""
    settings = [draw.settings for draw in draws]
    uniform_b, temperature_b, greedy_b, plain_b = numbers_4b
    with_logprobs = any(s.logprobs for s in settings)
    z_bV = logits_bV.float()
    model_total_b = torch.logsumexp(z_bV, 1) if with_logprobs and not all(s.plain for s in settings) else None
    if any(draw.moves for draw in draws):
        z_bV = move_logits(z_bV, draws)
    if not with_logprobs and not any(s.temperature for s in settings):
        likeliest_b = _argmax(z_bV)
        largest_b = z_bV.gather(1, likeliest_b[:, None])[:, 0].double()
        none_b = torch.zeros_like(largest_b)
        return torch.stack([likeliest_b.double(), none_b, none_b, largest_b.isfinite().double()])
    weights_bV = torch.softmax(_tempered(z_bV, settings, temperature_b), 1)
    if any(s.cuts for s in settings):
        weights_bV = cut(weights_bV, settings)
    total_b: Tensor | None = None
    token_b: Tensor | None = _argmax(z_bV) if not all(s.temperature for s in settings) else None
    if any(s.temperature for s in settings):
        drawn_b, total_b = _draw(weights_bV, uniform_b)
        token_b = drawn_b if token_b is None else torch.where(greedy_b.bool(), token_b, drawn_b)
    assert token_b is not None
    weight_b = weights_bV.gather(1, token_b[:, None])[:, 0].double()
    logprob_b = (weight_b if total_b is None else weight_b / total_b).log()
    model_b = logprob_b
    if model_total_b is not None:
        model_logprob_b = (logits_bV.gather(1, token_b[:, None])[:, 0].float() - model_total_b).double()
        model_b = torch.where(plain_b.bool(), logprob_b, model_logprob_b)
    return torch.stack([token_b.double(), logprob_b, model_b, logprob_b.isfinite().double()])


def _numbers(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)


def _tempered(z_bV: Tensor, settings: Sequence[SamplingSettings], temperature_b: Tensor) -> Tensor:
    if all(s.temperature in (0, 1) for s in settings):
        return z_bV
    # Subtract the maximum first: near temperature 0 other logits may become -inf, but none becomes inf.
    return (z_bV - z_bV.amax(1, keepdim=True)) / temperature_b.float()[:, None]


def move_logits(z_bV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits [b, V] after repetition penalty, logit bias and minimum length, float32; a copy."""
    z_bV = z_bV.clone()
    for z_V, draw in zip(z_bV, draws, strict=True):
        settings = draw.settings
        if settings.repetition_penalty != 1:
            seen = torch.tensor(draw.seen, device=z_V.device)
            z = z_V[seen]
            z_V[seen] = torch.where(z > 0, z / settings.repetition_penalty, z * settings.repetition_penalty)
        if settings.logit_bias:
            ids = torch.tensor([token for token, _ in settings.logit_bias], device=z_V.device)
            z_V.index_add_(0, ids, _numbers([bias for _, bias in settings.logit_bias], z_V, torch.float32))
        if draw.forbidden:
            z_V[torch.tensor(draw.forbidden, device=z_V.device)] = -math.inf
    return z_bV


def cut(weights_bV: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """Weights [b, V] with zeros where top-k, top-p or min-p exclude tokens; each is a minimum weight per row."""
    vocabulary = weights_bV.shape[1]
    cutting = [s if s.cuts else SamplingSettings() for s in settings]
    largest = [min(s.top_k, vocabulary) or vocabulary for s in cutting]
    ks = [k for k in largest if k < vocabulary]
    if ks:
        top_bk = weights_bV.topk(max(ks), 1).values
        least = [top_bk[i, k - 1] if k < vocabulary else top_bk.new_zeros(()) for i, k in enumerate(largest)]
        weights_bV = _at_least(weights_bV, torch.stack(least))
    if any(s.top_p < 1 for s in cutting):
        weights_bV = _at_least(
            weights_bV, _top_p_weight(weights_bV, _numbers([s.top_p for s in cutting], weights_bV, torch.float64))
        )
    if any(s.min_p > 0 for s in cutting):
        weights_bV = _at_least(weights_bV, weights_bV.amax(1) * _numbers([s.min_p for s in cutting], weights_bV, torch.float32))
    return weights_bV


def _at_least(weights_bV: Tensor, least_b: Tensor) -> Tensor:
    return weights_bV.masked_fill(weights_bV < least_b[:, None], 0.0)


def _top_p_weight(weights_bV: Tensor, top_p_b: Tensor) -> Tensor:
    """The weight of the last token needed for mass top_p [b]; 0 if all are."""
    wanted_b1 = (weights_bV.sum(1, dtype=torch.float64) * top_p_b)[:, None]
    count = min(CANDIDATES, weights_bV.shape[1])
    # On a GPU sort everything at once: checking whether the candidates suffice would synchronise.
    if weights_bV.is_cuda:
        count = weights_bV.shape[1]
    while True:
        ordered_bn = weights_bV.topk(count, 1).values
        before_bn = ordered_bn.double().cumsum(1) - ordered_bn
        if count == weights_bV.shape[1] or bool(((before_bn[:, -1:] >= wanted_b1) | (top_p_b[:, None] == 1)).all()):
            break
        count = weights_bV.shape[1]
    last_b1 = (before_bn < wanted_b1).sum(1, keepdim=True).clamp(min=1) - 1
    return torch.where(top_p_b < 1, ordered_bn.gather(1, last_b1)[:, 0], 0.0)


def _in_blocks(x_bV: Tensor, filler: float) -> Tensor:
    """The vocabulary in blocks [b, C, W], for a search first over blocks and then within one."""
    spare = -x_bV.shape[1] % BLOCK
    padded_bV = functional.pad(x_bV, (0, spare), value=filler) if spare else x_bV
    return padded_bV.view(len(padded_bV), -1, BLOCK)


def _argmax(z_bV: Tensor) -> Tensor:
    """The first index of the largest logit [b]. Takes 1/20 of the time of torch.argmax at 262k tokens."""
    blocks_bCW = _in_blocks(z_bV, -math.inf)
    block_b = blocks_bCW.amax(2).argmax(1)
    return block_b * BLOCK + blocks_bCW[torch.arange(len(block_b), device=block_b.device), block_b].argmax(1)


def _draw(weights_bV: Tensor, uniform_b: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniform_b in [0, 1) falls in the cumulative distribution of weights: token [b], total weight [b] in float64."""
    blocks_bCW = _in_blocks(weights_bV, 0.0)
    cumulative_bC = blocks_bCW.sum(2, dtype=torch.float64).cumsum(1)
    total_b = cumulative_bC[:, -1]
    # Rounding must not move a draw past the last token with weight, here or within a block.
    draw_b1 = torch.minimum(uniform_b * total_b, torch.nextafter(total_b, torch.zeros_like(total_b)))[:, None]
    block_b1 = torch.searchsorted(cumulative_bC, draw_b1, right=True).clamp(max=cumulative_bC.shape[1] - 1)
    before_b1 = torch.where(block_b1 > 0, cumulative_bC.gather(1, (block_b1 - 1).clamp(min=0)), 0.0)
    inside_bW = blocks_bCW[torch.arange(len(block_b1), device=block_b1.device), block_b1[:, 0]].double()
    place_b1 = torch.searchsorted(inside_bW.cumsum(1), draw_b1 - before_b1, right=True)
    last_b1 = BLOCK - 1 - (inside_bW.flip(1) > 0).int().argmax(1, keepdim=True)
    token_b = (block_b1 * BLOCK + torch.minimum(place_b1, last_b1))[:, 0]
    return token_b.clamp(max=weights_bV.shape[1] - 1), total_b  # out of range only if weights are NaN

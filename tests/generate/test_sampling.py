"""Every processor against a plain float64 reference, draws by hand, and settings that cannot be."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.errors import ModelError
from posttrain.generate import sampling
from posttrain.generate.sampling import Draw, SamplingSettings, check_settings, choose_tokens, uniform

FOUR = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def reference(logits_V: Tensor, draw: Draw) -> Tensor:
    """The distribution that is sampled from, by its definition, one token after the other, in float64."""
    s, z = draw.settings, logits_V.double().tolist()
    for token in set(draw.seen):
        z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
    for token, bias in s.logit_bias:
        z[token] += bias
    for token in draw.forbidden:
        z[token] = -math.inf
    top = max(z)
    p = [math.exp((value - top) / (s.temperature or 1.0)) for value in z]
    if s.temperature:
        p = kept(p, s)
    return torch.tensor(p, dtype=torch.float64) / math.fsum(p)


def kept(p: list[float], s: SamplingSettings) -> list[float]:
    """Top-k, top-p and min-p in turn."""
    if 0 < s.top_k < len(p):
        least = sorted(p, reverse=True)[s.top_k - 1]
        p = [x if x >= least else 0.0 for x in p]
    if s.top_p < 1:
        mass, least = 0.0, 0.0
        for x in sorted(p, reverse=True):
            if mass >= s.top_p * math.fsum(p):
                break
            mass, least = mass + x, x
        p = [x if x >= least else 0.0 for x in p]
    return [x if x >= s.min_p * max(p) else 0.0 for x in p]


SETTINGS: list[dict[str, Any]] = [
    {}, {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 17}, {"top_k": 5000}, {"top_p": 0.05},
    {"top_p": 0.6}, {"top_p": 0.999}, {"min_p": 0.1}, {"min_p": 1.0}, {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "temperature": 0.8}, {"logit_bias": ((3, 4.0), (9, -8.0), (3, 1.0))}, {"min_new_tokens": 2},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7, "repetition_penalty": 1.2, "logit_bias": ((1, 2.0),)},
    {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.4, "logit_bias": ((3, 4.0),), "min_new_tokens": 2},
]  # fmt: skip


def problem(rows: int, vocabulary: int, seed: int) -> tuple[Tensor, list[Draw]]:
    """Logits and draws; row i has settings i of the list, so every block of rows is a mixed one."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(rows, vocabulary, generator=generator) * 3
    draws = []
    for row in range(rows):
        settings = SamplingSettings(**({"temperature": 1.0} | SETTINGS[row % len(SETTINGS)]))
        seen = torch.randint(0, vocabulary, (20,), generator=generator).tolist() if settings.repetition_penalty != 1 else ()
        likeliest = logits_RV[row].topk(3).indices.tolist()
        forbidden = likeliest if settings.min_new_tokens else ()
        draws.append(Draw(settings, uniform(seed, row, 0), tuple(dict.fromkeys(seen)), tuple(forbidden)))
    return logits_RV, draws


@pytest.mark.parametrize(("vocabulary", "candidates"), [(263, 1024), (1200, 1024), (700, 8)])
def test_every_processor_gives_the_reference_distribution(vocabulary: int, candidates: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    logits_RV, draws = problem(5 * len(SETTINGS), vocabulary, seed=vocabulary)
    chosen = choose_tokens(logits_RV, draws)
    for row, draw in enumerate(draws):
        p_V = reference(logits_RV[row], draw)
        token = chosen.tokens[row]
        if draw.settings.temperature:  # where the number falls in the cumulative distribution, to rounding
            before, after = float(p_V[:token].sum()), float(p_V[: token + 1].sum())
            assert before - 1e-5 <= draw.uniform <= after + 1e-5, draw
            assert p_V[token] > 0
        else:
            assert token == int(p_V.argmax())
        assert math.isclose(chosen.logprobs[row], math.log(float(p_V[token])), abs_tol=1e-5), draw
        own = float(torch.log_softmax(logits_RV[row].double(), 0)[token])
        assert math.isclose(chosen.model_logprobs[row], own, abs_tol=1e-5), draw


def test_a_row_gets_the_same_token_in_any_company():
    logits_RV, draws = problem(40, 700, seed=1)
    together = choose_tokens(logits_RV, draws)
    for row in range(40):
        alone = choose_tokens(logits_RV[row : row + 1], draws[row : row + 1])
        assert alone.tokens == [together.tokens[row]]
        assert math.isclose(alone.logprobs[0], together.logprobs[row], abs_tol=1e-6)
    backwards = choose_tokens(logits_RV.flip(0), draws[::-1])
    assert backwards.tokens == together.tokens[::-1]


def test_ties_take_the_first_of_equals_and_no_cut_parts_them():
    logits_RV = torch.tensor([[0.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [-3.0, -1.0, -2.0, -1.0]])
    chosen = choose_tokens(logits_RV, [Draw(SamplingSettings())] * 3)
    assert chosen.tokens == [1, 0, 1]
    wanted = torch.log_softmax(logits_RV, 1)[torch.arange(3), torch.tensor(chosen.tokens)]
    assert torch.allclose(torch.tensor(chosen.logprobs), wanted)
    for cut in ({"top_k": 1}, {"top_p": 0.2}, {"min_p": 1.0}):
        settings = SamplingSettings(temperature=1.0, **cut)
        drawn = {choose_tokens(logits_RV[:1], [Draw(settings, u)]).tokens[0] for u in (0.0, 0.49, 0.51, 0.999)}
        assert drawn == {1, 2}


@pytest.mark.parametrize(
    ("number", "top_p", "token", "p"),
    [
        (0.00, 1.0, 0, 0.5), (0.49, 1.0, 0, 0.5), (0.51, 1.0, 1, 0.3), (0.79, 1.0, 1, 0.3), (0.94, 1.0, 2, 0.15),
        (0.96, 1.0, 3, 0.05), (1 - 2**-53, 1.0, 3, 0.05),
        # the smallest set with mass 0.79 is {0, 1}: of the draw's 0.8, token 0 has 5/8
        (0.62, 0.79, 0, 5 / 8), (0.63, 0.79, 1, 3 / 8), (1 - 2**-53, 0.79, 1, 3 / 8),
        (0.999999, 0.81, 2, 0.15 / 0.95), (0.5, 0.01, 0, 1.0),
    ],
)  # fmt: skip
def test_a_draw_by_hand(number: float, top_p: float, token: int, p: float):
    chosen = choose_tokens(FOUR, [Draw(SamplingSettings(temperature=1.0, top_p=top_p), number)])
    assert chosen.tokens == [token]
    assert math.isclose(chosen.logprobs[0], math.log(p), abs_tol=1e-6)


def test_processors_by_hand():
    def p_of_first(**settings: Any) -> float:
        draw = Draw(SamplingSettings(temperature=settings.pop("temperature", 1.0), **settings), 0.0, seen=(0,))
        return math.exp(choose_tokens(FOUR, [draw]).logprobs[0])

    # p^(1/T) with T = 1/2: 0.25, 0.09, 0.0225, 0.0025 of 0.365
    assert math.isclose(p_of_first(temperature=0.5), 0.25 / 0.365, abs_tol=1e-6)
    # log 0.5 is below 0 and doubles: 0.25 of 0.75
    assert math.isclose(p_of_first(repetition_penalty=2.0), 0.25 / 0.75, abs_tol=1e-6)
    # + log 3: 1.5 of 2
    assert math.isclose(p_of_first(logit_bias=((0, math.log(3)),)), 0.75, abs_tol=1e-6)
    # at least a fifth of 0.5: 0.5, 0.3, 0.15
    assert math.isclose(p_of_first(min_p=0.2), 0.5 / 0.95, abs_tol=1e-6)
    assert math.isclose(p_of_first(top_k=2), 0.5 / 0.8, abs_tol=1e-6)


def test_100000_draws_have_the_frequencies_of_the_distribution():
    p, count = FOUR[0].exp(), 100_000
    token_R, _ = sampling._draw(p.expand(count, 4), torch.tensor([uniform(0, 7, t) for t in range(count)], dtype=torch.float64))
    found = torch.bincount(token_R, minlength=4).double()
    chi_square = float(((found - count * p) ** 2 / (count * p)).sum())
    assert chi_square < 11.34  # 99 % quantile with 3 degrees of freedom


def test_numbers_of_neighbouring_seeds_rows_and_positions_are_unrelated():
    count = 20_000
    for neighbour in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        a = torch.tensor([uniform(5, i, 3) for i in range(count)])
        b = torch.tensor([uniform(5 + neighbour[0], i + neighbour[1], 3 + neighbour[2]) for i in range(count)])
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(count)
        assert abs(float(a.mean()) - 0.5) < 4 / math.sqrt(12 * count)
    assert 0 <= min(uniform(-3, 2**40, t) for t in range(100)) <= max(uniform(-3, 2**40, t) for t in range(100)) < 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature: float):
    chosen = choose_tokens(torch.randn(5, 300) * 20, [Draw(SamplingSettings(temperature=temperature), 0.7)] * 5)
    assert chosen.logprobs == [0.0] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens = -1 · 0 or more"),
        ({"temperature": -0.1}, "temperature = -0.1 · 0 or more"),
        ({"temperature": math.nan}, "temperature = nan"), ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0 · more than 0, at most 1"), ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"), ({"top_k": -1}, "top_k = -1"), ({"min_p": 1.5}, "min_p = 1.5 · 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 · 0.01 to 100"),
        ({"min_new_tokens": 65}, r"min_new_tokens = 65 · 0 to max_new_tokens \(64\)"),
        ({"stop": ("",)}, "an empty stop string"), ({"stop_ids": (-1,)}, "token id -1 in stop_ids or logit_bias · 0 to 262"),
        ({"logit_bias": ((263, 1.0),)}, "token id 263"), ({"logit_bias": ((2, math.inf),)}, "a logit_bias that is not finite"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=f"generation · {message}"):
        check_settings(SamplingSettings(**settings), 263)

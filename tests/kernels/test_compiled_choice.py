"""The compiled choice of a token against float64."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.generate.sampling import MIN_TEMPERATURE, Draw, SamplingSettings, choose_tokens, uniform
from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.build import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here, or POSTTRAIN_COMPILE=0: torch chooses")
VOCABULARIES = [1, 7, 16, 17, 263, 1024, 1025, 49152]


def logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3).bfloat16()


def chosen(z: Tensor, rows: list[tuple[float, float, bool]]) -> list[tuple[float, float, float, float]]:
    return bindings.choose_tokens(z, rows, [()] * len(rows))


def drawn(logits_V: Tensor, number: float, temperature: float) -> int:
    """Where a number falls in the cumulative distribution, in float64."""
    weights = torch.softmax(logits_V.double() / temperature, 0)
    return int(torch.searchsorted(weights.cumsum(0), number, right=True).clamp(max=len(logits_V) - 1))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_draws(vocabulary: int, temperature: float) -> None:
    """Away from the edges between tokens by more than float32 makes of them, a number draws the same token as in float64."""
    z = logits(40, vocabulary)
    numbers = [uniform(1, row, 0) for row in range(40)]
    found = chosen(z, [(number, temperature, True) for number in numbers])
    same = 0
    for z_V, number, (token, logprob, model, finite) in zip(z, numbers, found, strict=True):
        near = {drawn(z_V, number + d, temperature) for d in (-1e-5, 0.0, 1e-5)}
        assert int(token) in near
        same += int(token) == drawn(z_V, number, temperature)
        wanted = torch.log_softmax(z_V.double() / temperature, 0)[int(token)]
        own = torch.log_softmax(z_V.double(), 0)[int(token)]
        assert (logprob, model, finite) == (pytest.approx(float(wanted), abs=2e-6), pytest.approx(float(own), abs=2e-6), 1.0)
    assert same >= 38


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_likeliest_is_the_first_of_equals(vocabulary: int) -> None:
    z = logits(30, vocabulary, 1)
    z[::2, vocabulary // 3 :: 2] = 20.0
    for told in (True, False):
        found = chosen(z, [(0.5, 0.0, told)] * 30)
        for z_V, (token, logprob, model, finite) in zip(z, found, strict=True):
            assert int(token) == int((z_V == z_V.max()).nonzero()[0])
            assert finite == 1
            wanted = float(torch.log_softmax(z_V.double(), 0)[int(token)]) if told else 0.0
            assert logprob == model == pytest.approx(wanted, abs=2e-6)


def test_the_ends_of_the_range_draw_tokens_that_have_weight() -> None:
    """0 the first with any, the largest number below 1 the last; tokens of -inf have none."""
    z = logits(1, 300)
    z[0, :40] = z[0, 250:] = -math.inf
    (first, *_), (last, *_) = chosen(z.expand(2, -1), [(0.0, 1.0, True), (1 - 2**-53, 1.0, True)])
    assert first == 40
    assert 200 < last < 250
    for temperature in (MIN_TEMPERATURE, 1e-3):
        ((token, logprob, *_),) = chosen(z, [(0.7, temperature, True)])
        assert token == int(z[0].argmax())
        assert logprob == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 1023, 1024, 1026])
def test_logits_that_are_no_numbers_are_told(value: float, place: int) -> None:
    z = logits(3, 1027)
    z[1, place] = value
    for temperature in (0.0, 1.0):
        assert [row[3] for row in chosen(z, [(0.5, temperature, True)] * 3)] == [1, 0, 1]
    z[1] = -math.inf
    assert [row[3] for row in chosen(z, [(0.5, 0.0, False)] * 3)] == [1, 0, 1]


def test_a_rows_token_depends_on_no_other_row_nor_on_where_it_lies() -> None:
    z = logits(70, 5000)
    rows = [(uniform(2, row, 3), (0.0, 0.7, 1.0)[row % 3], row % 2 == 0) for row in range(70)]
    found = chosen(z, rows)
    wide = torch.zeros(70, 9000).bfloat16()
    wide[:, 2000:7000] = z
    assert chosen(wide[:, 2000:7000], rows) == found
    for row in range(0, 70, 11):
        assert chosen(z[row : row + 1], rows[row : row + 1]) == found[row : row + 1]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_a_row_goes_without_some_tokens(temperature: float) -> None:
    """As if they were -inf; the model's own log-probability is still of all. The logits are afterwards what they were."""
    z = logits(50, 1030, 3)
    without = [tuple(z_V.topk(row % 4).indices.tolist()) * (1 + row % 2) for row, z_V in enumerate(z)]
    rows = [(uniform(5, row, 0), temperature, True) for row in range(50)]
    before, masked = z.clone(), z.clone()
    for z_V, ids in zip(masked, without, strict=True):
        z_V[list(ids)] = -math.inf
    found = bindings.choose_tokens(z, rows, without)
    assert torch.equal(z, before)
    for z_V, own, other in zip(z, found, chosen(masked, rows), strict=True):
        assert own[:2] == other[:2]
        assert own[2] == pytest.approx(float(torch.log_softmax(z_V.double(), 0)[int(own[0])]), abs=2e-6)
    ((*_, finite),) = bindings.choose_tokens(z[:1], rows[:1], [tuple(range(1030))])
    assert not finite


def test_the_share_of_each_token_is_its_probability() -> None:
    """20,000 draws from eight tokens: chi-squared with 7 degrees of freedom, 24.3 at one in a thousand."""
    z = logits(1, 8, 5)
    numbers = [uniform(9, index, 0) for index in range(20000)]
    tokens = [int(row[0]) for row in chosen(z.expand(20000, -1), [(n, 1.0, False) for n in numbers])]
    wanted = torch.softmax(z[0].double(), 0) * 20000
    counts = torch.bincount(torch.tensor(tokens), minlength=8)
    assert float(((counts - wanted) ** 2 / wanted).sum()) < 24.3


def test_rows_that_are_moved_or_cut_stand_beside_others() -> None:
    """Each by its own function, whatever stands beside it."""
    settings = [
        SamplingSettings(temperature=1.0), SamplingSettings(temperature=1.0, top_k=3), SamplingSettings(),
        SamplingSettings(temperature=0.8, repetition_penalty=1.3), SamplingSettings(temperature=1.0, min_new_tokens=4),
    ]  # fmt: skip
    z = logits(5, 263)
    draws = [Draw(s, uniform(4, row, 0), (1, 2), (5,) if s.min_new_tokens else ()) for row, s in enumerate(settings)]
    whole = choose_tokens(z, draws)
    for row in range(5):
        alone = choose_tokens(z[row : row + 1], draws[row : row + 1])
        assert [x[0] for x in alone] == [x[row] for x in whole]
    assert whole.logprobs[1] > whole.model_logprobs[1]
    plain = choose_tokens(z.float(), draws)
    assert plain.tokens == whole.tokens
    for own, other in zip(whole.model_logprobs, plain.model_logprobs, strict=True):
        assert own == pytest.approx(other, abs=2e-6)

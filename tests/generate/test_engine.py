"""Generation: what a row says does not depend on its neighbours, and its log-probabilities are those of a full forward."""

import math
from collections.abc import Iterator

import pytest
import torch
import transformers

from posttrain.errors import ModelError
from posttrain.generate import engine
from posttrain.generate.engine import SamplingSettings, choose_tokens, generate, stream
from posttrain.models.load import BaseModel
from posttrain.models.lora import LoraSettings
from posttrain.models.segments import Segments, Span
from posttrain.records import Rollout

ADAPTER = "lively"


@pytest.fixture(scope="module")
def base(tiny: BaseModel) -> Iterator[BaseModel]:
    """The tiny base with an adapter that changes what it says."""
    adapter = tiny.adapters.create(ADAPTER, LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.2, generator=generator)
    yield tiny
    tiny.adapters.remove(ADAPTER)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few places and small prefills: rows join and leave all the time."""
    monkeypatch.setitem(engine.ROWS, "cpu", 7)
    monkeypatch.setitem(engine.PREFILL_TOKENS, "cpu", 100)


def ragged_prompts(count: int = 64) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, all different."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 61, (count,), generator=generator).tolist()
    return [[1, *torch.randint(7, 263, (n,), generator=generator).tolist()] for n in lengths]


def full_logits(base: BaseModel, ids: list[int], adapter: str) -> torch.Tensor:
    """Logits [T, V] of one row computed at once, as training computes them."""
    with torch.no_grad():
        row = torch.tensor(ids)
        hidden = base.hidden(row, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), adapter)
        return base.logits(hidden, adapter)


def tempered(logits_V: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution that is sampled from, by its definition, in float64."""
    p_V = torch.softmax(logits_V.double() / (temperature or 1.0), -1)
    kept, mass = [], 0.0
    for token in sorted(range(len(p_V)), key=lambda t: -float(p_V[t])):
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(p_V[token])
    cut_V = torch.zeros_like(p_V)
    cut_V[kept] = p_V[kept]
    return cut_V / cut_V.sum()


@pytest.mark.parametrize("adapter", ["base", ADAPTER])
def test_greedy_answers_of_64_ragged_prompts_are_those_of_each_alone(base: BaseModel, crowded: None, adapter: str):
    prompts = ragged_prompts()
    settings = SamplingSettings(max_new_tokens=20)
    together = generate(base, prompts, settings, adapter)
    alone = [generate(base, [p], settings, adapter)[0] for p in prompts]
    differing = sum(a.completion_ids != b.completion_ids for a, b in zip(together, alone, strict=True))
    assert f"{differing} of {len(prompts)} differ" == "0 of 64 differ"
    assert [list(r.prompt_ids) for r in together] == prompts
    assert len({r.completion_ids for r in together}) > 32


def test_greedy_answers_are_those_of_transformers(base: BaseModel, crowded: None):
    model = transformers.AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.float32, local_files_only=True)
    prompts = ragged_prompts(8)
    for prompt, rollout in zip(prompts, generate(base, prompts, SamplingSettings(12), "base"), strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in rollout.completion_ids:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids[len(prompt) :]) == rollout.completion_ids


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_logprobs_are_those_of_a_full_forward_within_1e_5(base: BaseModel, crowded: None, temperature: float, top_p: float):
    settings = SamplingSettings(24, temperature, top_p, seed=5)
    worst, tokens = 0.0, 0
    for rollout in generate(base, ragged_prompts(16), settings, ADAPTER):
        start = len(rollout.prompt_ids)
        logits_TV = full_logits(base, [*rollout.prompt_ids, *rollout.completion_ids], ADAPTER)
        for index, (token, logprob) in enumerate(zip(rollout.completion_ids, rollout.logprobs, strict=True)):
            p_V = tempered(logits_TV[start + index - 1], temperature, top_p if temperature else 1.0)
            worst = max(worst, abs(logprob - math.log(float(p_V[token]))))
            tokens += 1
    assert tokens > 300
    assert worst <= 1e-5


def test_what_a_row_samples_does_not_depend_on_its_neighbours(base: BaseModel, crowded: None):
    prompts = ragged_prompts(20)
    settings = SamplingSettings(16, 1.0, 1.0, seed=9)
    together = generate(base, prompts, settings, ADAPTER)
    # other neighbours, the same places in the list: every second prompt is replaced
    others = generate(base, [p if i % 2 else [1, 50, 60] for i, p in enumerate(prompts)], settings, ADAPTER)
    fewer = generate(base, prompts[:4], settings, ADAPTER)
    assert [r.completion_ids for r in together[1::2]] == [r.completion_ids for r in others[1::2]]
    assert [r.completion_ids for r in together[:4]] == [r.completion_ids for r in fewer]


def test_the_seed_and_the_index_choose_the_randomness(base: BaseModel):
    same = [[1, 70, 80]] * 6
    one = [r.completion_ids for r in generate(base, same, SamplingSettings(12, 1.0, seed=1), "base")]
    assert len(set(one)) == 6
    assert one == [r.completion_ids for r in generate(base, same, SamplingSettings(12, 1.0, seed=1), "base")]
    assert one != [r.completion_ids for r in generate(base, same, SamplingSettings(12, 1.0, seed=2), "base")]
    without = generate(base, same, SamplingSettings(12, 1.0, seed=1, logprobs=False), "base")
    assert one == [r.completion_ids for r in without]


def test_ties_take_the_first_of_equals():
    logits_RV = torch.tensor([[0.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [-3.0, -1.0, -2.0, -1.0]])
    token_R, logprob_R = choose_tokens(logits_RV, SamplingSettings(temperature=0.0), None)
    assert token_R.tolist() == [1, 0, 1]
    assert torch.allclose(logprob_R, torch.log_softmax(logits_RV, 1)[torch.arange(3), token_R])


@pytest.mark.parametrize(
    ("uniform", "top_p", "token", "p"),
    [
        (0.00, 1.0, 0, 0.5), (0.49, 1.0, 0, 0.5), (0.51, 1.0, 1, 0.3), (0.79, 1.0, 1, 0.3), (0.94, 1.0, 2, 0.15),
        (0.96, 1.0, 3, 0.05), (0.999999, 1.0, 3, 0.05),
        # the smallest set with mass 0.79 is {0, 1}: of the draw's 0.8, token 0 has 5/8
        (0.62, 0.79, 0, 5 / 8), (0.63, 0.79, 1, 3 / 8), (0.999999, 0.79, 1, 3 / 8),
        (0.999999, 0.81, 2, 0.15 / 0.95), (0.5, 0.01, 0, 1.0),
    ],
)  # fmt: skip
def test_a_draw_by_hand(uniform: float, top_p: float, token: int, p: float):
    logits_RV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    settings = SamplingSettings(temperature=1.0, top_p=top_p)
    token_R, logprob_R = choose_tokens(logits_RV, settings, torch.tensor([uniform], dtype=torch.float64))
    assert token_R.tolist() == [token]
    assert math.isclose(float(logprob_R[0]), math.log(p), abs_tol=1e-6)


def test_temperature_sharpens_by_its_power():
    # p^(1/T) with T = 1/2: 0.25, 0.09, 0.0225, 0.0025 of 0.365
    logits_RV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    _, logprob_R = choose_tokens(logits_RV, SamplingSettings(temperature=0.5), torch.tensor([0.1], dtype=torch.float64))
    assert math.isclose(float(logprob_R[0]), math.log(0.25 / 0.365), abs_tol=1e-6)


def test_100000_draws_have_the_frequencies_of_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 100_000
    uniform_R = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token_R, _ = choose_tokens(p.log().expand(count, 4), SamplingSettings(temperature=1.0), uniform_R)
    found = torch.bincount(token_R, minlength=4).double()
    chi_square = float(((found - count * p) ** 2 / (count * p)).sum())
    assert chi_square < 11.34  # 99 % quantile with 3 degrees of freedom


def test_a_row_stops_at_the_end_of_its_turn_and_only_there(base: BaseModel, crowded: None, monkeypatch: pytest.MonkeyPatch):
    prompts = ragged_prompts(12)
    free = generate(base, prompts, SamplingSettings(20), "base")
    assert not any(r.ended for r in free)
    end = free[0].completion_ids[3]
    monkeypatch.setattr(base.chat, "end_ids", frozenset({end}))
    for before, after in zip(free, generate(base, prompts, SamplingSettings(20), "base"), strict=True):
        stops = end in before.completion_ids
        length = before.completion_ids.index(end) + 1 if stops else 20
        assert after.completion_ids == before.completion_ids[:length]  # the end token is the last one
        assert len(after.logprobs) == length
        assert after.ended == stops
        assert after.text == base.chat.decode(list(after.completion_ids[:-1] if stops else after.completion_ids))
        streamed = list(stream(base, before.prompt_ids, SamplingSettings(20), "base"))
        assert streamed == list(after.completion_ids[:-1] if stops else after.completion_ids)


def test_progress_counts_every_row_and_token_once(base: BaseModel, crowded: None):
    told: list[tuple[int, int]] = []
    rollouts = generate(base, ragged_prompts(20), SamplingSettings(9), "base", advance=lambda r, t: told.append((r, t)))
    assert sum(rows for rows, _ in told) == 20
    # the first token of a row comes with its prompt
    assert sum(tokens for _, tokens in told) == sum(len(r.completion_ids) - 1 for r in rollouts)


def test_no_prompt_and_no_token(base: BaseModel):
    assert generate(base, [], SamplingSettings(), "base") == []
    assert generate(base, [[1, 2]], SamplingSettings(0), "base") == [Rollout((1, 2), (), (), "", False, "base")]
    assert list(stream(base, [1, 2], SamplingSettings(0), "base")) == []
    assert len(generate(base, [[1, 2]], SamplingSettings(1), "base")[0].completion_ids) == 1


def test_a_prompt_may_fill_the_context_and_not_more(base: BaseModel):
    room = base.context
    assert len(generate(base, [[7] * (room - 1)], SamplingSettings(1), "base")[0].completion_ids) == 1
    with pytest.raises(ModelError, match=f"a prompt of {room} tokens and 1 new ones · together at most {room}"):
        generate(base, [[7], [7] * room], SamplingSettings(1), "base")


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(-1), SamplingSettings(temperature=-0.1), SamplingSettings(temperature=math.nan),
        SamplingSettings(temperature=math.inf), SamplingSettings(top_p=0.0), SamplingSettings(top_p=1.1),
        SamplingSettings(top_p=math.nan),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(base: BaseModel, settings: SamplingSettings):
    with pytest.raises(ModelError, match="max_new_tokens >= 0, temperature >= 0, 0 < top_p <= 1"):
        generate(base, [[1]], settings, "base")


def test_an_empty_prompt_is_refused(base: BaseModel):
    with pytest.raises(ModelError, match="an empty prompt"):
        generate(base, [[1], []], SamplingSettings(), "base")

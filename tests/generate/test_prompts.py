"""Prompts of the engine: computed in pieces, found again, scored."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import answers, full_logits, lively, ragged_prompts, run

from posttrain.errors import ModelError
from posttrain.generate import steps
from posttrain.generate.batch import SMALLEST_SHELF, StepBatch, lay_out
from posttrain.generate.engine import Engine, SamplingSettings, generate
from posttrain.generate.prefix import PrefixCache
from posttrain.generate.requests import Event, Request, Row
from posttrain.models.base_model import BaseModel
from posttrain.models.cache import BLOCK, Shelf
from posttrain.records import Rollout

ADAPTERS = ("left", "right")
LONG = 300


@pytest.fixture(scope="module")
def base(tiny: BaseModel) -> Iterator[BaseModel]:
    """The tiny base with two adapters of known content."""
    for seed, name in enumerate(ADAPTERS):
        lively(tiny, name, seed).fingerprint = f"content {name}"
    yield tiny
    for name in ADAPTERS:
        tiny.adapters.remove(name)


def long_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [[1, *torch.randint(7, 263, (LONG - 40 * i,), generator=generator).tolist()] for i in range(count)]


def worst_difference(base: BaseModel, rollouts: list[Rollout]) -> float:
    """Between the log-probabilities of an engine and those of a full forward."""
    worst = 0.0
    for rollout in rollouts:
        start = len(rollout.prompt_ids)
        logits_TV = full_logits(base, [*rollout.prompt_ids, *rollout.completion_ids], rollout.adapter)
        logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
        for index, (token, logprob) in enumerate(zip(rollout.completion_ids, rollout.model_logprobs, strict=True)):
            worst = max(worst, abs(float(logprobs_TV[start + index - 1, token]) - logprob))
    return worst


def test_a_prompt_in_pieces_gives_what_it_gives_whole(base: BaseModel, pieces: None):
    """Pieces of 48 tokens beside short prompts and rows that decode; several completions below one prompt too."""
    short = ragged_prompts(12)
    settings = SamplingSettings(8, 1.0, seed=2)
    engine = Engine(base)
    requests = [Request(p, settings, ADAPTERS[i % 2], 2 * i, 2) for i, p in enumerate([*long_prompts(3), *short])]
    found = answers(engine, requests)
    assert len(found) == 30
    assert worst_difference(base, found) <= 1e-5
    alone = [rollout for request in requests for rollout in answers(Engine(base), [request])]
    assert [r.completion_ids for r in found] == [r.completion_ids for r in alone]


def test_short_prompts_do_not_wait_for_the_end_of_a_long_one(base: BaseModel, pieces: None):
    """Of 48 tokens a step the long prompt has 24 while others wait: 13 steps for 301 tokens. The short one is there in one."""
    engine = Engine(base)
    (long,) = engine.submit(Request(long_prompts(1)[0], SamplingSettings(1)))
    engine.step()
    (other,) = engine.submit(Request(long_prompts(1)[0], SamplingSettings(1)))  # one at a time is computed in pieces
    (short,) = engine.submit(Request([1, 50, 60], SamplingSettings(1), owner="somebody"))
    assert [event.row for event in engine.step()] == [short]
    assert [event.row for event in run(engine)] == [long, other]


def test_what_was_computed_is_found_again_and_gives_the_same(base: BaseModel):
    """A second turn of a conversation: prompt and answer of the first are there, in full blocks of 64 tokens."""
    engine = Engine(base, serving=True)
    settings = SamplingSettings(40, 1.0, seed=3, min_new_tokens=40)
    first = answers(engine, [Request(long_prompts(1)[0], settings, "left")])[0]
    conversation = [*first.prompt_ids, *first.completion_ids, 70, 71, 72]
    assert (engine.prefixes.hits, engine.prefixes.asked) == (0, 301)
    again = answers(engine, [Request(conversation, settings, "left")])[0]
    # 301 + 39 tokens were cached: five full blocks
    assert engine.prefixes.hits == 320
    assert worst_difference(base, [again]) <= 1e-5
    assert again.completion_ids == answers(Engine(base), [Request(conversation, settings, "left")])[0].completion_ids


def test_no_prompt_is_found_under_other_weights(base: BaseModel):
    """The same name with other content, another adapter, the base, and weights in training find nothing."""
    engine = Engine(base, serving=True)
    prompt, settings = long_prompts(1)[0], SamplingSettings(6, 1.0)
    answers(engine, [Request(prompt, settings, "left")])
    swapped = lively(base, "swapped", 9)
    base.adapters.remove("swapped")
    kept = base.adapters.get("left")
    try:
        for adapter, fingerprint in ((swapped, "other content"), (swapped, None)):
            adapter.fingerprint, adapter.name = fingerprint, "left"
            base.adapters.add(adapter)
            found = answers(engine, [Request(prompt, settings, "left")])
            assert engine.prefixes.hits == 0
            assert worst_difference(base, found) <= 1e-5
    finally:
        base.adapters.add(kept)
    for name in ("right", "base"):
        assert worst_difference(base, answers(engine, [Request(prompt, settings, name)])) <= 1e-5
    assert engine.prefixes.hits == 0
    answers(engine, [Request(prompt, settings, "left")])
    assert engine.prefixes.hits == 256


def test_the_least_recently_used_blocks_leave(base: BaseModel):
    """Room for three blocks: of a prompt with two and one with two, the first block of the older one leaves."""
    engine = Engine(base, serving=True)
    prompts = [[1, *range(10 * i, 10 * i + 130)] for i in (1, 2)]
    answers(engine, [Request(prompts[0], SamplingSettings(1))])
    two = engine.prefixes.bytes
    engine.prefixes = PrefixCache(two // 2 * 3)
    for prompt in prompts:
        answers(engine, [Request(prompt, SamplingSettings(1))])
    assert engine.prefixes.bytes == two // 2 * 3
    answers(engine, [Request(prompts[1], SamplingSettings(1))])
    assert engine.prefixes.hits == 128
    answers(engine, [Request(prompts[0], SamplingSettings(1))])
    assert engine.prefixes.hits == 128  # its first block has left, and without it the second is not reached


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the memory of a process as Linux tells it")
def test_what_is_kept_takes_the_memory_that_it_counts(base: BaseModel):
    """2,400 blocks of a small model, 16 KiB each, of which a tensor for each layer took another eighth."""
    shelf, kept = Shelf(1, 256, base.device), PrefixCache(2**30)
    for layer in range(2):
        shelf.layer(layer, torch.zeros(1, 64, 32, dtype=torch.bfloat16))
    row = Row(0, Request([1]), 0, None, base.chat, "weights")

    def keep(first: int, last: int) -> None:
        for number in range(first, last):
            row.prompt = (number, *range(191))
            row.filled = 192
            kept.keep(row, shelf, 0)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep(0, 200)
    before, counted = resident(), kept.bytes
    keep(200, 1000)
    assert kept.bytes - counted == 2400 * (16 * 2**10 + 1024)
    assert resident() - before <= 1.06 * (kept.bytes - counted)


@pytest.mark.parametrize("new_tokens", [0, 3])
def test_a_prompt_is_scored_token_by_token(base: BaseModel, pieces: None, new_tokens: int):
    """In pieces, beside others, after prompts that begin alike: log p of each token but the first, and the likeliest three."""
    engine = Engine(base, serving=True)
    prompts = [*long_prompts(2), *ragged_prompts(5), [1]]
    settings = SamplingSettings(new_tokens, top_logprobs=3)
    for _ in range(2):  # what was kept of the first time is not used
        numbers = [engine.submit(Request(p, settings, "left", prompt_logprobs=True))[0] for p in prompts]
        first: dict[int, Event] = {}
        for event in run(engine):
            first.setdefault(event.row, event)
        for number, prompt in zip(numbers, prompts, strict=True):
            scores = first[number].prompt
            assert scores is not None
            logprobs_TV = torch.log_softmax(full_logits(base, prompt, "left").double(), -1)
            assert [s.token for s in scores] == prompt[1:]
            for place, score in enumerate(scores):
                assert score.logprob == pytest.approx(float(logprobs_TV[place, score.token]), abs=1e-5)
                values, ids = logprobs_TV[place].topk(3)
                assert [token for token, _ in score.top] == ids.tolist()
                assert [logprob for _, logprob in score.top] == pytest.approx(values.tolist(), abs=1e-5)
            assert (first[number].token is None) == (new_tokens == 0)


def scored_alike(base: BaseModel, engine: Engine, prompt: list[int], new_tokens: int) -> None:
    """The engine scores a prompt as a full forward does, whatever it generates after it."""
    (number,) = engine.submit(Request(prompt, SamplingSettings(new_tokens), "left", prompt_logprobs=True))
    events = [event for event in run(engine) if event.row == number]
    assert events[0].prompt is not None
    logprobs_TV = torch.log_softmax(full_logits(base, prompt, "left").double(), -1)
    wanted = logprobs_TV[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert [s.logprob for s in events[0].prompt] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert events[-1].rollout is not None
    assert (events[-1].rollout.finish, len(events[-1].rollout.completion_ids)) == ("length", new_tokens)


@pytest.mark.parametrize("smallest", [BLOCK, SMALLEST_SHELF["cpu"]])
def test_prompts_that_fill_a_shelf_to_its_last_token_are_scored(
    base: BaseModel, smallest: int, monkeypatch: pytest.MonkeyPatch
):
    """One token more than a power of two, without generation, needs a shelf of the next size: on a GPU from 65 tokens on, on a
    CPU from 1,025."""
    monkeypatch.setitem(SMALLEST_SHELF, "cpu", smallest)
    engine = Engine(base, serving=True)
    generator = torch.Generator().manual_seed(5)
    for length in (64, 65, 128, 129, 1024, 1025):
        prompt = [1, *torch.randint(7, 263, (length - 1,), generator=generator).tolist()]
        for new_tokens in (0, 1, 2):
            scored_alike(base, engine, prompt, new_tokens)


def test_prompts_that_fill_a_shelf_are_scored_in_pieces_and_kept(base: BaseModel, pieces: None):
    """1,025 tokens in pieces of 48; what was scored is found by whoever asks for the same prompt and its continuation."""
    engine, prompt = Engine(base, serving=True), [1, *(7 + 5 * i % 250 for i in range(1024))]
    scored_alike(base, engine, prompt, 0)
    request = Request([*prompt, 50], SamplingSettings(6, 1.0, seed=3), "left")
    found = answers(engine, [request])
    assert engine.prefixes.hits == 1024
    assert found[0].completion_ids == answers(Engine(base), [request])[0].completion_ids


def test_the_likeliest_tokens_come_with_each_token(base: BaseModel):
    """They are the model's own, whatever is sampled from: a greedy token with a bias against it is still the first."""
    settings = SamplingSettings(5, top_logprobs=4, logit_bias=((20, -100.0),))
    prompt = [1, 40, 41, 42]
    engine = Engine(base)
    engine.submit(Request(prompt, settings, "left"))
    ids = list(prompt)
    for event in run(engine):
        assert event.token is not None
        values, tokens = torch.log_softmax(full_logits(base, ids, "left")[-1].double(), -1).topk(4)
        assert [token for token, _ in event.top] == tokens.tolist()
        assert [logprob for _, logprob in event.top] == pytest.approx(values.tolist(), abs=1e-5)
        ids.append(event.token)
    with pytest.raises(ModelError, match="top_logprobs = -1"):
        generate(base, [prompt], SamplingSettings(5, top_logprobs=-1), "base")


@pytest.fixture
def huge(base: BaseModel) -> Iterator[str]:
    """An adapter of finite weights that give no numbers."""
    with torch.no_grad():
        for pair in lively(base, "huge", 3).weights.values():
            for matrix in pair:
                matrix.fill_(3e38)
    yield "huge"
    base.adapters.remove("huge")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_give_no_numbers_end_their_own_rows_alone(base: BaseModel, huge: str, temperature: float):
    """Finite weights of 3e38 beside good ones: theirs end with "not finite", the others, and those that take their places,
    answer as they do alone. Whoever generates offline gets an error."""
    for logprobs in (True, False):
        settings = SamplingSettings(12, temperature, seed=4, logprobs=logprobs, min_new_tokens=12)
        engine = Engine(base, serving=True)
        first = [
            Request([1, *range(30 + i, 70 + i)], settings, name, i)
            for i, name in enumerate(("left", huge, "left", "base", "right"))
        ]
        (_, bad, *_) = [engine.submit(request)[0] for request in first]
        ends = {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        assert [(row, rollout.finish) for row, rollout in ends.items()] == [(bad, "not finite")]
        # Those that come after are shorter than what stood in the place.
        second = [Request([1, 30 + i], settings, name, i) for i, name in enumerate(("left", "base", "right"))]
        numbers = [*range(bad - 1, bad), *range(bad + 1, bad + 4), *(engine.submit(r)[0] for r in second)]
        found = {event.row: event.rollout for event in run(engine) if event.rollout is not None}
        good = [request for request in first if request.adapter != huge] + second
        for number, request in zip(numbers, good, strict=True):
            assert found[number].completion_ids == answers(Engine(base), [request])[0].completion_ids
        with pytest.raises(ModelError, match='"huge" produced logits that are not finite'):
            generate(base, [[1, 30, 40]], settings, huge)


def test_a_prompt_of_theirs_that_is_given_up_half_way_leaves_nothing(base: BaseModel, huge: str, pieces: None):
    engine = Engine(base, serving=True)
    engine.submit(Request([1, 30], SamplingSettings(60, min_new_tokens=60), "left"))
    (bad,) = engine.submit(Request(long_prompts(1)[0], SamplingSettings(4), huge))
    for _ in range(3):
        engine.step()
    engine.cancel(bad)
    after = Request([1, 31], SamplingSettings(12, min_new_tokens=12), "right")
    assert answers(engine, [after])[0].completion_ids == answers(Engine(base), [after])[0].completion_ids


def test_prompts_that_begin_alike_are_grouped_where_that_computes_less(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """Two families of worked examples in one batch, and a prompt that belongs to neither."""
    families, single = long_prompts(2), ragged_prompts(1)
    prompts = [[*family[:200], 7 + i, 9] for family in families for i in range(4)] + single
    settings = SamplingSettings(6, 1.0, seed=2)
    requests = [Request(p, settings, "left", i, 1) for i, p in enumerate(prompts)]
    computed: list[int] = []

    def counted(*arguments: object) -> StepBatch:
        batch = lay_out(*arguments)  # type: ignore[arg-type]
        computed.append(len(batch.ids_T))
        return batch

    monkeypatch.setattr(steps, "lay_out", counted)
    found = answers(Engine(base), requests)
    monkeypatch.undo()
    needed = 2 * 200 + 8 * 2 + len(single[0])
    assert needed <= max(computed) < needed + 128
    assert worst_difference(base, found) <= 1e-5
    alone = [rollout for request in requests for rollout in answers(Engine(base), [request])]
    assert [r.completion_ids for r in found] == [r.completion_ids for r in alone]

"""A row that makes a step fail ends with its own error; all others get the tokens that they get alone."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_runs import answers, lively, run

from posttrain.errors import BusyError
from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine, SamplingSettings, generate
from posttrain.generate.requests import Event, Request
from posttrain.generate.worker import Server, serving
from posttrain.models.base_model import BaseModel, load_base

# A token that broken models cannot embed.
BAD = 200
SETTINGS = SamplingSettings(10, 1.0, seed=4, min_new_tokens=10, logit_bias=((BAD, -100.0),))
PROMPTS = [[1, *range(20 + i, 30 + 2 * i)] for i in range(8)]


class Broken:
    """Counts the forwards of a model, and raises in those in which a token stands; without a token, in all of them."""

    def __init__(self, token: int | None, error: type[Exception]) -> None:
        self.token, self.error, self.failed = token, error, 0

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.token is None or bool((inputs[0] == self.token).any()):
            self.failed += 1
            raise self.error("cannot embed this")


@contextmanager
def broken(base: BaseModel, token: int | None = BAD, error: type[Exception] = IndexError) -> Iterator[Broken]:
    hook = Broken(token, error)
    handle = base.model.get_input_embeddings().register_forward_pre_hook(hook)
    try:
        yield hook
    finally:
        handle.remove()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    """A tiny base of its own in both types: steps of the second run as programs where there is a compiler."""
    found = load_base("random:tiny", template="gemma", dtype=request.param, device="cpu")
    for seed, name in enumerate(("left", "right")):
        lively(found, name, seed).fingerprint = f"content {name}"
    return found


def engine_of(base: BaseModel) -> Engine:
    """Like a server's; but in bfloat16 a server's products of few rows differ in their last bits."""
    return Engine(base, serving=base.dtype == torch.float32)


def requests(base: BaseModel, settings: SamplingSettings = SETTINGS) -> list[Request]:
    """Of one or two completions each, under three policies; in bfloat16, where products of adapters add up in other orders in
    other company, under the base."""
    policies = ("base", "left", "right") if base.dtype == torch.float32 else ("base",)
    return [Request(p, settings, policies[i % len(policies)], i, 1 + i % 2) for i, p in enumerate(PROMPTS)]


def alone(base: BaseModel, asked: list[Request]) -> list[tuple[int, ...]]:
    """The tokens of each completion, from an engine that answers nothing else."""
    return [rollout.completion_ids for request in asked for rollout in answers(Engine(base), [request])]


def told(events: list[Event], number: int) -> tuple[tuple[int, ...], Event]:
    """The tokens of a completion as they were told, and its last event."""
    own = [event for event in events if event.row == number]
    assert [event.over for event in own] == [False] * (len(own) - 1) + [True]
    return tuple(event.token for event in own if event.token is not None), own[-1]


def check(base: BaseModel, engine: Engine, bad: Request, error: type[Exception], before: int = 0) -> Broken:
    """Submit a bad request among good ones: it alone fails, after so many tokens. The others' tokens come once each."""
    good = requests(base)
    wanted = alone(base, good)
    with broken(base, error=error) as hook:
        numbers = [number for request in good[:4] for number in engine.submit(request)]
        failing = engine.submit(bad)
        numbers += [number for request in good[4:] for number in engine.submit(request)]
        events = run(engine)
    assert [told(events, number)[0] for number in numbers] == wanted
    for number in numbers:
        rollout = told(events, number)[1].rollout
        assert rollout is not None
        assert rollout.completion_ids == told(events, number)[0]
    for number in failing:
        tokens, last = told(events, number)
        assert isinstance(last.error, error)
        assert last.rollout is None
        assert len(tokens) == before
    assert not engine.live
    return hook


@pytest.mark.parametrize("crowded", [False, True])
def test_a_prompt_that_fails_ends_alone(base: BaseModel, crowded: bool, monkeypatch: pytest.MonkeyPatch):
    if crowded:
        monkeypatch.setitem(engine_module.ROWS, "cpu", 3)
    engine = engine_of(base)
    hook = check(base, engine, Request([1, 30, BAD, 40], SETTINGS, "left", completions=2), IndexError)
    # Of nine prompts that join in one step: all of them twice, and then the half with the bad one, down to itself.
    assert hook.failed <= 2 + math.ceil(math.log2(9))
    check(base, engine, Request([1, BAD], SETTINGS), MemoryError)  # the same engine goes on


def test_a_row_that_fails_while_it_decodes_ends_alone(base: BaseModel):
    """Its first token is the bad one: it was told, and the next step fails."""
    bad = Request([1, 30, 40], SETTINGS._replace(logit_bias=((BAD, 100.0),)))
    hook = check(base, engine_of(base), bad, RuntimeError, before=1)
    assert hook.failed <= 2 + math.ceil(math.log2(13))


def test_a_row_of_a_step_in_a_fixed_form_ends_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """As a GPU has them."""
    monkeypatch.setitem(engine_module.FIXED_FORMS, "cpu", True)
    check(base, engine_of(base), Request([1, 30, 40], SETTINGS._replace(logit_bias=((BAD, 100.0),))), IndexError, before=1)


def test_a_prompt_in_pieces_that_fails_half_way_ends_alone(base: BaseModel, pieces: None):
    """At its third piece of 24 tokens, beside prompts that are whole; what was kept of it harms nobody."""
    engine = engine_of(base)
    long = [1, *(7 + i % 150 for i in range(300))]
    bad = Request([*long[:60], BAD, *long[61:]], SETTINGS)
    check(base, engine, bad, ValueError)
    check(base, engine, bad, ValueError)
    assert [r.completion_ids for r in answers(engine, [Request(long, SETTINGS)])] == alone(base, [Request(long, SETTINGS)])


def test_scores_of_a_prompt_are_told_once_whatever_fails_beside_it(base: BaseModel, pieces: None):
    def scores(asked: list[Request]) -> list[Any]:
        engine = engine_of(base)
        for request in asked:
            engine.submit(request)
        return [event.prompt for event in run(engine) if event.prompt]

    request = Request([1, *range(20, 120)], SETTINGS, prompt_logprobs=True)
    (wanted,) = scores([request])
    bad = [Request([1, 30 + i, BAD], SETTINGS, prompt_logprobs=True) for i in range(3)]
    with broken(base):
        (found,) = scores([bad[0], request, *bad[1:]])
    assert [score.token for score in found] == [score.token for score in wanted] == list(range(20, 120))
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in wanted], abs=0.02)


def test_an_adapter_of_a_wrong_shape_ends_its_own_rows(base: BaseModel):
    """Put in after it was loaded. Good ones of the same layers answer, beside it and after it."""
    bad = lively(base, "bad", 7)
    layer, (a, b) = next(iter(bad.weights.items()))
    bad.weights[layer] = (torch.nn.Parameter(torch.zeros(len(a), a.shape[1] + 32)), b)
    engine, good = engine_of(base), requests(base)
    wanted = alone(base, good)
    try:
        for count in (2, 1, 0):
            failing = [engine.submit(Request([1, 50], SETTINGS, "bad"))[0] for _ in range(count)]
            numbers = [number for request in good for number in engine.submit(request)]
            events = run(engine)
            assert [told(events, number)[0] for number in numbers] == wanted
            assert all(told(events, number)[1].error is not None for number in failing)
    finally:
        base.adapters.remove("bad")


def test_a_text_that_cannot_be_decoded_ends_its_own_row(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """While stop strings are looked for, at the end of an answer, and where it is cancelled."""
    decode = base.chat.decode

    def strict(ids: list[int], **more: bool) -> str:
        if BAD in ids:
            raise UnicodeError("no text")
        return decode(ids, **more)

    monkeypatch.setattr(base.chat, "decode", strict)
    likes, good = SETTINGS._replace(logit_bias=((BAD, 100.0),)), requests(base, SETTINGS._replace(stop=("qq",)))
    wanted = alone(base, good)
    for settings, cancelled, before in ((likes._replace(stop=("zz",)), False, 0), (likes, False, 9), (likes, True, 2)):
        engine = engine_of(base)
        numbers = [number for request in good for number in engine.submit(request)]
        (failing,) = engine.submit(Request([1, 60], settings))
        events = [event for _ in range(2) for event in engine.step()]
        if cancelled:
            engine.cancel(failing)
        events += run(engine)
        assert [told(events, number)[0] for number in numbers] == wanted
        tokens, last = told(events, failing)
        assert isinstance(last.error, UnicodeError)
        assert len(tokens) == before


def test_offline_the_row_is_named(base: BaseModel):
    prompts = [*PROMPTS[:5], [1, 30, BAD], *PROMPTS[5:]]
    with broken(base), pytest.raises(IndexError, match="cannot embed this") as caught:
        generate(base, prompts, SETTINGS, "left", completions=2)
    assert caught.value.__notes__ == ['prompt 6 of 9, under "left", completion 1 of 2']


def test_a_failure_that_does_not_come_again_is_nobodys(base: BaseModel, caplog: pytest.LogCaptureFixture):
    """Too little memory for all prompts at once: halves have enough, and nothing is lost."""
    good = requests(base)
    wanted = alone(base, good)

    def scarce(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() > 64:
            raise MemoryError("no memory")

    handle = base.model.get_input_embeddings().register_forward_pre_hook(scarce)
    try:
        found = answers(engine_of(base), good)
    finally:
        handle.remove()
    assert [rollout.completion_ids for rollout in found] == wanted
    assert "MemoryError: no memory" in caplog.text


def test_rows_for_which_there_is_no_memory_do_not_join(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """The system gives no more than 32 places to a cache; those that are there, and shorter ones that come, are answered."""
    from posttrain.models import cache

    real = cache.zeros

    def scarce(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if shape[0] * cache.BLOCK > 1024:
            raise MemoryError("no memory for the cache")
        return real(shape, like)

    engine, good = engine_of(base), requests(base)
    wanted = alone(base, good)
    long = [Request([1, 40 + i], SETTINGS._replace(max_new_tokens=1500)) for i in range(2)]
    monkeypatch.setattr(cache, "zeros", scarce)
    numbers = [number for request in good[:4] for number in engine.submit(request)]
    events = engine.step()
    failing = [engine.submit(request)[0] for request in long]
    numbers += [number for request in good[4:] for number in engine.submit(request)]
    events += run(engine)
    assert [told(events, number)[0] for number in numbers] == wanted
    assert [str(told(events, number)[1].error) for number in failing] == ["no memory for the cache"] * 2


def test_a_base_that_cannot_answer_at_all_ends_everything(base: BaseModel):
    """As after an assertion on a GPU: no row is to blame, and after three steps in a row the engine is given up."""

    async def work() -> None:
        server = Server(base)
        with broken(base, None, RuntimeError):
            for _ in range(3):
                with pytest.raises(RuntimeError, match="cannot embed this"):
                    await anext(server.submit(Request([1, 2], SETTINGS, completions=3)))
            with pytest.raises(BusyError, match="the engine has stopped"):
                server.submit(Request([1]))
        await asyncio.to_thread(server.close)

    asyncio.run(asyncio.wait_for(work(), 60))


def test_bad_requests_never_stop_a_server(base: BaseModel, caplog: pytest.LogCaptureFixture):
    """One after the other and side by side, each with two completions; good ones beside them are whole."""
    settings = SETTINGS._replace(min_new_tokens=0)
    prompts = PROMPTS if base.dtype == torch.float32 else PROMPTS[:1]
    wanted = alone(base, [Request(prompt, settings) for prompt in prompts])

    async def good(server: Server, prompt: list[int]) -> tuple[int, ...]:
        return tuple([event.token async for event in server.submit(Request(prompt, settings)) if event.token is not None])

    async def bad(server: Server) -> None:
        answer = server.submit(Request([1, 40, BAD], settings, completions=2))
        with pytest.raises(IndexError, match="cannot embed this"):
            async for _ in answer:
                pass
        answer.cancel()  # of one that is over: a request that comes later is not meant

    async def work() -> None:
        async with serving(base) as server:
            with broken(base):
                for _ in range(5):
                    await bad(server)
                found = await asyncio.gather(*(good(server, p) for p in prompts), *(bad(server) for _ in PROMPTS))
            if base.dtype == torch.float32:
                assert list(found[: len(prompts)]) == wanted
            assert server.idle

    asyncio.run(asyncio.wait_for(work(), 60))
    assert "cannot embed this" in caplog.text

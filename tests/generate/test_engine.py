"""Generation: what a row says does not depend on its neighbours, and its log-probabilities are those of a full forward."""

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
import transformers
from engine_runs import full_logits, mixed, ragged_prompts

from posttrain.errors import AdapterError, ModelError
from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine, generate, stream
from posttrain.generate.requests import Request
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraSettings
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
    monkeypatch.setitem(engine_module.ROWS, "cpu", 7)
    monkeypatch.setitem(engine_module.PREFILL_TOKENS, "cpu", 100)


def tempered(logits_V: torch.Tensor, temperature: float, top_p: float, *, tie: float = 0.0) -> torch.Tensor:
    """The distribution that is sampled from, by its definition, in float64; `tie` is how near the last one a token is kept."""
    p_V = torch.softmax(logits_V.double() / (temperature or 1.0), -1)
    kept, mass = [], 0.0
    for token in sorted(range(len(p_V)), key=lambda t: -float(p_V[t])):
        if mass >= top_p and p_V[token] < p_V[kept[-1]] * (1 - tie):
            break
        kept.append(token)
        mass += float(p_V[token])
    cut_V = torch.zeros_like(p_V)
    cut_V[kept] = p_V[kept]
    return cut_V / cut_V.sum()


@pytest.mark.parametrize("adapter", ["base", ADAPTER])
def test_greedy_answers_of_64_ragged_prompts_are_those_of_each_alone(base: BaseModel, crowded: None, adapter: str):
    prompts = ragged_prompts()
    settings = SamplingSettings(max_new_tokens=10)
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
            logits_V, nucleus = logits_TV[start + index - 1], top_p if temperature else 1.0
            # Two tokens at the edge of the nucleus may be as likely to the last bit of float32: then both are in it.
            both = [float(tempered(logits_V, temperature, nucleus, tie=tie)[token]) for tie in (0.0, 1e-6)]
            worst = max(worst, min(abs(logprob - math.log(p)) for p in both if p > 0))
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
        streamed = list(stream(Engine(base), before.prompt_ids, SamplingSettings(20), "base"))
        assert streamed == list(after.completion_ids[:-1] if stops else after.completion_ids)


def test_progress_counts_every_row_and_token_once(base: BaseModel, crowded: None):
    told: list[tuple[int, int]] = []
    rollouts = generate(base, ragged_prompts(20), SamplingSettings(9), "base", advance=lambda r, t: told.append((r, t)))
    assert sum(rows for rows, _ in told) == 20
    assert sum(tokens for _, tokens in told) == sum(len(r.completion_ids) for r in rollouts)


def test_no_prompt_and_no_token(base: BaseModel):
    assert generate(base, [], SamplingSettings(), "base") == []
    assert generate(base, [[1, 2]], SamplingSettings(0), "base") == [Rollout((1, 2), (), (), "", False, "base")]
    assert list(stream(Engine(base), [1, 2], SamplingSettings(0), "base")) == []
    assert len(generate(base, [[1, 2]], SamplingSettings(1), "base")[0].completion_ids) == 1


def test_one_engine_streams_one_answer_after_another_also_after_one_that_was_left(base: BaseModel):
    engine = Engine(base)
    prompts = ragged_prompts(3)
    for prompt in prompts:
        left = stream(engine, prompt, SamplingSettings(20), "base")
        next(left)
        next(left)
        left.close()
        (whole,) = generate(base, [prompt], SamplingSettings(20), "base")
        assert list(stream(engine, prompt, SamplingSettings(20), "base")) == list(whole.completion_ids)
        assert not engine.live


def test_a_prompt_may_fill_the_context_and_not_more(base: BaseModel):
    room = base.context
    assert len(generate(base, [[7] * (room - 1)], SamplingSettings(1), "base")[0].completion_ids) == 1
    with pytest.raises(ModelError, match=f"a prompt of {room} tokens and 1 new ones · together at most {room}"):
        generate(base, [[7], [7] * room], SamplingSettings(1), "base")


def test_an_empty_prompt_is_refused(base: BaseModel):
    with pytest.raises(ModelError, match="an empty prompt"):
        generate(base, [[1], []], SamplingSettings(), "base")


def test_what_cannot_be_asked(base: BaseModel):
    engine = Engine(base)
    with pytest.raises(ModelError, match="generation · completions = 0 · 1 or more"):
        engine.submit(Request([1], completions=0))
    with pytest.raises(ModelError, match="token ids outside the vocabulary · 0 to 262"):
        engine.submit(Request([1, 263]))
    with pytest.raises(ModelError, match=r"token id 263 in stop_ids or logit_bias · 0 to 262"):
        engine.submit(Request([1], SamplingSettings(logit_bias=((263, 1.0),))))
    with pytest.raises(AdapterError, match='adapter "nobody" · is not loaded'):
        engine.submit(Request([1], adapter="nobody"))
    assert not engine.live


def test_completions_of_a_shared_prompt_are_those_of_the_prompt_repeated(base: BaseModel, crowded: None):
    prompts = ragged_prompts(6)
    settings = SamplingSettings(12, 1.0, seed=3)
    shared = generate(base, prompts, settings, ADAPTER, completions=3)
    repeated = generate(base, [p for p in prompts for _ in range(3)], settings, ADAPTER)
    assert [r.completion_ids for r in shared] == [r.completion_ids for r in repeated]
    assert worst(r.logprobs for r in shared) == pytest.approx(worst(r.logprobs for r in repeated), abs=1e-4)


def worst(logprobs: Iterable[tuple[float, ...]]) -> float:
    return min(min(row) for row in logprobs)


def test_a_shared_prompt_is_computed_once(base: BaseModel):
    computed = []
    hook = base.model.base_model.register_forward_pre_hook(
        lambda _, __, given: computed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    generate(base, [[1] * 50], SamplingSettings(3, 1.0), "base", completions=8)
    hook.remove()
    assert computed == [64, 8, 8]  # 50 rounded up to a multiple of 32, then 8 rows twice


def test_what_all_prompts_begin_with_is_computed_once_and_changes_nothing(base: BaseModel):
    prompts = [[*range(30, 60), *p[:9]] for p in ragged_prompts(10)] + [[*range(30, 60)]]
    prompts, settings = [*prompts, *prompts], SamplingSettings(8, 1.0, seed=6)
    adapters = ["base"] * 11 + [ADAPTER] * 11
    computed = []
    hook = base.model.base_model.register_forward_pre_hook(
        lambda _, __, given: computed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    together = generate(base, prompts, settings, adapters, completions=2)
    hook.remove()
    own = sum(len(p) - 29 for p in prompts)  # the shortest prompt keeps one token of its own
    assert computed[0] == -(-(2 * 29 + own) // 32) * 32
    for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        engine = Engine(base)
        engine.submit(Request(prompt, settings, adapter, 2 * index, 2))
        ends = {}
        while engine.live:
            ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        for g in range(2):
            assert ends[g].completion_ids == together[2 * index + g].completion_ids
            assert ends[g].logprobs == pytest.approx(together[2 * index + g].logprobs, abs=1e-5)


def test_prompts_that_begin_alike_are_computed_policy_by_policy(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.PREFILL_TOKENS, "cpu", 6 * 44)
    prompts, names = [[*range(30, 70), *[100 + i] * 4] for i in range(12)], ["base", ADAPTER] * 6
    computed = []
    hook = base.model.base_model.register_forward_pre_hook(
        lambda _, __, given: computed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    together = generate(base, prompts, SamplingSettings(1), names)
    hook.remove()
    assert computed == [40 + 6 * 4] * 2
    for prompt, name, rollout in zip(prompts, names, together, strict=True):
        assert generate(base, [prompt], SamplingSettings(1), name)[0].completion_ids == rollout.completion_ids


def test_more_completions_than_rows(base: BaseModel, crowded: None):
    settings = SamplingSettings(5, 1.0, seed=2)
    many = generate(base, [[1, 40, 41]], settings, "base", completions=17)
    assert [r.completion_ids for r in many] == [r.completion_ids for r in generate(base, [[1, 40, 41]] * 17, settings, "base")]
    assert len({r.completion_ids for r in many}) > 10


def test_adapters_and_settings_of_a_mixed_batch_are_each_alone(base: BaseModel, crowded: None):
    """Ranks, layers and trained rows differ between the adapters."""
    base.adapters.create("narrow", LoraSettings(2, 2.0, 0.0, "attention", "rslora"), seed=5)
    base.adapters.create("rows", LoraSettings(3, 6.0, 0.0, "mlp", "standard"), seed=6, token_ids=(5, 60, 61))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in ("narrow", "rows"):
            for _, b in base.adapters.get(name).weights.values():
                b.normal_(std=0.3, generator=generator)
        rows = base.adapters.get("rows").tokens
        assert rows is not None
        rows.rows.normal_(std=0.4, generator=generator)
    names = ["base", ADAPTER, "narrow", "rows"]
    prompts = [[*p, 60, 61] for p in ragged_prompts(36)]
    own, adapters = [mixed(i) for i in range(36)], [names[i % 4] for i in range(36)]
    together = generate(base, prompts, own, adapters, completions=2)
    for index, (prompt, settings, adapter) in enumerate(zip(prompts, own, adapters, strict=True)):
        engine = Engine(base)
        for offset in range(2):
            engine.submit(Request(prompt, settings, adapter, 2 * index + offset))
        alone = {}
        while engine.live:
            alone |= {e.row: e.rollout for e in engine.step() if e.rollout is not None}
        for offset in range(2):
            here, there = alone[offset], together[2 * index + offset]
            assert (here.completion_ids, here.text, here.finish) == (there.completion_ids, there.text, there.finish)
            assert here.logprobs == pytest.approx(there.logprobs, abs=1e-4)
        full = full_logits(base, [*prompt, *there.completion_ids], adapter)[len(prompt) - 1 : -1]
        wanted = torch.log_softmax(full, -1).gather(1, torch.tensor(there.completion_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(there.model_logprobs), wanted, atol=1e-5)
    assert {r.finish for r in together} >= {"length", "stop string", "stop id"}
    for name in ("narrow", "rows"):
        base.adapters.remove(name)


def test_an_adapter_that_was_trained_in_the_meantime_is_read_again(base: BaseModel):
    engine = Engine(base)

    def answer() -> tuple[float, ...]:
        engine.submit(Request([1, 50, 51], SamplingSettings(4, 0.0), ADAPTER))
        events = [event for _ in range(4) for event in engine.step()]
        return tuple(event.logprob for event in events)

    before = answer()
    assert answer() == before
    _, b = next(iter(base.adapters.get(ADAPTER).weights.values()))
    with torch.no_grad():
        b.mul_(1.5)
        changed = answer()
        b.div_(1.5)
    assert changed != before


def test_a_cancelled_row_leaves_and_the_others_do_not_notice(base: BaseModel, crowded: None):
    prompts, settings = ragged_prompts(12), SamplingSettings(10, 1.0, seed=8)
    wanted = generate(base, prompts, settings, "base")
    engine = Engine(base)
    numbers = [engine.submit(Request(p, settings, "base", i))[0] for i, p in enumerate(prompts)]
    ends, steps = {}, 0
    while engine.live:
        if steps == 3:
            for gone in (numbers[2], numbers[11], numbers[11], 1000):  # in flight, waiting, twice, never there
                engine.cancel(gone)
        ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        steps += 1
    assert len(ends) == 12
    assert (ends[2].finish, ends[2].completion_ids) == ("cancelled", wanted[2].completion_ids[:3])
    assert (ends[11].finish, ends[11].completion_ids) == ("cancelled", ())
    assert [ends[i].completion_ids for i in range(12) if i not in (2, 11)] == [
        r.completion_ids for i, r in enumerate(wanted) if i not in (2, 11)
    ]


def test_rows_wait_while_the_cache_would_be_too_large(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    prompts, settings = ragged_prompts(9), SamplingSettings(6, 1.0, seed=1)
    wanted = generate(base, prompts, settings, "base")
    monkeypatch.setitem(engine_module.CACHE_BYTES, "cpu", 512 * 140)  # 2 layers, 2 heads of 16, float32: 512 bytes a token
    engine = Engine(base)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(prompt, settings, "base", index))
    widths, ends = [], {}
    while engine.live:
        events = engine.step()
        widths.append(sum(event.token is not None for event in events))
        ends |= {event.row: event.rollout for event in events if event.rollout is not None}
    assert max(widths) == 2  # two shelves of 64 tokens
    assert [ends[i].completion_ids for i in range(9)] == [r.completion_ids for r in wanted]


def test_rows_join_in_the_step_after_a_place_is_free(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.ROWS, "cpu", 2)
    engine = Engine(base)
    for length in (2, 5, 3, 1):
        engine.submit(Request([1, 9], SamplingSettings(length)))
    steps = []
    while engine.live:
        steps.append([event.row for event in engine.step()])
    assert [sorted(rows) for rows in steps] == [[0, 1], [0, 1], [1, 2], [1, 2], [1, 2], [3]]

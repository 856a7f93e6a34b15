"""Decoding steps recorded and run as programs, against the same steps run as they stand."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bases import CONFIGS, make_base
from posttrain.generate import batch
from posttrain.generate.engine import Engine, Request, SamplingSettings, generate
from posttrain.kernels.cpu import bindings, replay
from posttrain.kernels.cpu.build import library
from posttrain.kernels.cpu.linear import packs
from posttrain.kernels.cpu.record import NotRecordedError, Recorder
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.models.segments import Segments, Span
from posttrain.records import Rollout

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here, or POSTTRAIN_COMPILE=0: nothing is recorded")
# Where there are no tiles, engines that serve have compiled products for one or two rows, and others none.
TILED = pytest.mark.skipif(not bindings.tiles(), reason="without matrix tiles (AMX) no step of many rows is recorded")
# Whether a server's steps of one or two rows are recorded: their products are compiled only beside packed ones.
FEW = bindings.tiles() or packs(64, torch.bfloat16, torch.device("cpu"))
RECORDED = pytest.mark.skipif(not FEW, reason="this processor has no bfloat16 products: nothing is recorded")
# Whose attention or gates are computed by plain operations.
PLAIN = {"gemma2, soft-capped", "phi3, sliding", "phi3, half turned"}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def ready(base: BaseModel, name: str, rank: int, targets: str | tuple[str, ...] = "all", tokens: tuple[int, ...] = ()) -> None:
    adapter = base.adapters.create(name, LoraSettings(rank, 2.0 * rank, 0.0, targets, "standard"), seed=rank, token_ids=tokens)
    randomise(adapter, rank)


def randomise(adapter: LoraAdapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.3, generator=generator)
        if adapter.tokens is not None:
            adapter.tokens.rows.normal_(std=0.2, generator=generator)


def prompts(count: int) -> list[list[int]]:
    """Of other lengths each, so that rows stand at other places of the cache."""
    return [[1 + (7 * i + 3 * k) % 250 for k in range(3 + (5 * i) % 40)] for i in range(count)]


def answers(base: BaseModel, count: int, names: list[str], *, serving: bool, new: int = 24) -> list[Rollout]:
    """Of an engine of its own. Rows end one after the other."""
    made = Engine(base, serving=serving)
    for i, prompt in enumerate(prompts(count)):
        settings = SamplingSettings(temperature=1.0, max_new_tokens=new - i % 7, min_new_tokens=new - i % 7, seed=3)
        made.submit(Request(prompt, settings, names[i % len(names)], first=i))
    found: dict[int, Rollout] = {}
    while made.live:
        found |= {event.row: event.rollout for event in made.step() if event.rollout is not None}
    return [found[row] for row in sorted(found)]


def both_ways(base: BaseModel, count: int, names: list[str], *, serving: bool) -> int:
    """The same rollouts with programs and without, to the bit; returns how many steps ran as programs."""
    base.programs.recording, before = False, base.programs.replayed
    wanted = answers(base, count, names, serving=serving)
    assert base.programs.replayed == before
    base.programs.recording = True
    for _ in range(2):
        for found, own in zip(answers(base, count, names, serving=serving), wanted, strict=True):
            assert found.completion_ids == own.completion_ids
            assert found.model_logprobs == own.model_logprobs
    return base.programs.replayed - before


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("serving", [False, True])
def test_programs_give_the_bits_of_the_steps_that_they_were_recorded_from(
    name: str, serving: bool, tmp_path: Path, threads: int
) -> None:
    base = make_base(name, tmp_path, "bfloat16")
    ready(base, "a", 16)
    ready(base, "b", 5, "mlp", (9, 10))
    for count, names in ((1, ["base"]), (1, ["a"]), (2, ["base"]), (19, ["base", "a", "b"])):
        replayed = both_ways(base, count, names, serving=serving)
        if name not in PLAIN and (bindings.tiles() or (FEW and serving and count < 3)):
            assert replayed > 10, f"{count} rows of {names}"


@TILED
def test_programs_outlive_engines_and_serve_other_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine has other tensors for its cache and its adapters, at other addresses."""
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    for name, rank in (("a", 16), ("b", 12), ("c", 9)):
        ready(base, name, rank)
    both_ways(base, 20, ["a", "b"], serving=False)
    made: list[Recorder] = []
    monkeypatch.setattr(replay, "Recorder", lambda *inputs: made.append(Recorder(*inputs)) or made[-1])
    assert both_ways(base, 20, ["c", "b"], serving=False) > 30
    randomise(base.adapters.get("c"), 77)
    assert both_ways(base, 20, ["b", "c"], serving=False) > 30
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(1.25)
    both_ways(base, 20, ["b", "c"], serving=False)
    assert not made


@TILED
def test_rows_that_join_and_leave_on_shelves_of_two_sizes(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Shelves grow, get gaps and are given up while programs read them."""
    monkeypatch.setitem(batch.SMALLEST_SHELF, "cpu", 64)
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    ready(base, "a", 4)
    found: dict[bool, list[tuple[int, tuple[int, ...], tuple[float, ...]]]] = {}
    for base.programs.recording in (False, True):
        made, own = Engine(base), found.setdefault(base.programs.recording, [])
        for step in range(60):
            if step < 40:
                settings = SamplingSettings(max_new_tokens=9 + 70 * (step % 2), seed=1)
                (number,) = made.submit(Request(prompts(40)[step], settings, ("a", "base")[step % 2], first=step))
                if step % 5 == 4:
                    made.cancel(number - 3)
            for event in made.step():
                if event.rollout is not None:
                    own.append((event.row, tuple(event.rollout.completion_ids), tuple(event.rollout.model_logprobs)))
    assert found[True] == found[False]
    assert base.programs.replayed > 10


class Twice(nn.Module):
    """A layer that does to its input what no program does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """2 f(x)."""
        found: Tensor = self.inner(x) * 2.0
        return found


def test_what_cannot_be_recorded_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    layer = base.model.model.layers[1]
    layer.mlp = Twice(layer.mlp)
    tried: list[Recorder] = []
    monkeypatch.setattr(replay, "Recorder", lambda *inputs: tried.append(Recorder(*inputs)) or tried[-1])
    for count in (2, 7, 14, 28, 56):
        assert both_ways(base, count, ["base"], serving=True) == 0
    # Then it is given up.
    assert 1 <= len(tried) <= replay.FAILURES


@TILED
@pytest.mark.parametrize("records", [True, False])
def test_prompts_have_a_forward_of_their_own_only_beside_programs(records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of rows that decode and a prompt that joins: two forwards, but one where no step can be recorded."""
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    if not records:
        base.programs._failed |= set(range(replay.FAILURES))
    made, forwards, own = Engine(base), [], base.programs.forward
    monkeypatch.setattr(base.programs, "forward", lambda *args: forwards.append(args) or own(*args))
    for prompt in prompts(2):
        made.submit(Request(prompt, SamplingSettings(9, min_new_tokens=9)))
        made.step()
    assert len(forwards) == (3 if records else 2)


@RECORDED
def test_programs_that_were_recorded_still_run_when_no_other_is_tried_any_more() -> None:
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    assert both_ways(base, 1, ["base"], serving=True) > 10
    base.programs._failed |= set(range(replay.FAILURES))
    assert both_ways(base, 1, ["base"], serving=True) > 10
    recorded = sum(step is not None for step in base.programs._steps.values())
    both_ways(base, 2, ["base"], serving=True)
    assert sum(step is not None for step in base.programs._steps.values()) == recorded


def test_a_module_that_reads_what_no_step_brings_is_refused() -> None:
    module, recorder = nn.Embedding(8, 4), Recorder([torch.arange(3)])
    with torch.inference_mode(), recorder.watching([module]):
        found = module(torch.arange(3) + 1)
    with pytest.raises(NotRecordedError, match="Embedding reads a tensor that is not an input of the step"):
        recorder.program(found)


def test_float32_is_not_recorded() -> None:
    base = load_base("random:tiny", template="plain", dtype="float32")
    assert both_ways(base, 2, ["base"], serving=True) == 0


def test_numbers_that_are_not_finite_are_the_forwards_too() -> None:
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    both_ways(base, 1, ["base"], serving=True)
    with torch.no_grad():
        base.model.model.layers[0].mlp.down_proj.weight.mul_(float("inf"))
    (found,) = answers(base, 1, ["base"], serving=True)
    assert found.finish == "not finite"


@RECORDED
def test_another_thread_does_not_wait_for_a_step_and_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one thread in the middle of another's."""
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    wanted = [answers(base, 1, ["base"], serving=True) for _ in range(3)][-1]
    beside: list[Any] = []
    original = replay._RecordedStep.run

    def run(step: Any, *args: Any) -> Tensor:
        if not beside:
            beside.append(None)
            other = threading.Thread(target=lambda: beside.append(answers(base, 1, ["base"], serving=True)))
            other.start()
            other.join(60)
        return original(step, *args)

    monkeypatch.setattr(replay._RecordedStep, "run", run)
    assert answers(base, 1, ["base"], serving=True)[0].model_logprobs == wanted[0].model_logprobs
    assert beside[1][0].model_logprobs == wanted[0].model_logprobs


@RECORDED
def test_the_longest_unused_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 1)
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    for count in (1, 2, 1):
        assert both_ways(base, count, ["base"], serving=True) > 10
        assert len(base.programs._steps) == 1


@TILED
def test_training_on_what_was_sampled_finds_its_own_numbers() -> None:
    """The log-probabilities of a rollout are those that the trainer gives its tokens, to the bit."""
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    ready(base, "a", 16)
    settings = SamplingSettings(temperature=1.0, max_new_tokens=30)
    found = [generate(base, prompts(17), settings, "a") for _ in range(2)][1]
    assert base.programs.replayed > 20
    for prompt, rollout in zip(prompts(17), found, strict=True):
        ids = torch.tensor([*prompt, *rollout.completion_ids])
        with torch.no_grad():
            hidden = base.hidden(ids, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), "a")
            trainer = base.logprobs(hidden[len(prompt) - 1 : -1], ids[len(prompt) :], "a").tolist()
        assert max(abs(a - b) for a, b in zip(trainer, rollout.model_logprobs, strict=True)) < 1e-5

"""Packed-segment attention against dense references, transformers' own models, and itself in other packings."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from logits_of import our_logits, plain_logits
from packed_examples import LONG, PACKINGS, dense, random_heads, token_rows
from torch import Tensor

from bases import ADDITIONS, ALL, CONFIGS, eager, make_base
from posttrain.data.packing import Segment, pack, row_segments, tree_segments
from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine, SamplingSettings, generate
from posttrain.generate.requests import Request
from posttrain.kernels import reference
from posttrain.kernels.cuda.varlen import gather_keys, varlen_table
from posttrain.models.attention import segment_attention
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import batch_logprobs, to_device
from posttrain.models.cache import Extras
from posttrain.models.segments import Segments, Span

SPARE = 3


def attend(q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], window: int, softcap: float | None) -> Tensor:
    out, _ = segment_attention(
        torch.nn.Identity(), q[None], k[None], v[None], None, scaling=0.3, segments=Segments(spans),
        sliding_window=window or None, softcap=softcap,
    )  # fmt: skip
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_values_and_gradients_match_a_dense_float64_softmax(
    packing: str, kv_heads: int, window: int, softcap: float | None
) -> None:
    spans = PACKINGS[packing]
    used = 24
    heads = [x.requires_grad_() for x in random_heads(4, kv_heads, used + SPARE, 8)]
    ours = attend(*heads, spans, window, softcap)
    wanted = dense(*heads, 0.3, spans, window, softcap)
    assert torch.allclose(ours[:, :used].double(), wanted[:, :used], atol=1e-5)
    slope = torch.randn(ours[:, :used].shape, generator=torch.Generator().manual_seed(5))
    ours_grad = torch.autograd.grad((ours[:, :used] * slope).sum(), heads)
    dense_grad = torch.autograd.grad((wanted[:, :used] * slope).sum(), heads)
    for found, right in zip(ours_grad, dense_grad, strict=True):
        assert torch.allclose(found, right, atol=1e-5)
        assert (found[:, used:] == 0).all()  # filler takes no part


@pytest.mark.parametrize("window", [0, 1, 60, 128, 200, 400])
def test_long_spans_are_the_same_in_blocks(window: int) -> None:
    heads = [x.requires_grad_() for x in random_heads(2, 1, 700, 8)]
    ours, wanted = attend(*heads, LONG, window, None), dense(*heads, 0.3, LONG, window, None)
    assert torch.allclose(ours.double(), wanted, atol=1e-5)
    slope = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((ours * slope).sum(), heads)
    right = torch.autograd.grad((wanted * slope).sum(), heads)
    for a, b in zip(found, right, strict=True):
        assert torch.allclose(a, b, atol=3e-5)


def test_bfloat16_stays_within_one_percent() -> None:
    near = [x.requires_grad_() for x in random_heads(4, 2, 700, 16, torch.bfloat16)]
    ours, wanted = attend(*near, LONG, 200, None), dense(*near, 0.3, LONG, 200, None)
    slope = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert (ours.double() - wanted).norm() / wanted.norm() < 0.01
    found = torch.autograd.grad((ours * slope).sum(), near)
    right = torch.autograd.grad((wanted * slope.double()).sum(), near)
    for a, b in zip(found, right, strict=True):
        assert (a.double() - b.double()).norm() / b.double().norm() < 0.01


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_table_of_the_gpu_kernel_lists_what_each_segment_sees(packing: str) -> None:
    """The kernel's meaning, played through on the CPU: a sequence's last query sees all keys, the one before it one less."""
    spans, used = PACKINGS[packing], 24
    q, k, v = (x.requires_grad_() for x in random_heads(4, 2, used + SPARE, 8))
    table = varlen_table(spans, used + SPARE, q.device)
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    if table.key_S is not None:
        keys, values = gather_keys(keys, table.key_S), gather_keys(values, table.key_S)
    parts = []
    for n in range(len(table.query_N) - 1):
        (first_q, last_q), (first_k, last_k) = table.query_N[n : n + 2].tolist(), table.key_N[n : n + 2].tolist()
        assert last_q - first_q <= table.longest_query
        assert last_k - first_k <= table.longest_key
        span = Span(last_k - first_k - (last_q - first_q), last_q - first_q, ((0, last_k - first_k - (last_q - first_q)),))
        rows, seen = q[:, first_q:last_q], (x[first_k:last_k].transpose(0, 1) for x in (keys, values))
        padded = torch.cat([rows.new_zeros(4, span.start, 8), rows], 1)
        spans_n = (Span(0, span.start), span) if span.start else (Span(0, span.length),)
        parts.append(dense(padded, *seen, 0.3, spans_n, 0, None)[:, span.start :])
    found, wanted = torch.cat(parts, 1)[:, :used], dense(q, k, v, 0.3, spans, 0, None)[:, :used]
    assert torch.allclose(found, wanted)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * slope).sum(), (q, k, v)), torch.autograd.grad((wanted * slope).sum(), (q, k, v))
    ):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("argument", ["position_bias", "indices", "something_new"])
def test_an_argument_that_is_not_known_is_refused(argument: str) -> None:
    q, k, v = (x[None] for x in random_heads(2, 1, 5, 8))
    for harmless in ({argument: None}, {"position_ids": torch.arange(5)}):
        segment_attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=Segments((Span(0, 5),)), **harmless)
    with pytest.raises(NotImplementedError, match=argument):
        segment_attention(
            torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=Segments((Span(0, 5),)), **{argument: torch.zeros(1)}
        )


def test_a_mask_of_the_models_own_and_missing_segments_are_refused() -> None:
    q, k, v = (x[None] for x in random_heads(2, 1, 5, 8))
    with pytest.raises(NotImplementedError, match="attention_mask"):
        segment_attention(torch.nn.Identity(), q, k, v, torch.zeros(1), scaling=0.3, segments=Segments((Span(0, 5),)))
    with pytest.raises(NotImplementedError, match="is_causal"):
        segment_attention(torch.nn.Identity(), q, k, v, None, scaling=0.3, segments=Segments((Span(0, 5),)), is_causal=False)
    with pytest.raises(NotImplementedError, match="keyword arguments"):
        segment_attention(torch.nn.Identity(), q, k, v, None, scaling=0.3)


def test_the_plain_reference_agrees_with_the_fused_function() -> None:
    for spans in PACKINGS.values():
        q, k, v = random_heads(4, 2, 24, 8)
        plain = reference.segment_attention(q, k, v, Segments(spans), scale=0.3, extra=Extras(4))
        assert torch.allclose(plain, attend(q, k, v, spans, 4, None), atol=1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Callable[[str], BaseModel]:
    """One tiny base of each architecture, made when first asked for."""
    made: dict[str, BaseModel] = {}

    def base_of(name: str) -> BaseModel:
        if name not in made:
            made[name] = make_base(name, Path(tmp_path_factory.mktemp("base")))
        return made[name]

    return base_of


def row_logprobs(base: BaseModel, segments: list[Segment], rows: int, policy: str = "base") -> list[Tensor]:
    """log p of the targets of each row of one packed batch."""
    batch = to_device(pack(segments, rows), base.device)
    with torch.no_grad():
        found = batch_logprobs(base, batch, policy)
    return [found[batch.row_N == row] for row in range(rows)]


def alone(base: BaseModel, ids: list[int]) -> Tensor:
    return row_logprobs(base, row_segments(ids, [True] * len(ids), 0), 1)[0]


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers_own_attention(bases: Callable, name: str) -> None:
    base = bases(name)
    reference = eager(base)
    for ids in token_rows(3, low=20, high=40):
        ours = our_logits(base, ids, "base")
        assert torch.allclose(ours, plain_logits(reference, ids), atol=2e-5)


@pytest.mark.parametrize("name", ADDITIONS)
def test_gradients_in_embedding_and_head_are_those_of_transformers(bases: Callable, name: str) -> None:
    base, reference = bases(name), eager(bases(name))
    ids = token_rows(1, low=30, high=31)[0]
    other = token_rows(1, low=9, high=10, seed=5)[0]
    segments = row_segments(other, [False] * 9, 0) + row_segments(ids, [False] + [True] * 29, 1)
    gradients = []
    for model in (base.model, reference):
        head = model.get_output_embeddings()
        trained = [model.get_input_embeddings().weight, *(p for p in (head.weight, head.bias) if p is not None)]
        for parameter in trained:
            parameter.requires_grad_(True)
        if model is reference:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])
        else:
            logprobs = batch_logprobs(base, to_device(pack(segments, 2), base.device), "base")
        gradients.append(torch.autograd.grad(logprobs.mean(), trained))
        for parameter in trained:
            parameter.requires_grad_(False)
    for ours, own in zip(*gradients, strict=True):
        assert torch.allclose(ours, own, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_each_row_alone(bases: Callable, name: str) -> None:
    base = bases(name)
    rows = token_rows(5, low=2, high=40)
    segments = [s for i, ids in enumerate(rows) for s in row_segments(ids, [True] * len(ids), i)]
    for packed, ids in zip(row_logprobs(base, segments, 5), rows, strict=True):
        assert torch.allclose(packed, alone(base, ids), atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_with_two_completions_equals_two_full_rows(bases: Callable, name: str) -> None:
    base = bases(name)
    prompt, chosen, rejected, other, one = token_rows(5, low=10, high=25, seed=3)
    tree = tree_segments(prompt, [chosen, rejected], first_row=0, index=0)
    tree += tree_segments(other, [one], first_row=2, index=len(tree))
    found = row_logprobs(base, tree, 3)
    for packed, (head, tail) in zip(found, [(prompt, chosen), (prompt, rejected), (other, one)], strict=True):
        assert torch.allclose(packed, alone(base, head + tail)[-len(tail) :], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3, sliding"])
def test_sharing_a_prompt_changes_no_gradient(bases: Callable, lively: Callable, name: str) -> None:
    base = bases(name)
    adapter = lively(base, "a")
    adapter.requires_grad_(True)
    prompt, chosen, rejected = token_rows(3, low=10, high=25, seed=4)
    tree = tree_segments(prompt, [chosen, rejected], first_row=0, index=0)
    rows = [
        s for i, tail in enumerate((chosen, rejected))
        for s in row_segments(prompt + tail, [False] * len(prompt) + [True] * len(tail), i)
    ]  # fmt: skip
    gradients = []
    for segments in (tree, rows):
        loss = batch_logprobs(base, to_device(pack(segments, 2), base.device), "a").mean()
        gradients.append(torch.autograd.grad(loss, list(adapter.parameters().values())))
    for shared, apart in zip(*gradients, strict=True):
        assert torch.allclose(shared, apart, atol=1e-6)
    base.adapters.remove("a")


@pytest.mark.parametrize("filler", [0, 5, 200])
def test_filler_tokens_change_nothing(bases: Callable, filler: int) -> None:
    base = bases("gemma3, sliding")
    ids = token_rows(1, low=30, high=31)[0]
    packed = pack(row_segments(ids, [True] * 30, 0), 1, filler=filler)
    assert len(packed.ids) == 64
    with torch.no_grad():
        assert torch.equal(batch_logprobs(base, to_device(packed, base.device), "base"), alone(base, ids))


@pytest.mark.parametrize("name", ALL)
def test_logprobs_while_decoding_are_those_of_a_full_forward(bases: Callable, name: str) -> None:
    base = bases(name)
    prompts = token_rows(6, low=3, high=20, seed=6)
    for settings in (SamplingSettings(24, 1.0, seed=1), SamplingSettings(24, 0.0)):
        for rollout in generate(base, prompts, settings, "base"):
            full = alone(base, [*rollout.prompt_ids, *rollout.completion_ids])[-len(rollout.completion_ids) :]
            assert torch.allclose(torch.tensor(rollout.logprobs), full, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_in_pieces_and_one_found_again_agree_with_a_full_forward(
    bases: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 40 tokens of prompts, and what was computed of them the first time used the second time."""
    monkeypatch.setitem(engine_module.SERVED_PREFILL_TOKENS, "cpu", 40)
    base = bases(name)
    engine = Engine(base, serving=True)
    for turn in range(2):
        for prompt in token_rows(4, low=70, high=150, seed=9):
            engine.submit(Request(prompt, SamplingSettings(12, 1.0, seed=turn), completions=2))
        rollouts = []
        while engine.live:
            rollouts += [event.rollout for event in engine.step() if event.rollout is not None]
        assert len(rollouts) == 8
        for rollout in rollouts:
            full = alone(base, [*rollout.prompt_ids, *rollout.completion_ids])[-len(rollout.completion_ids) :]
            assert torch.allclose(torch.tensor(rollout.logprobs), full, atol=1e-5)
    assert engine.prefixes.hits >= 8 * 64


def test_a_greedy_batch_of_64_ragged_prompts_equals_64_single_answers(bases: Callable) -> None:
    base = bases("gemma3, sliding")
    prompts = token_rows(64, low=1, high=30, seed=7)
    settings = SamplingSettings(12, 0.0)
    together = generate(base, prompts, settings, "base")
    different = [
        r
        for r, p in zip(together, prompts, strict=True)
        if generate(base, [p], settings, "base")[0].completion_ids != r.completion_ids
    ]
    assert len(different) == 0, f"{len(different)} of 64 differ"

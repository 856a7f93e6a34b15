"""The compiled functions against float64 references, row by row alone, and the engine with and without them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posttrain.generate.engine import SamplingSettings, generate
from posttrain.kernels.cpu import bindings
from posttrain.kernels.cpu.attention import CpuSegmentAttention
from posttrain.kernels.cpu.build import library
from posttrain.kernels.segments import gather, invisible
from posttrain.models.base_model import load_base
from posttrain.models.lora import LoraSettings
from posttrain.models.segments import Segments, Span

if library() is None:
    pytest.skip("no C compiler here, or POSTTRAIN_COMPILE=0: plain operations decode", allow_module_level=True)

# Half of the last place of a bfloat16, and what float32 sums add to it.
CLOSE = {"rtol": 2**-8 * 1.05, "atol": 1e-6}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (576, 1536), (1000, 33)])
def test_products_of_few_rows(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = numbers(1, rows, inputs), numbers(outputs, inputs, seed=1), numbers(outputs, seed=2)
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(bindings.multiply(x, weight, bias).double(), wanted, rtol=2**-8 * 1.05, atol=1e-4)
    assert torch.equal(bindings.multiply(x, weight, None)[0, :1], bindings.multiply(x[0, :1], weight, None))


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (1, 200, 576), (5, 7)])
def test_norms(shape: tuple[int, ...]) -> None:
    x, weight = numbers(*shape), torch.rand(shape[-1]) + 0.5
    wide = x.double()
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(bindings.rms_norm(x, weight, 1e-5).double(), wanted, **CLOSE)


def test_rotations_are_the_librarys_to_the_bit() -> None:
    tokens, heads, width = 40, 3, 64
    lying = numbers(tokens, heads, width)
    x, angles = lying.transpose(0, 1), torch.rand(tokens, width // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)  # heads lie apart, token by token
    assert torch.equal(bindings.rotate(x, cos, sin), x * cos + torch.cat([-right, left], -1) * sin)


@pytest.mark.parametrize("gelu", [False, True])
def test_gates(gelu: bool) -> None:
    gate, up = torch.linspace(-100, 100, 4001).bfloat16(), numbers(4001)
    activation = functional.gelu(gate.double(), approximate="tanh") if gelu else functional.silu(gate.double())
    wanted = activation.bfloat16().double() * up.double()  # rounded as the model's own is
    torch.testing.assert_close(bindings.gated(gate, up, gelu=gelu).double(), wanted, rtol=2**-7 * 1.05, atol=1e-6)


def cached(lengths: list[int], heads: int, kv: int, width: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of one token a row, and caches of two blocks at the places 1, 3, 5 ..."""
    rows = len(lengths)
    q, k, v = (numbers(rows, h, width, seed=s).transpose(0, 1) for s, h in enumerate((heads, kv, kv)))
    keys, values = (numbers(2, 2 * rows, kv, 64, width, seed=s) for s in (3, 4))
    return q, k, v, keys, values


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: list[int], window: int) -> Tensor:
    """[rows, H, D] in float64, with weights rounded as they enter their product."""
    found = []
    for row, length in enumerate(lengths):
        first = max(0, length + 1 - window) if window else 0
        past_k, past_v = (x[:, 2 * row + 1].double().transpose(0, 1).flatten(1, 2)[:, first:length] for x in (keys, values))
        own_k, own_v = (
            torch.cat([past, new[:, row : row + 1].double()], 1).repeat_interleave(len(q) // len(k), 0)
            for past, new in ((past_k, k), (past_v, v))
        )
        scores = torch.einsum("hd,hsd->hs", q[:, row].double(), own_k) * 0.3
        weights = torch.softmax(scores, -1).bfloat16().double()
        found.append(torch.einsum("hs,hsd->hd", weights, own_v))
    return torch.stack(found)


@pytest.mark.parametrize("window", [0, 1, 5, 70])
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 4, 16), (9, 3, 64), (4, 1, 256)])
def test_attention_over_the_cache(heads: int, kv: int, width: int, window: int) -> None:
    lengths = [0, 1, 63, 64, 65, 127]
    q, k, v, keys, values = cached(lengths, heads, kv, width)
    wanted, before = attention(q, k, v, keys, values, lengths, window), keys.clone()
    places, counts, tokens = torch.arange(6) * 2 + 1, torch.tensor(lengths), torch.arange(6)
    out = torch.zeros(6, heads, width, dtype=torch.bfloat16)
    bindings.attend(q, k, v, keys, values, (places, counts, tokens), 0.3, window, out)
    # A float32 sum may end on the other side of where a weight is rounded.
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8 * 1.05, atol=2e-3)
    for row, length in enumerate(lengths):
        block, inside = divmod(length, 64)
        assert torch.equal(keys[block, 2 * row + 1, :, inside], k[:, row])
        assert torch.equal(values[block, 2 * row + 1, :, inside], v[:, row])
        before[block, 2 * row + 1, :, inside] = k[:, row]
    assert torch.equal(keys, before)  # nothing else was written
    alone = torch.zeros_like(out)
    for row in range(6):
        own = (x[row : row + 1] for x in (places, counts, tokens))
        bindings.attend(q, k, v, keys, values, tuple(own), 0.3, window, alone)
    assert torch.equal(alone, out)


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    lengths = [3, 3, 3]
    q, k, v, keys, values = cached(lengths, 4, 2, 16)
    where = torch.arange(3) * 2 + 1, torch.tensor(lengths), torch.arange(3)
    wanted, out = (torch.zeros(3, 4, 16, dtype=torch.bfloat16) for _ in range(2))
    bindings.attend(q, k, v, keys, values, where, 0.3, 0, wanted)
    keys[0, 3] = math.nan
    bindings.attend(q, k, v, keys, values, where, 0.3, 0, out)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], wanted[::2])
    assert bindings.multiply(torch.tensor([[math.inf]]).bfloat16(), torch.ones(2, 1).bfloat16(), None).isinf().all()
    assert bindings.rms_norm(torch.full((1, 8), math.nan).bfloat16(), torch.ones(8), 1e-5).isnan().all()
    assert bindings.gated(torch.full((3,), math.nan).bfloat16(), numbers(3), gelu=False).isnan().all()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("count", [5, 64, 4001])
def test_gradients_of_gates(count: int, gelu: bool) -> None:
    gate, up, grad = torch.linspace(-9, 9, count).bfloat16(), numbers(count), numbers(count, seed=1)
    own = [x.double().requires_grad_() for x in (gate, up)]
    activation = functional.gelu(own[0], approximate="tanh") if gelu else functional.silu(own[0])
    (activation * own[1]).backward(grad.double())
    for found, x in zip(bindings.gated_backward(gate, up, grad, gelu=gelu), own, strict=True):
        torch.testing.assert_close(found.double(), x.grad, rtol=2**-8 * 1.05, atol=1e-6)


@pytest.mark.parametrize("width", [7, 64, 576])
def test_gradients_of_norms(width: int) -> None:
    x, weight, grad = numbers(1, 9, width), torch.rand(width) + 0.5, numbers(1, 9, width, seed=1)
    wide = x.double().requires_grad_()
    (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight).backward(grad.double())
    assert wide.grad is not None
    torch.testing.assert_close(bindings.rms_norm_backward(x, weight, 1e-5, grad).double(), wide.grad, **CLOSE)


@pytest.mark.parametrize("width", [12, 64, 256])
def test_gradients_of_rotations(width: int) -> None:
    x, grad = numbers(3, 40, width), numbers(40, 3, width, seed=1).transpose(0, 1)
    angles = torch.rand(40, width // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    wide = x.double().requires_grad_()
    left, right = wide.chunk(2, -1)
    (wide * cos.double() + torch.cat([-right, left], -1) * sin.double()).backward(grad.double())
    assert wide.grad is not None
    torch.testing.assert_close(bindings.rotate_backward(grad, cos, sin).double(), wide.grad, **CLOSE)


def packed(q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], window: int) -> Tensor:
    """Attention of packed segments by plain operations, in the type of what comes in."""
    out = torch.zeros_like(q)
    for span in spans:
        rows = slice(span.start, span.start + span.length)
        keys, values = (gather(x, span).repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        hidden = invisible(Segments(spans), span.length, span.keys, window, q.device)
        weights = torch.softmax((q[:, rows] @ keys.transpose(1, 2) * 0.2).masked_fill(hidden, float("-inf")), -1)
        out = torch.index_copy(out, 1, torch.arange(rows.start, rows.stop), weights @ values)
    return out


TREES = [
    ((Span(0, 2),), 0),
    ((Span(0, 17), Span(18, 5, ((3, 4),))), 3),  # tokens of no span, and a window that cuts
    ((Span(0, 120), Span(120, 70, ((0, 120),)), Span(190, 33, ((0, 120), (120, 70))), Span(223, 130)), 0),
    ((Span(0, 200), Span(200, 40, ((0, 200),))), 77),
]


@pytest.mark.parametrize(("spans", "window"), TREES)
@pytest.mark.parametrize(("heads", "kv", "width"), [(9, 3, 64), (4, 1, 256), (4, 4, 24), (3, 1, 16), (40, 1, 16)])
def test_attention_of_packed_segments(heads: int, kv: int, width: int, spans: tuple[Span, ...], window: int) -> None:
    tokens = spans[-1].start + spans[-1].length + 2
    q, k, v, grad = (numbers(tokens, h, width, seed=s).transpose(0, 1) for s, h in enumerate((heads, kv, kv, heads)))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = packed(*wide, spans, window)
    wanted.backward(grad.double())
    for x in (q, k, v):
        x.requires_grad_()
    found = CpuSegmentAttention.apply(q, k, v, 0.2, Segments(spans), window)
    found.backward(grad)
    for own, other in [(found, wanted), *((x.grad, y.grad) for x, y in zip((q, k, v), wide, strict=True))]:
        apart = (own.double() - other).norm() / other.norm()
        assert apart < 2**-8, apart  # weights, slopes and results are rounded once each
    again = CpuSegmentAttention.apply(q, k, v, 0.2, Segments(spans), window)
    first = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    again.backward(grad)
    assert torch.equal(again, found)
    assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), first, strict=True))


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize(("heads", "kv", "width"), [(9, 3, 64), (4, 1, 256), (4, 4, 24)])
def test_a_token_attends_the_same_in_a_batch_in_a_tree_and_over_the_cache(
    heads: int, kv: int, width: int, window: int
) -> None:  # fmt: skip
    q, k, v = (numbers(128, h, width, seed=s).transpose(0, 1) for s, h in enumerate((heads, kv, kv)))
    whole = bindings.segments(q, k, v, bindings.SpanTable([[(0, 128)]]), 0.3, window)
    tree = bindings.segments(
        q, k, v, bindings.SpanTable([[(0, 50)], [(0, 50), (50, 11)], [(0, 50), (50, 11), (61, 67)]]), 0.3, window
    )
    assert torch.equal(tree, whole)
    keys, values = (numbers(2, 3, kv, 64, width, seed=s) for s in (3, 4))
    out = torch.zeros(128, heads, width, dtype=torch.bfloat16)
    for token in range(128):
        where = torch.tensor([1]), torch.tensor([token]), torch.tensor([token])
        bindings.attend(q, k, v, keys, values, where, 0.3, window, out)
    assert torch.equal(out.transpose(0, 1), whole)


@pytest.mark.parametrize(("vocabulary", "tokens", "width"), [(151, 48, 24), (5000, 16, 64), (7, 32, 33), (70_001, 80, 5)])
def test_passes_over_logits(vocabulary: int, tokens: int, width: int) -> None:
    """Sums and means of the same logits in float64; a token's are the same to the bit among others and with fifteen copies."""
    logits, head, least = numbers(vocabulary, tokens) * 4, numbers(vocabulary, width, seed=1), math.log(1e-5)
    total, mean = bindings.head_mean(logits, head, least)
    logp = torch.log_softmax(logits.double(), 0)
    assert torch.equal(total, bindings.log_sum_exp(logits))
    assert (total - torch.logsumexp(logits.double(), 0)).abs().max() < 3e-6
    share = torch.where(logp > least, logp.exp(), 0).T
    assert (share > 0).sum(1).double().mean() < vocabulary or vocabulary < 100
    wanted, size = share @ head.double(), share @ head.double().abs()
    assert bool(((mean.double() - wanted).abs() <= wanted.abs() * 2**-8 + size * 2**-8).all())
    alone = logits[:, 5:6].expand(-1, 16).contiguous()
    total_alone, mean_alone = bindings.head_mean(alone, head, least)
    assert torch.equal(total_alone, total[5].expand(16))
    assert torch.equal(mean_alone, mean[5].expand(16, -1))


def test_logits_that_are_no_numbers_harm_no_other_token() -> None:
    logits, head = numbers(300, 16), numbers(300, 8, seed=1)
    total, mean = bindings.head_mean(logits, head, -20.0)
    spoilt = logits.clone()
    spoilt[7, 3], spoilt[8, 4], spoilt[:, 5] = math.nan, math.inf, -math.inf
    total_spoilt, mean_spoilt = bindings.head_mean(spoilt, head, -20.0)
    whole = [n for n in range(16) if n not in (3, 4, 5)]
    assert not total_spoilt[[3, 4, 5]].isfinite().any()
    assert torch.equal(total_spoilt[whole], total[whole])
    assert torch.equal(mean_spoilt[whole], mean[whole])


@pytest.mark.parametrize("outputs", [1, 63, 64, 200])
@pytest.mark.parametrize("inputs", [9, 576])
def test_adapters_by_slot(inputs: int, outputs: int) -> None:
    tokens = [[4, 0, 7, 2, 9], [], [1], [3, 5, 6]]  # token 8 is the base's
    x, a, b = numbers(10, inputs), numbers(4, 24, inputs, seed=1), numbers(4, 8, outputs, seed=2)
    groups, y = bindings.Groups(tokens), numbers(10, outputs, seed=3)
    p, before = bindings.project(x, a, groups), y.clone()
    bindings.expand(p, b, groups, 16, y)
    for slot, own in enumerate(tokens):
        for token in own:
            wanted = a[slot].double() @ x[token].double()
            torch.testing.assert_close(p[token].double(), wanted, rtol=2**-8 * 1.05, atol=1e-4)
            added = before[token].double() + p[token, 16:].double() @ b[slot].double()
            torch.testing.assert_close(y[token].double(), added, rtol=2**-8 * 1.05, atol=1e-4)
            alone, single = bindings.Groups([[token] if s == slot else [] for s in range(4)]), before.clone()
            bindings.expand(bindings.project(x, a, alone), b, alone, 16, single)
            assert torch.equal(single[token], y[token])
    assert torch.equal(y[8], before[8])


ANSWERS = """
import json, torch
from posttrain.generate.engine import Engine, Request, SamplingSettings
from posttrain.kernels.cpu.build import library
from posttrain.models.base_model import load_base
from posttrain.models.lora import LoraSettings
from posttrain.models.segments import Segments, Span
base = load_base("random:tiny", template="plain", dtype="bfloat16")
for seed, (name, rank, targets) in enumerate([("all", 8, "all"), ("some", 3, ("q_proj", "v_proj", "down_proj"))]):
    adapter = base.adapters.create(name, LoraSettings(rank, 2.0 * rank, 0.0, targets, "standard"), seed=seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
names = ["all", "base", "some"] * 3
prompts = [list(range(7 + k, 40 + 9 * k)) for k in range(9)]
found = []
for serving in (False, True):
    engine, rollouts = Engine(base, serving=serving), {}
    for prompt, name in zip(prompts, names):
        engine.submit(Request(prompt, SamplingSettings(12, 1.0, 1.0, 0), name))
    while engine.live:
        rollouts |= {event.row: event.rollout for event in engine.step() if event.rollout}
    for number, rollout in sorted(rollouts.items()):
        ids = torch.tensor([*prompts[number], *rollout.completion_ids])
        with torch.no_grad():
            segments, start = Segments((Span(0, len(ids)),)), len(prompts[number])
            hidden = base.hidden(ids, torch.arange(len(ids)), segments, names[number])
            trainer = base.logprobs(hidden[start - 1 : -1], ids[start:], names[number]).tolist()
        found.append((rollout.completion_ids, rollout.model_logprobs, trainer))
print(json.dumps([library() is not None, *map(list, zip(*found))]))
"""


def answers(environment: dict[str, str]) -> tuple[bool, list[list[int]], list[list[float]], list[list[float]]]:
    """Of the base and two adapters mixed, by an engine that does not serve and by one that does: whether compiled functions
    were there, ids, the engine's log-probabilities and the trainer's."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    made, ids, logprobs, trainer = json.loads(done.stdout)
    return made, ids, logprobs, trainer


def test_mixed_adapters_answer_as_they_were_trained_with_a_compiler_and_without() -> None:
    found = [answers(environment) for environment in ({}, {"POSTTRAIN_COMPILE": "0"}, {"CC": "/nowhere/cc"})]
    assert [made for made, *_ in found] == [True, False, False]
    for _, _, logprobs, trainer in found:
        for own, wanted in zip(logprobs, trainer, strict=True):
            torch.testing.assert_close(torch.tensor(own), torch.tensor(wanted), rtol=0, atol=0.1)
    ids, plain = found[0][1], found[1][1]
    same = sum(a[0] == b[0] for a, b in zip(ids, plain, strict=True))
    assert same >= 15, f"{same} of {len(ids)}"  # one rounding may turn a draw, and all after it
    assert found[1][1:] == found[2][1:]


def test_a_compiler_that_fails_leaves_nothing_half_made(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = -O3 ] && echo rubbish > "$last"\nexit 1\n')
    broken.chmod(0o755)
    made, *_ = answers({"CC": str(broken), "POSTTRAIN_CACHE": str(tmp_path / "cache")})
    assert not made
    assert not list(tmp_path.glob("cache/kernels/*"))


def load_kernels(cache: Path) -> list[str]:
    """Load them with a cache folder of its own; returns what lies there afterwards."""
    code = "from posttrain.kernels.cpu import build; assert build.library() is not None"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "POSTTRAIN_CACHE": str(cache)})
    return sorted(path.name for path in cache.glob("kernels/*"))


def test_what_was_compiled_is_kept_where_nobody_else_writes(tmp_path: Path) -> None:
    digest, name = load_kernels(tmp_path)
    kept = tmp_path / "kernels" / name
    before = kept.stat()
    assert load_kernels(tmp_path) == [digest, name]
    assert kept.stat().st_mtime_ns == before.st_mtime_ns  # not made again
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    kept.write_bytes(b"planted")
    kept.parent.chmod(0o777)  # anybody may have written it: it is not looked at
    assert load_kernels(tmp_path) == [digest, name]
    assert kept.read_bytes() == b"planted"


@pytest.mark.parametrize("policy", ["base", "adapter"])
def test_the_sampler_of_a_tiny_model_is_the_trainer(policy: str) -> None:
    base = load_base("random:tiny", template="plain", dtype="bfloat16")
    if policy == "adapter":
        adapter = base.adapters.create(policy, LoraSettings(16, 32.0, 0.0, "all", "standard"), seed=0)
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    prompts = [list(range(10, 10 + count)) for count in (1, 3, 60, 64, 130)]
    apart = []
    for rollout, prompt in zip(generate(base, prompts, SamplingSettings(24, 1.0, 1.0, 0), policy), prompts, strict=True):
        ids = torch.tensor([*prompt, *rollout.completion_ids])
        with torch.no_grad():
            hidden = base.hidden(ids, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), policy)
            wanted = base.logprobs(hidden[len(prompt) - 1 : -1], ids[len(prompt) :], policy)
        apart += (wanted - torch.tensor(rollout.model_logprobs)).abs().tolist()
    assert len(apart) > 90
    assert max(apart) < 1e-6  # the last place of a logarithm

"""Every CUDA path of the models against the CPU's or float64. Run on a machine with a GPU: `pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from head_problems import exact, problem
from packed_examples import LONG, PACKINGS, dense, random_heads, token_rows
from torch import Tensor

from bases import CONFIGS, make_base
from posttrain.data.packing import pack, row_segments, tree_segments
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.kernels.cuda.compiled import rms_norm
from posttrain.models.attention import segment_attention
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.batches import batch_logprobs, pack_trees, to_device
from posttrain.models.logprobs import target_logprobs
from posttrain.models.lora import LoraAdapter
from posttrain.models.recompute import recomputed
from posttrain.models.segments import Segments, Span

# The compiler warns of what it could do on this card; that is not ours to answer for.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def on_gpu(heads: list[Tensor], spans: tuple[Span, ...], window: int, softcap: float | None = None) -> Tensor:
    q, k, v = heads
    out, _ = segment_attention(
        torch.nn.Identity(), q[None], k[None], v[None], None, scaling=0.3, segments=Segments(spans),
        sliding_window=window or None, softcap=softcap,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def largest(found: Tensor, wanted: Tensor) -> float:
    """Error in norm, relative to what is wanted or to 1 where that is smaller: a token that sees itself alone has no slope."""
    return float((found.detach().double().cpu() - wanted.detach()).norm() / wanted.norm().clamp(min=1))


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_flash_kernel_sees_what_segments_see(packing: str, window: int, width: int) -> None:
    spans, used = PACKINGS[packing], 24
    near = random_heads(4, 2, used + 3, width, torch.bfloat16)
    check_against_float64(near, spans, window, used, 0.01)


@pytest.mark.parametrize("window", [0, 1, 60, 128, 200, 400])
def test_long_spans_under_long_ancestors(window: int) -> None:
    check_against_float64(random_heads(4, 1, 700, 64, torch.bfloat16), LONG, window, 699, 0.01)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("packing", PACKINGS)
def test_float32_runs_plain_products(packing: str, softcap: float | None) -> None:
    check_against_float64(random_heads(4, 2, 27, 16), PACKINGS[packing], 4, 24, 1e-5, softcap)


def check_against_float64(
    near: list[Tensor], spans: tuple[Span, ...], window: int, used: int, bound: float, softcap: float | None = None
) -> None:
    """Values and all gradients of the first `used` tokens."""
    far = [x.cuda().requires_grad_() for x in near]
    wide = [x.double().requires_grad_() for x in near]
    here, there = dense(*wide, 0.3, spans, window, softcap)[:, :used], on_gpu(far, spans, window, softcap)[:, :used]
    assert largest(there, here) < bound
    slope = torch.randn(here.shape, generator=torch.Generator().manual_seed(5)).to(near[0].dtype)
    found = torch.autograd.grad((there * slope.cuda()).sum(), far)
    wanted = torch.autograd.grad((here * slope.double()).sum(), wide)
    for a, b in zip(found, wanted, strict=True):
        assert largest(a, b) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_logprobs_and_gradients(trained: bool, dtype: torch.dtype) -> None:
    given = problem(rows=500, vocabulary=1511, width=64)
    given = given._replace(hidden_ND=given.hidden_ND.to(dtype).float(), head_VD=given.head_VD.to(dtype).float())
    value, in_hidden, in_head = exact(given)
    hidden = given.hidden_ND.to(dtype).cuda().requires_grad_()
    head = given.head_VD.to(dtype).cuda().requires_grad_(trained)
    found = target_logprobs(hidden, head, given.target_N.cuda())
    (found * given.slope_N.cuda()).sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 0.01
    assert largest(found.detach(), value) < bound
    assert largest(hidden.grad, in_hidden) < bound
    if trained:
        assert largest(head.grad, in_head) < bound


def test_the_compiled_norm_and_its_gradients() -> None:
    for rows, width, offset in ((5, 24, 0.0), (300, 24, 1.0), (7, 128, 0.0), (1, 128, 0.0)):
        near = [torch.randn(rows, width, dtype=torch.float64, requires_grad=True), torch.rand(width).double().requires_grad_()]
        far = [x.detach().float().cuda().requires_grad_() for x in near]
        wanted = rms_norm.__wrapped__(near[0].float(), near[1].float(), offset, 1e-6)  # type: ignore[attr-defined]
        found = rms_norm(far[0], far[1], offset, 1e-6)
        assert largest(found.detach(), wanted.detach().double()) < 1e-6
        slope = torch.randn(rows, width)
        for a, b in zip(
            torch.autograd.grad((found * slope.cuda()).sum(), far),
            torch.autograd.grad((wanted * slope).sum(), near),
            strict=True,
        ):
            assert largest(a, b) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_agree_with_the_cpu(name: str, dtype: str, tmp_path: Path, lively: Callable, own_cache: None) -> None:
    near = make_base(name, tmp_path)
    far = load_base(str(tmp_path), template="gemma", dtype=dtype, device="cuda")
    prompt, one, two, row = token_rows(4, low=10, high=40, seed=2)
    tree = tree_segments(prompt, [one, two], first_row=0, index=0)
    tree += row_segments(row, [True] * len(row), 2)
    found, slopes = [], []
    for base in (near, far):
        adapter = lively(base, "a")
        adapter.requires_grad_(True)
        logprobs_N = batch_logprobs(base, to_device(pack(tree, 3), base.device), "a")
        found.append(logprobs_N.detach().cpu().double())
        grads = torch.autograd.grad(logprobs_N.mean(), list(adapter.parameters().values()))
        slopes.append(torch.cat([g.flatten().cpu().double() for g in grads]))
    bound = 1e-4 if dtype == "float32" else 0.05
    assert largest(found[1], found[0]) < bound
    assert largest(slopes[1], slopes[0]) < bound


@pytest.mark.parametrize("name", ["llama", "gemma3, sliding", "gemma2, soft-capped"])
def test_greedy_answers_are_the_cpus(name: str, tmp_path: Path, lively: Callable, own_cache: None) -> None:
    """Two adapters and the base in one batch, prompts with two completions, a repetition penalty for every third."""
    near = make_base(name, tmp_path)
    far = load_base(str(tmp_path), template="gemma", dtype="float32", device="cuda")
    prompts = token_rows(20, low=1, high=30, seed=7)
    settings = [SamplingSettings(12, 0.0, repetition_penalty=1.0 if i % 3 else 1.2) for i in range(20)]
    answers = []
    for base in (near, far):
        lively(base, "a")
        lively(base, "rows", seed=1, token_ids=(5, 60))
        adapters = [("base", "a", "rows")[i % 3] for i in range(20)]
        found = generate(base, prompts, settings, adapters, completions=2)
        answers.append([r.completion_ids for r in found])
        for rollout in found:
            assert torch.isfinite(torch.tensor(rollout.logprobs)).all()
    different = sum(a != b for a, b in zip(*answers, strict=True))
    assert different == 0, f"{different} of 40 differ"


def test_sampled_logprobs_are_those_of_a_forward_in_bfloat16(own_cache: None) -> None:
    """The flash kernel's prefill and the cache of a GPU, joining and leaving; cut distributions are sampled from too."""
    base = load_base("random:tiny", template="gemma", dtype="bfloat16", device="cuda")
    for settings in (SamplingSettings(30, 1.0, seed=1), SamplingSettings(20, 0.8, 0.9, top_k=50, min_p=0.01)):
        for rollout in generate(base, token_rows(20, low=1, high=90, seed=8), settings, "base", completions=3):
            ids = [*rollout.prompt_ids, *rollout.completion_ids]
            batch = to_device(pack(row_segments(ids, [True] * len(ids), 0), 1), base.device)
            with torch.no_grad():
                full_N = batch_logprobs(base, batch, "base")[-len(rollout.completion_ids) :].cpu()
            assert (torch.tensor(rollout.model_logprobs) - full_N).abs().max() < 0.1


@pytest.fixture
def wide(own_cache: None) -> BaseModel:
    """A whole model to fine-tune: float32 weights, bfloat16 products."""
    return load_base("random:tiny", template="gemma", device="cuda", full=True)


def test_full_fine_tuning_keeps_float32_weights_and_gradients(wide: BaseModel) -> None:
    assert wide.dtype == torch.bfloat16
    wide.model.requires_grad_(True)
    ids = token_rows(1, low=60, high=61)[0]
    batch = to_device(pack(row_segments(ids, [True] * len(ids), 0), 1), wide.device)
    batch_logprobs(wide, batch, "base").mean().backward()
    exactly = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    exactly.model.requires_grad_(True)
    batch_logprobs(
        exactly, to_device(pack(row_segments(ids, [True] * len(ids), 0), 1), exactly.device), "base"
    ).mean().backward()
    theirs = dict(exactly.model.named_parameters())
    for name, parameter in wide.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert largest(parameter.grad, theirs[name].grad.double()) < 0.05, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_computed_again_give_the_same_gradients(
    dtype: str, dropout: float, lively: Callable[..., LoraAdapter], own_cache: None
) -> None:
    """What a GPU adds up in a backward comes in any order: the values are the same bits, the gradients nearly."""
    base = load_base("random:tiny", template="gemma", dtype=dtype, device="cuda")
    adapter = lively(base, "a", dropout=dropout)
    adapter.requires_grad_(True)
    batch = pack_trees([(list(range(10, 40)), [list(range(50, 90)), list(range(60, 80))])], base.device)
    values, slopes, held = [], [], []
    for on in (False, False, True):  # the first allocates what stays
        torch.manual_seed(7)
        for parameter in adapter.parameters().values():
            parameter.grad = None
        before = torch.cuda.memory_allocated()
        with recomputed(base, on):
            logprobs_N = batch_logprobs(base, batch, "a")
        held.append(torch.cuda.memory_allocated() - before)
        logprobs_N.square().mean().backward()  # type: ignore[no-untyped-call]
        values.append(logprobs_N.detach().cpu())
        slopes.append(torch.cat([p.grad.double().flatten().cpu() for p in adapter.parameters().values() if p.grad is not None]))
    assert torch.equal(values[1], values[2])
    assert held[2] < held[1]
    assert float((slopes[1] - slopes[2]).norm() / slopes[1].norm()) < (1e-5 if dtype == "float32" else 1e-2)

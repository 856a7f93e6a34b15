"""Chunked log-probabilities and their gradients against log_softmax in float64."""

import pytest
import torch
from head_problems import exact, problem

from posttrain import kernels
from posttrain.kernels import HeadRows, reference
from posttrain.kernels import reference_head as module
from posttrain.models.logprobs import target_logprobs


@pytest.fixture(autouse=True, params=["fastest", "reference"])
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a head on a CPU."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "_cpu", reference)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("head_trained", [False, True])
def test_value_and_gradients_match_float64(head_trained: bool, softcap: float | None) -> None:
    given = problem()
    value, in_hidden, in_head = exact(given, softcap)
    hidden, head = given.hidden_ND.clone().requires_grad_(), given.head_VD.clone().requires_grad_(head_trained)
    found = target_logprobs(hidden, head, given.target_N, softcap=softcap)
    (found * given.slope_N).sum().backward()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), value, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), in_hidden, atol=1e-5)
    assert (head.grad is not None) == head_trained
    if head_trained:
        assert torch.allclose(head.grad.double(), in_head, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("head_trained", [False, True])
def test_a_bias_is_a_column_of_the_head_that_every_hidden_state_meets_with_a_one(
    head_trained: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    given = problem()
    bias = torch.randn(len(given.head_VD), generator=torch.Generator().manual_seed(3)).to(dtype)
    given = given._replace(hidden_ND=given.hidden_ND.to(dtype), head_VD=given.head_VD.to(dtype))
    wider = given._replace(
        hidden_ND=torch.cat([given.hidden_ND, torch.ones(37, 1, dtype=dtype)], 1),
        head_VD=torch.cat([given.head_VD, bias[:, None]], 1),
    )
    value, in_hidden, in_head = exact(wider, softcap)
    hidden, head = given.hidden_ND.clone().requires_grad_(), given.head_VD.clone().requires_grad_(head_trained)
    bias.requires_grad_(head_trained)
    found = target_logprobs(hidden, head, given.target_N, softcap=softcap, bias_V=bias)
    (found * given.slope_N).sum().backward()
    close = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(found.double(), value, atol=close)
    assert torch.allclose(hidden.grad.double(), in_hidden[:, :-1], atol=close)
    if head_trained:
        assert torch.allclose(head.grad.double(), in_head[:, :-1], atol=5 * close)
        assert torch.allclose(bias.grad.double(), in_head[:, -1], atol=5 * close)
    with torch.no_grad():
        again = target_logprobs(given.hidden_ND, head, given.target_N, softcap=softcap, bias_V=bias)
    assert torch.allclose(again, found, atol=1e-5)


@pytest.mark.parametrize("head_trained", [False, True])
def test_only_the_head_may_be_trained(head_trained: bool) -> None:
    given = problem()
    head = given.head_VD.clone().requires_grad_(head_trained)
    found = target_logprobs(given.hidden_ND, head, given.target_N)
    assert torch.allclose(found.double(), exact(given)[0], atol=1e-5)
    assert found.requires_grad == head_trained
    if head_trained:
        (found * given.slope_N).sum().backward()
        assert torch.allclose(head.grad.double(), exact(given)[2], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_size_of_the_chunks_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, softcap: float | None
) -> None:
    given = problem(rows=70)
    found = []
    for logits in (1, 151 * 20, 2**25):  # 16 rows at a time, 20, all
        monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", logits)
        hidden = given.hidden_ND.to(dtype).requires_grad_()
        value = target_logprobs(hidden, given.head_VD.to(dtype), given.target_N, softcap=softcap)
        (value * given.slope_N).sum().backward()
        found.append((value.detach(), hidden.grad.float()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for value, gradient in found[1:]:
        assert torch.allclose(value, found[0][0], atol=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=tolerance)


def test_bfloat16_gradient_stays_within_one_percent_of_float32_in_spite_of_the_filter() -> None:
    """A peaked head, as a trained one is: most of the vocabulary falls under the filter. Bound: 1 % of the norm."""
    given = problem(rows=64, vocabulary=4000, width=64, sharp=0.9)
    rounded = given._replace(hidden_ND=given.hidden_ND.bfloat16(), head_VD=given.head_VD.bfloat16())
    value, in_hidden, _ = exact(rounded)
    share = torch.softmax(rounded.hidden_ND.double() @ rounded.head_VD.double().T, -1)
    assert ((share < module.SMALLEST_PROBABILITY).float().mean(1) > 0.5).all()  # the filter has work to do
    hidden = rounded.hidden_ND.clone().requires_grad_()
    found = target_logprobs(hidden, rounded.head_VD, given.target_N)
    (found * given.slope_N).sum().backward()
    assert torch.allclose(found.double(), value, atol=0.15)  # logits near 16 are rounded to 1/16
    error = (hidden.grad.double() - in_hidden).norm() / in_hidden.norm()
    assert error < 0.01


def test_what_the_filter_leaves_out_is_small_where_the_distribution_is_flat() -> None:
    """Uniform over 200,000 tokens, each below 1e-5: nothing passes the filter. The bound is then the mean row's norm."""
    head = torch.zeros(200_000, 4, dtype=torch.bfloat16)
    head[0, 0] = 1
    hidden = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    found = target_logprobs(hidden, head, torch.tensor([0, 1, 2]))
    found.sum().backward()
    assert torch.allclose(found, torch.full((3,), -torch.tensor(200_000.0).log()), atol=1e-4)
    wanted = torch.zeros(3, 4)
    wanted[0, 0] = 1
    assert torch.allclose(hidden.grad.float(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_without_gradients_are_the_same_ones(dtype: torch.dtype) -> None:
    given = problem()
    hidden, head = given.hidden_ND.to(dtype), given.head_VD.to(dtype)
    with torch.no_grad():
        plain = target_logprobs(hidden, head, given.target_N)
    assert torch.allclose(plain, target_logprobs(hidden.requires_grad_(), head, given.target_N), atol=1e-5)


def test_certain_and_hopeless_targets_are_finite() -> None:
    head = torch.tensor([[1.0], [-1.0]])
    hidden = torch.tensor([[1000.0], [1000.0]], requires_grad=True)
    found = target_logprobs(hidden, head, torch.tensor([0, 1]))
    assert found.tolist() == [0.0, -2000.0]
    found.sum().backward()
    assert torch.allclose(hidden.grad, torch.tensor([[0.0], [-2.0]]))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_targets_give_no_logprobs(softcap: float | None) -> None:
    given = problem(rows=0)
    assert target_logprobs(given.hidden_ND.requires_grad_(), given.head_VD, given.target_N, softcap=softcap).shape == (0,)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_stand_in_a_head_are_those_of_a_head_with_them(dtype: torch.dtype, softcap: float | None) -> None:
    given = problem()
    hidden, head = given.hidden_ND.to(dtype), given.head_VD.to(dtype)
    ids = torch.tensor([int(given.target_N[0]), int(given.target_N[1]) + 1])
    rows = HeadRows(ids, torch.randn(2, head.shape[1], generator=torch.Generator().manual_seed(5)).to(dtype))
    replaced = head.clone()
    replaced[ids] = rows.rows_KD
    found, wanted = [], []
    for into, whole, own in ((found, head, rows), (wanted, replaced, None)):
        start = hidden.clone().requires_grad_()
        logprobs = target_logprobs(start, whole, given.target_N, softcap=softcap, rows=own)
        with torch.no_grad():
            into.append(target_logprobs(start, whole, given.target_N, softcap=softcap, rows=own))
        logprobs.sum().backward()
        into += [logprobs.detach(), start.grad.float()]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=tolerance)

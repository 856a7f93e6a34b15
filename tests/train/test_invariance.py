"""How a step is cut, packed and ordered changes no gradient: one micro-batch of N rows is N micro-batches of one."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from rows_of_ids import ROWS, ids, train_rows
from torch import Tensor

from posttrain.data.packing import pack, row_segments
from posttrain.data.prepare import PairRow, TrainRow
from posttrain.data.rankings import RankedPrompt, rank_prompts
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import batch_logprobs, pack_pairs, pack_rows, sum_by_row, to_device
from posttrain.models.heads import SCORE_NAME, new_head
from posttrain.models.lora import LoraSettings
from posttrain.stages.dpo import DpoStage
from posttrain.train.dpo import dpo_task
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.reward import reward_task
from posttrain.train.sft import sft_task
from posttrain.train.stage import TrainedPolicy

TOLERANCE = 1e-6
# How the rows of a step may be cut into micro-batches; the last window of the third is ragged.
CUTS = [[1] * ROWS, [2] * 5 + [1], [4, 4, 3], [10, 1], [3, 1, 7]]


def pair_rows() -> list[PairRow]:
    chance = random.Random(2)
    return [PairRow(f"pair-{i}", ids(chance, 2, 20), ids(chance, 1, 30), ids(chance, 1, 30)) for i in range(ROWS)]


def ranked_prompts() -> list[RankedPrompt]:
    """Prompts with two to four completions, whose pairs have margins and labels of their own."""
    chance = random.Random(4)
    rows = []
    for i in range(ROWS):
        prompt, answers = ids(chance, 2, 20), [ids(chance, 1, 20) for _ in range(2 + i % 3)]
        for k in range(1, len(answers)):
            rows.append(PairRow(f"pair-{i}-{k}", prompt, answers[k - 1], answers[k], chance.random(), 1 - chance.random() / 3))
    return rank_prompts(rows)


@pytest.fixture
def policy(base: BaseModel) -> TrainedPolicy:
    """An adapter away from zero, so that both of its matrices have a gradient."""
    adapter = base.adapters.create("policy", LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
    random_numbers = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters().values():
        parameter.data.normal_(std=0.05, generator=random_numbers)
    adapter.head = new_head(64, seed=1, device=base.device)
    adapter.requires_grad_(True)
    return TrainedPolicy("policy", adapter.parameters(), lambda folder: None)


def reference(pairs: Sequence[PairRow]) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(9)
    return {p.id: -torch.rand(len(p.chosen_ids) + len(p.rejected_ids), generator=chance) * 6 for p in pairs}


def make_task(kind: str, base: BaseModel, policy: TrainedPolicy) -> TrainTask:
    if kind == "sft":
        return sft_task(base, policy, train_rows(), [])
    if kind == "reward":
        return reward_task(base, policy, ranked_prompts(), [], center=0.01)
    pairs = pair_rows()
    stage = DpoStage(kind="dpo", name="dpo", data="x", beta=0.3)
    return dpo_task(base, policy, stage, pairs, [], reference(pairs))


def gradients(task: TrainTask, groups: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of one optimiser step whose micro-batches are those of each group, and its metrics."""
    for parameter in task.parameters.values():
        parameter.grad = None
    step = [micro for group in groups for micro in task.micro_batches(group)]
    sums: dict[str, float] = {}
    for micro in step:
        out = task.loss(micro, step)
        out.loss.backward()  # type: ignore[no-untyped-call]
        for name, value in out.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {n: p.grad.clone() for n, p in task.parameters.items() if p.grad is not None}, task.summarise(sums)


def assert_same(task: TrainTask, groups: Sequence[Sequence[int]]) -> None:
    wanted, metrics = gradients(task, [range(ROWS)])
    found, shown = gradients(task, groups)
    head = set() if "reward/loss" in metrics else {SCORE_NAME}
    assert found.keys() == wanted.keys() == task.parameters.keys() - head
    assert all(bool(g.abs().max() > 0) for g in wanted.values())
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=TOLERANCE), name
    assert shown == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_accumulation_changes_no_gradient(kind: str, cut: list[int], base: BaseModel, policy: TrainedPolicy):
    left = list(range(ROWS))
    groups = [[left.pop(0) for _ in range(size)] for size in cut]
    assert_same(make_task(kind, base, policy), groups)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_the_order_of_a_batch_changes_no_gradient(kind: str, base: BaseModel, policy: TrainedPolicy):
    shuffled = random.Random(3).sample(range(ROWS), ROWS)
    assert_same(make_task(kind, base, policy), [shuffled])


@pytest.mark.parametrize("shared", [0, 15, 16, 40])
def test_a_common_beginning_changes_no_gradient(shared: int, base: BaseModel, policy: TrainedPolicy):
    """Rows that begin alike, as under one system prompt, in one micro-batch and each by itself. One row is hardly longer."""
    chance = random.Random(3)
    beginning = ids(chance, shared, shared)
    rows = [TrainRow(r.id, beginning + r.ids, [False] * shared + r.trained) for r in train_rows()]
    rows[4] = TrainRow("short", [*beginning, 9, 11], [False] * shared + [False, True])
    task = sft_task(base, policy, rows, [])
    (whole,) = task.micro_batches(range(ROWS))
    computed = sum(len(row.ids) for row in rows) - (ROWS - 1) * (shared if shared >= 16 else 0)
    assert whole.tokens == computed
    assert_same(task, [[i] for i in range(ROWS)])


def test_rows_that_are_trained_from_their_first_token_share_nothing(base: BaseModel):
    row = TrainRow("whole", list(range(10, 40)), [True] * 30)
    packed = pack_rows([row, row._replace(id="again")], base.device)
    assert packed.tokens == 60
    assert len(packed.target_N) == 58, "the first token of a row has nothing before it"


def test_a_mean_of_means_would_have_been_noticed(base: BaseModel, policy: TrainedPolicy):
    """The tolerance is tight enough: normalising each micro-batch by its own targets gives another gradient."""
    task = make_task("sft", base, policy)
    wanted, _ = gradients(task, [range(ROWS)])

    def wrong(micro: MicroBatch, step: Sequence[MicroBatch]) -> object:
        out = task.loss(micro, [micro])
        return out._replace(loss=out.loss / len(step))

    found, _ = gradients(task._replace(loss=wrong), [[i] for i in range(ROWS)])
    assert any(not torch.allclose(found[n], wanted[n], rtol=1e-5, atol=TOLERANCE) for n in wanted)


def test_a_shared_prompt_gives_what_two_flat_rows_give(base: BaseModel, policy: TrainedPolicy):
    """Chosen and rejected below one prompt against prompt + chosen and prompt + rejected: same sums, same gradients."""
    pairs = pair_rows()

    def tree() -> Tensor:
        batch = pack_pairs(pairs, base.device)
        return sum_by_row(batch_logprobs(base, batch, "policy"), batch)

    def flat() -> Tensor:
        segments = []
        for index, (prompt, side) in enumerate((p.prompt_ids, s) for p in pairs for s in (p.chosen_ids, p.rejected_ids)):
            segments += row_segments(prompt + side, [False] * len(prompt) + [True] * len(side), index)
        batch = to_device(pack(segments, 2 * ROWS), base.device)
        return sum_by_row(batch_logprobs(base, batch, "policy"), batch)

    weights = torch.linspace(-1, 1, 2 * ROWS)
    (sums, gradient), (flat_sums, flat_gradient) = (weighted(policy, make, weights) for make in (tree, flat))
    assert torch.allclose(sums, flat_sums, rtol=1e-6, atol=1e-4)
    for name in gradient:
        scale = float(flat_gradient[name].abs().max())
        assert torch.allclose(gradient[name] / scale, flat_gradient[name] / scale, rtol=1e-5, atol=1e-5), name


def weighted(policy: TrainedPolicy, make: Callable[[], Tensor], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in policy.parameters.values():
        parameter.grad = None
    sums = make()
    (sums * weights).sum().backward()  # type: ignore[no-untyped-call]
    return sums.detach(), {n: p.grad.clone() for n, p in policy.parameters.items() if p.grad is not None}

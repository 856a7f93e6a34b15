"""The optimiser loop on problems small enough to be worked by hand."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_settings import settings as loop_settings
from torch import Tensor, nn

from posttrain.errors import Interrupted, NonFiniteError
from posttrain.losses.dpo import PairLogprobs, dpo_loss
from posttrain.losses.output import LossOutput
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import load_newest
from posttrain.train.loop import MicroBatch, TrainTask, fit
from posttrain.train.schedule import LoopSettings
from posttrain.train.step import FitResult, TrainingSteps


def settings(**changes: Any) -> LoopSettings:
    return loop_settings(**{"schedule": "constant", "learning_rate": 0.1, **changes})


def task(
    weight: nn.Parameter, loss_of_row: Callable[[int], Tensor], rows: int, validate: Callable[[], float] | None = None
) -> TrainTask:
    """The mean of `loss_of_row` over a step's rows, each row a micro-batch of its own."""

    def loss(micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        value = loss_of_row(micro.payload)
        return LossOutput(value / len(step), {"sum": value.detach(), "rows": torch.tensor(1)})

    return TrainTask(
        rows, {"weight": weight}, lambda indices: [MicroBatch(i, 1, (f"row-{i}",)) for i in indices], loss,
        lambda sums: {"toy/loss": sums["sum"] / sums["rows"]},
        (lambda: {"toy/validation_loss": validate()}) if validate else None, "toy/validation_loss",
    )  # fmt: skip


def run(task: TrainTask, settings: LoopSettings, folder: Path) -> FitResult:
    return fit(task, settings, folder, label="toy", stop=StopSignal())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_first_step_of_adamw_by_hand(tmp_path: Path):
    """Adam's first step is the rate times the sign; decay shrinks the weight by rate times decay beside it.

    w = (2, -3), gradient (2, -3) unclipped: w (1 - 0.1 * 0.5) - 0.1 sign(g).
    """
    weight = nn.Parameter(torch.tensor([2.0, -3.0]))
    run(task(weight, lambda _: weight.square().sum() / 2, 1), settings(weight_decay=0.5, clip=0.0), tmp_path)
    assert weight.tolist() == pytest.approx([2 * 0.95 - 0.1, -3 * 0.95 + 0.1])


@pytest.mark.parametrize(("clip", "kept"), [(0.0, 1.0), (10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_clipping_scales_the_whole_gradient_to_the_limit(clip: float, kept: float, tmp_path: Path):
    """Gradient (3, 4) has norm 5. After one step Adam's first moment is a tenth of the gradient it was given."""
    weight = nn.Parameter(torch.zeros(2))
    slope = torch.tensor([3.0, 4.0])
    run(task(weight, lambda _: weight @ slope, 1), settings(clip=clip), tmp_path)
    saved = load_newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.tensors["adam/exp_avg/weight"].tolist() == pytest.approx([0.3 * kept, 0.4 * kept])
    assert rows_of(tmp_path)[0]["train/grad_norm"] == pytest.approx(5.0)  # as it was before clipping


def test_parameters_with_a_rate_of_their_own_are_clipped_by_themselves(tmp_path: Path):
    """Norms 5 and 50, each clipped to 1; Adam's first step is the rate times the sign, here 0.1 and five times that."""
    weight, value = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    slope = torch.tensor([3.0, 4.0])
    steps = TrainingSteps(
        {"weight": weight, "value": value}, settings(clip=1.0), tmp_path, steps=1, label="toy", stop=StopSignal(),
        rates={"value": 5.0},
    )  # fmt: skip
    with steps.resumed():
        loss = weight @ slope - 10 * (value @ slope)
        steps.backward(LossOutput(loss, {"sum": loss.detach()}), ("row-0",))
        taken = steps.optimise(tokens=1)
        steps.record(taken, {"toy/loss": taken.sums["sum"]})
    assert steps.finished
    saved = load_newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.tensors["adam/exp_avg/weight"].tolist() == pytest.approx([0.06, 0.08])
    assert saved.tensors["adam/exp_avg/value"].tolist() == pytest.approx([-0.06, -0.08])
    assert weight.tolist() == pytest.approx([-0.1, -0.1])
    assert value.tolist() == pytest.approx([0.5, 0.5])
    assert rows_of(tmp_path)[0]["train/grad_norm"] == pytest.approx(math.hypot(5, 50))


def test_settings_reach_the_steps(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([4.0]))
    fitted = run(
        task(weight, lambda _: weight.square().sum(), 6), settings(epochs=1.5, schedule="linear", warmup=0.3), tmp_path
    )
    rows = rows_of(tmp_path)
    assert (fitted.steps, fitted.tokens) == (3, 9)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert [r["train/learning_rate"] for r in rows] == pytest.approx([0.1, 0.1, 0.1 * 0.55])
    assert [r["train/epoch"] for r in rows] == pytest.approx([4 / 6, 8 / 6, 1.5])


def scripted(values: Sequence[float]) -> Callable[[], float]:
    left = iter(values)
    return lambda: next(left)


def test_patience_ends_the_run_and_best_publishes_the_best(tmp_path: Path):
    """Validation 3, 1, 2, 5 after each step: best after the second, two without a new best: over after the fourth."""
    weight = nn.Parameter(torch.tensor([0.0]))
    seen: list[float] = []
    values = scripted([3.0, 1.0, 2.0, 5.0])

    def validate() -> float:
        seen.append(weight.item())
        return values()

    fitted = run(
        task(weight, lambda _: weight.sum(), 40, validate), settings(keep="best", patience=2, validate_every=1), tmp_path
    )
    assert fitted.steps == 4
    assert seen == pytest.approx([-0.1, -0.2, -0.3, -0.4], rel=1e-4)
    assert weight.item() == seen[1]
    assert fitted.metrics["toy/validation_loss"] == 1.0, "the metrics are those of what is published"


def test_last_publishes_the_last(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([0.0]))
    run(task(weight, lambda _: weight.sum(), 12, scripted([1.0, 2.0, 3.0])), settings(validate_every=1), tmp_path)
    assert weight.item() == pytest.approx(-0.3, rel=1e-4)


def test_validation_is_due_at_its_interval_and_at_the_end(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([0.0]))
    run(task(weight, lambda _: weight.sum(), 28, scripted([1.0] * 9)), settings(validate_every=3), tmp_path)
    assert [r["step"] for r in rows_of(tmp_path) if "toy/validation_loss" in r] == [3, 6, 7]


def test_a_finished_run_that_was_not_published_is_published_the_same(tmp_path: Path):
    """Killed between the last checkpoint and publishing: nothing is trained again, the best weights come back."""
    first = nn.Parameter(torch.tensor([0.0]))
    chosen = settings(keep="best", validate_every=1)
    fitted = run(task(first, lambda _: first.sum(), 12, scripted([3.0, 1.0, 2.0])), chosen, tmp_path)
    again = nn.Parameter(torch.tensor([77.0]))
    repeated = run(task(again, lambda _: again.sum(), 12, scripted([])), chosen, tmp_path)
    assert torch.equal(first, again)
    assert repeated == fitted
    assert [r["step"] for r in rows_of(tmp_path)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([1.0]))
    toy = task(weight, lambda row: weight.sum() * (float("nan") if row == 9 else 1.0), 12)
    with pytest.raises(NonFiniteError, match=r"step \d · the loss is not finite; the step was not taken · .*row-9") as told:
        run(toy, settings(checkpoint_every=1), tmp_path)
    check_stopped(tmp_path, weight, ["row-9"], str(told.value))


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path):
    """sqrt at 0: the loss is 0, its slope infinite. Which row it was is not known: all of the step are named."""
    weight = nn.Parameter(torch.tensor([1.0]))
    toy = task(weight, lambda row: (weight.sum() * 0).sqrt() if row == 9 else weight.sum(), 12)
    with pytest.raises(NonFiniteError, match="the gradient is not finite") as told:
        run(toy, settings(checkpoint_every=1), tmp_path)
    rows = json.loads((tmp_path / "nonfinite.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 4
    assert "row-9" in rows
    check_stopped(tmp_path, weight, rows, str(told.value))


def check_stopped(folder: Path, weight: nn.Parameter, rows: list[str], message: str) -> None:
    """Weights are those after the last whole step, bit for bit, and both files say where it ended."""
    dumped = json.loads((folder / "nonfinite.json").read_text(encoding="utf-8"))
    logged = rows_of(folder)
    assert dumped["step"] == len(logged) + 1
    assert message.startswith(f"step {dumped['step']} · ")
    assert dumped["rows"] == rows
    saved = load_newest(folder / "checkpoints")
    before = saved.tensors["weight/weight"] if saved else torch.tensor([1.0])
    assert torch.equal(weight.detach(), before)


def test_an_exploded_rate_stops_at_the_next_step(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(NonFiniteError, match="step 2"):
        run(task(weight, lambda _: weight.pow(4).sum(), 8), settings(learning_rate=1e20), tmp_path)
    assert weight.item() == pytest.approx(-1e20)


def test_a_validation_that_is_not_finite_publishes_nothing(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(NonFiniteError, match="validation after step 1 · toy/validation_loss is not finite"):
        run(task(weight, lambda _: weight.sum(), 4, scripted([math.inf])), settings(), tmp_path)


def test_a_validation_that_fails_keeps_the_steps_before_it(tmp_path: Path):
    """The same command repeats the validation and no step."""
    weight = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(NonFiniteError):
        run(task(weight, lambda _: weight.sum(), 8, scripted([3.0, math.inf])), settings(validate_every=1), tmp_path)
    assert [r["step"] for r in rows_of(tmp_path)] == [1]
    again = nn.Parameter(torch.tensor([77.0]))
    fitted = run(task(again, lambda _: 1 / (again.sum() * 0), 8, scripted([2.0])), settings(validate_every=1), tmp_path)
    assert fitted.steps == 2
    assert torch.equal(weight, again)
    assert [r["toy/validation_loss"] for r in rows_of(tmp_path)] == [3.0, 2.0]


def test_the_note_of_an_earlier_stop_does_not_stay(tmp_path: Path):
    (tmp_path / "nonfinite.json").write_text("{}", encoding="utf-8")
    weight = nn.Parameter(torch.tensor([1.0]))
    run(task(weight, lambda _: weight.sum(), 4), settings(), tmp_path)
    assert not (tmp_path / "nonfinite.json").exists()


def test_a_stop_after_the_last_step_is_no_interruption(tmp_path: Path):
    weight = nn.Parameter(torch.tensor([1.0]))
    stop = StopSignal()
    stop.asked = True
    with pytest.raises(Interrupted, match="toy: stopped after step 1 of 2"):
        fit(task(weight, lambda _: weight.sum(), 8), settings(), tmp_path, label="toy", stop=stop)
    assert fit(task(weight, lambda _: weight.sum(), 8), settings(), tmp_path, label="toy", stop=stop).steps == 2


def test_dpo_reaches_the_tilted_optimum(tmp_path: Path):
    """Three completions, Bradley-Terry preferences with weights 1 : 2 : 4, so rewards r = log weight, and beta = 1 / 2:
    the optimum is reference * exp(r / beta) / Z. Each pair stands as often as it is preferred, in fifteenths.
    """
    beta, reference = 0.5, torch.tensor([0.5, 0.3, 0.2])
    strength = [1, 2, 4]
    pairs = [
        (i, j) for i in range(3) for j in range(3) if i != j for _ in range(15 * strength[i] // (strength[i] + strength[j]))
    ]
    assert len(pairs) == 45
    logits = nn.Parameter(reference.log())

    def loss(micro: MicroBatch, _: Sequence[MicroBatch]) -> LossOutput:
        chosen, rejected = torch.tensor([pairs[i] for i in micro.payload]).T
        logp, ref = logits.log_softmax(0), reference.log()
        return dpo_loss(PairLogprobs(logp[chosen], logp[rejected], ref[chosen], ref[rejected]), beta=beta)

    toy = TrainTask(
        45, {"logits": logits}, lambda indices: [MicroBatch(list(indices), 45, ("all",))], loss,
        lambda sums: {"dpo/loss": sums["dpo/loss"] / 45}, None, "",
    )  # fmt: skip
    run(toy, settings(batch=45, epochs=400, learning_rate=0.02, schedule="cosine"), tmp_path)
    optimum = reference * torch.tensor(strength).pow(1 / beta)
    optimum /= optimum.sum()
    assert float((logits.detach().softmax(0) - optimum).abs().sum() / 2) < 1e-2
    assert float((reference - optimum).abs().sum() / 2) > 0.3  # it was far away before

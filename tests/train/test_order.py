"""Which rows a stage sees, over stops and resumes: each once an epoch, in the order of the run that was never stopped."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_stages import demonstrations, digest, preferences, run_stage

import posttrain.train.dpo
import posttrain.train.reward
import posttrain.train.sft
from posttrain.errors import Interrupted
from posttrain.models.base_model import BaseModel
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.stage import StageResult

EPOCHS = 3
MODULES = {"sft": posttrain.train.sft, "dpo": posttrain.train.dpo, "reward": posttrain.train.reward}


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_0_rows_are_doubled_or_left_out(kind: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The ids that the loop really takes losses of are written down on their way to `fit_stage`."""
    seen: list[str] = []
    original = MODULES[kind].fit_stage  # type: ignore[attr-defined]

    def written_down(context: Any, stage: Any, policy: Any, task: TrainTask, *rest: Any, **named: Any) -> StageResult:
        def loss(micro: MicroBatch, step: Any) -> Any:
            seen.extend(micro.row_ids)
            return task.loss(micro, step)

        found: StageResult = original(context, stage, policy, task._replace(loss=loss), *rest, **named)
        return found

    monkeypatch.setattr(MODULES[kind], "fit_stage", written_down)
    data = demonstrations(tmp_path / "d.jsonl") if kind == "sft" else preferences(tmp_path / "p.jsonl")
    stage = {"data": str(data), "epochs": EPOCHS, "validation": 0.2, "batch": 5}
    straight = run_stage(base, tmp_path / "straight", kind, **stage)
    wanted, rows = list(seen), straight.data_report["train_rows"]
    assert rows % 5, "the last steps must be ragged"
    seen.clear()
    for stop_at in (1, 2, 4, 5):
        with pytest.raises(Interrupted):
            run_stage(base, tmp_path / "resumed", kind, stop_at=stop_at, **stage)
    run_stage(base, tmp_path / "resumed", kind, **stage)
    assert seen == wanted
    for epoch in range(EPOCHS):
        counts = Counter(seen[epoch * rows : (epoch + 1) * rows])
        doubled, left_out = sum(n - 1 for n in counts.values()), rows - len(counts)
        assert f"{doubled} doubled, {left_out} left out" == "0 doubled, 0 left out"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_stage_may_have_a_seed_of_its_own(kind: str, base: BaseModel, tmp_path: Path) -> None:
    """The same as a recipe's seed of that number; data is read by the recipe's, so that repetitions share their rows."""
    data = demonstrations(tmp_path / "d.jsonl") if kind == "sft" else preferences(tmp_path / "p.jsonl")
    ends = {}
    for name, recipe_seed, own in (("recipe", 7, None), ("own", 3, 7), ("other", 3, None)):
        extra = {} if own is None else {"own_seed": own}
        run_stage(base, tmp_path / name, kind, seed=recipe_seed, data=str(data), epochs=2, validation=0.0, **extra)
        ends[name] = digest(tmp_path / name)["published"]
    assert ends["own"] == ends["recipe"]
    assert ends["other"] != ends["recipe"]

"""A run that was stopped and resumed is the run that was never stopped, bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_stages import demonstrations, digest, preferences, run_stage

from posttrain.errors import Interrupted
from posttrain.models.base_model import BaseModel

STEPS = 14  # 12 training rows of 14, four and a half epochs of three or four steps
CHOICES = {"keep": "best", "patience": 9, "validate_every": 2, "validation": 0.2, "epochs": 4.5, "checkpoint_every": 3}
DROPOUT: dict[str, Any] = {"dropout": 0.3}
FULL: dict[str, Any] = {"kind": "full"}


def settings(kind: str, folder: Path) -> dict[str, Any]:
    data = demonstrations(folder / "d.jsonl") if kind == "sft" else preferences(folder / "p.jsonl")
    return {"data": str(data), **CHOICES}


CASES = [
    pytest.param(kind, adapter, id=f"{kind}-{name}")
    for kind, name, adapter in (
        ("sft", "full", FULL), ("sft", "lora-dropout", DROPOUT), ("dpo", "full", FULL), ("dpo", "lora-dropout", DROPOUT),
        ("reward", "full", FULL), ("reward", "lora-dropout", DROPOUT),
    )
]  # fmt: skip


@pytest.mark.parametrize("kind, adapter", CASES)
def test_0_of_10_random_stops_change_the_run(kind: str, adapter: dict[str, Any], base: BaseModel, tmp_path: Path):
    stage = settings(kind, tmp_path)
    straight = run_stage(base, tmp_path / "straight", kind, adapter=adapter, **stage)
    wanted = digest(tmp_path / "straight")
    stops = random.Random(f"{kind}{adapter}").sample(range(1, straight.fit.steps), 10)
    different = 0
    for k in stops:
        folder = tmp_path / f"stopped-{k}"
        with pytest.raises(Interrupted, match=f"stopped after step {k} of {straight.fit.steps}"):
            run_stage(base, folder, kind, adapter=adapter, stop_at=k, **stage)
        resumed = run_stage(base, folder, kind, adapter=adapter, **stage)
        assert resumed.fit.steps == straight.fit.steps
        different += digest(folder) != wanted
    assert f"{different} of {len(stops)}" == "0 of 10"

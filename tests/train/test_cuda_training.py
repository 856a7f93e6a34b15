"""Training on a GPU against training on the CPU. Run on a machine with a GPU: `pytest -m gpu`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import demonstrations, newest, preferences, rows_of, run_stage

from posttrain.cli import main
from posttrain.errors import Interrupted
from posttrain.models.base_model import load_base

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
TINY = Path(__file__).parents[2] / "recipes/tiny.toml"


def curve(folder: Path, kind: str) -> list[float]:
    return [row[f"{kind}/loss"] for row in rows_of(folder)]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_losses_are_those_of_the_cpu(stage: str, kind: str, tmp_path: Path, own_cache: None) -> None:
    data = (demonstrations if stage == "sft" else preferences)(tmp_path / "rows.jsonl")
    curves = []
    for device in ("cpu", "cuda"):
        base = load_base("random:tiny", template="gemma", dtype="float32", device=device, full=kind == "full")
        adapter: dict[str, Any] = {"kind": kind}
        run_stage(base, tmp_path / device, stage, adapter=adapter, data=str(data), epochs=3, validation=0)
        curves.append(torch.tensor(curve(tmp_path / device, stage)))
    assert torch.allclose(curves[0], curves[1], atol=1e-4), (curves[0] - curves[1]).abs().max()
    assert curves[1][-1] < curves[1][0]


def test_mixed_precision_learns_what_float32_learns(tmp_path: Path, own_cache: None) -> None:
    data = demonstrations(tmp_path / "rows.jsonl")
    curves = []
    for dtype in ("float32", "bfloat16"):
        base = load_base("random:tiny", template="gemma", dtype=dtype, device="cuda", full=True)
        run_stage(base, tmp_path / dtype, "sft", adapter={"kind": "full"}, data=str(data), epochs=4, validation=0)
        curves.append(torch.tensor(curve(tmp_path / dtype, "sft")))
        assert all(p.dtype == torch.float32 for p in base.model.parameters())
    assert torch.allclose(curves[0], curves[1], rtol=0.02), (curves[0] / curves[1] - 1).abs().max()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_stage_goes_on(kind: str, tmp_path: Path, own_cache: None) -> None:
    data = str(demonstrations(tmp_path / "rows.jsonl"))
    weights = []
    for stops in ((), (2, 5)):
        base = load_base("random:tiny", template="gemma", dtype="float32", device="cuda", full=kind == "full")
        folder = tmp_path / f"stops-{len(stops)}"
        for step in stops:
            with pytest.raises(Interrupted):
                run_stage(base, folder, "sft", adapter={"kind": kind}, data=data, epochs=3, stop_at=step)
        run_stage(base, folder, "sft", adapter={"kind": kind}, data=data, epochs=3)
        weights.append(newest(folder).tensors)
    for name, tensor in weights[0].items():
        if not name.startswith("random"):
            assert torch.allclose(tensor.float(), weights[1][name].float(), atol=1e-6), name


def test_the_tiny_recipe_runs_from_base_to_report(tmp_path: Path, own_cache: None) -> None:
    run = tmp_path / "run"
    arguments = ["run", str(TINY), "--out", str(run), "--set", 'base.device="cuda"', "--set", "evaluation.limit=4"]
    assert main(arguments) == 0
    assert (run / "report.html").is_file()
    stages = json.loads((run / "scorecard.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["base", "sft", "dpo", "ppo"]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert main(arguments) == 0  # nothing to do
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.name != ".lock")

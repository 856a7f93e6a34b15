"""Our side of a race, one process: prints losses, units (tokens or pairs) and seconds of each step, and peak memory."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rollouts import MODEL, device, peak_gib


def versions() -> dict[str, str]:
    """What ran."""
    return {name: version(name) for name in ("posttrain", "torch", "transformers")}


def train(race: str, folder: Path, dtype: str) -> dict[str, Any]:
    """The steps of a workload through the same tasks and loop that `posttrain run` uses."""
    from posttrain.data.prepare import PairRow, TrainRow
    from posttrain.data.rankings import rank_prompts
    from posttrain.models.adapter_files import load_adapter
    from posttrain.models.base_model import load_base
    from posttrain.stages.dpo import DpoStage
    from posttrain.stop import StopSignal
    from posttrain.train.dpo import dpo_task, reference_logprobs
    from posttrain.train.loop import fit
    from posttrain.train.reward import reward_task
    from posttrain.train.schedule import LoopSettings, step_rows
    from posttrain.train.sft import sft_task
    from posttrain.train.stage import TrainedPolicy

    work = json.loads((folder / "workload.json").read_text())
    base = load_base(MODEL, dtype=dtype)
    adapter = load_adapter(folder / "adapter", "policy", base)
    adapter.requires_grad_(True)
    policy = TrainedPolicy("policy", adapter.parameters(), lambda _: None)
    settings = LoopSettings(
        epochs=1, batch=work["rows"], learning_rate=work["rate"], schedule="constant", warmup=0.0, weight_decay=0.0, clip=1.0,
        keep="last", patience=0, validate_every=0, checkpoint_every=0, checkpoint_minutes=1e9, seed=0,
    )  # fmt: skip
    count = len(work["train"])
    # The loop shuffles; hand it the rows so that its order is the workload's.
    place = [i for step in range(work["steps"]) for i in step_rows(step, count, settings)]
    rows: list[Any] = [None] * count
    for row, index in zip(work["train"], place, strict=True):
        rows[index] = TrainRow(**row) if race == "sft" else PairRow(**row)
    before = 0.0
    if race == "sft":
        task = sft_task(base, policy, rows, [])
        units = [sum(len(rows[i].ids) for i in step_rows(s, count, settings)) for s in range(work["steps"])]
    elif race == "reward":
        task, units = reward_task(base, policy, rank_prompts(rows), [], center=0.0), [work["rows"]] * work["steps"]
    else:
        started = time.perf_counter()
        reference = reference_logprobs(base, "base", rows, folder, StopSignal())
        before = (time.perf_counter() - started) / work["steps"]  # the reference is part of the work
        stage = DpoStage(kind="dpo", name="dpo", data="", beta=work["beta"])
        task = dpo_task(base, policy, stage, rows, [], reference)
        units = [work["rows"]] * work["steps"]
    fit(task, settings, folder, label=race, stop=StopSignal())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [m[f"{race}/loss"] for m in metrics],
        "units": units,
        "seconds": [m["time/step"] + before for m in metrics],
        "peak_gib": peak_gib(),
        "setting": f"{str(base.dtype).removeprefix('torch.')} packed, {device()}",
        "versions": versions(),
    }


def quickstart(folder: Path, recipe: Path) -> dict[str, Any]:
    """A whole run by the command's own entry."""
    from posttrain.cli import main

    started = time.perf_counter()
    code = main(["run", str(recipe), "--out", str(folder / "run"), "--json"])
    scorecard = json.loads((folder / "run/scorecard.json").read_text())
    return {
        "exit": code,
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "peak_gib": round(peak_gib(), 2),
        "threads": torch.get_num_threads(),
        "stages": [
            {"name": s["name"], **{k: [m["value"], m["low"], m["high"]] for k, m in s["measures"].items()}}
            for s in scorecard["stages"]
        ],
        "versions": versions(),
    }


if __name__ == "__main__":
    race = sys.argv[1]
    print(
        json.dumps(
            quickstart(Path(sys.argv[2]), Path(sys.argv[3]))
            if race == "quickstart"
            else train(race, Path(sys.argv[2]), sys.argv[3])
        )
    )

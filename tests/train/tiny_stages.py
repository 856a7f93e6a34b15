"""Whole training stages on the tiny model: a recipe in two lines, a stop at a chosen step, and what must be equal."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from posttrain.models.adapter_files import Policies, reload_base
from posttrain.models.base_model import BaseModel
from posttrain.recipe import parse_recipe
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import Checkpoint, load_newest
from posttrain.train.dpo import train_dpo
from posttrain.train.reward import train_reward
from posttrain.train.sft import train_sft
from posttrain.train.stage import StageContext, StageResult

WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "old",
    "new",
    "fast",
    "slow",
    "warm",
    "cold",
    "north",
    "south",
    "east",
    "west",
]


def demonstrations(path: Path, rows: int = 14) -> Path:
    """Conversations of different lengths, some with several turns."""
    found = []
    for i in range(rows):
        turns = [
            {"role": "user", "content": f"{WORDS[i % 15]} {i}?"},
            {"role": "assistant", "content": " ".join(WORDS[: 1 + i % 5])},
        ]
        turns += [{"role": "user", "content": "More."}, {"role": "assistant", "content": WORDS[-i % 15]}] if i % 4 == 3 else []
        found.append({"id": f"row-{i}", "messages": turns})
    return write_rows(path, found)


def preferences(path: Path, rows: int = 14) -> Path:
    """Pairs of different lengths: the chosen answer is in lower case, the rejected one in upper case."""
    found = []
    for i in range(rows):
        answer = " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3])
        found.append(
            {"id": f"pair-{i}", "prompt": f"{WORDS[i % 15]} {i}?", "chosen": answer, "rejected": answer.upper() + "!" * (i % 4)}
        )
    return write_rows(path, found)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class StopAt:
    """A tracker that asks the run to stop once a step is logged, as SIGTERM would."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, StopSignal()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Called after every step."""
        self.stop.asked |= step == self.step

    def close(self) -> None:
        """Nothing to close."""


def run_stage(
    base: BaseModel, folder: Path, kind: str, *, stop_at: int = 0, adapter: Any = None, seed: int = 3, recompute: bool = False,
    **stage: Any,
) -> StageResult:  # fmt: skip
    """Train one stage in `folder`, from the base, resuming what is there. Raises Interrupted when stopped."""
    adapter = {"rank": 4, **(adapter or {})}
    if adapter.get("kind") == "full":
        reload_base(base)
    own_seed = {"seed": stage.pop("own_seed")} if "own_seed" in stage else {}
    raw = {"kind": kind, "name": kind, "batch": 4, "learning_rate": 1e-3, **stage, **own_seed}
    base_settings = {"model": "random:tiny", "recompute": recompute}
    recipe = parse_recipe({"name": "t", "base": base_settings, "adapter": adapter, "stage": [raw], "seed": seed})
    folder.mkdir(parents=True, exist_ok=True)
    stopper = StopAt(stop_at)
    context = StageContext(base, Policies(base, folder.parent), recipe, folder, stopper.stop, (stopper,))
    (only,) = recipe.stage
    if only.kind == "sft":
        return train_sft(context, only)
    return train_dpo(context, only) if only.kind == "dpo" else train_reward(context, only)


def newest(folder: Path) -> Checkpoint:
    """The last checkpoint of a stage."""
    saved = load_newest(folder / "checkpoints")
    assert saved is not None
    return saved


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def digest(folder: Path) -> dict[str, Any]:
    """Everything that must be equal in two runs that are the same: a sha256 a tensor, counters, metrics."""
    tensors, state = newest(folder)
    counters = {k: v for k, v in state.items() if k not in ("seconds", "metrics", "best_metrics")}
    (published,) = folder.glob("*.safetensors")
    return {
        "tensors": hashes(tensors), "counters": counters, "rows": rows_of(folder), "published": hashes(load_file(published)),
    }  # fmt: skip


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A sha256 a tensor. (Not of files: safetensors writes metadata in no fixed order.)"""
    return {n: hashlib.sha256(t.detach().contiguous().view(-1).numpy().tobytes()).hexdigest() for n, t in tensors.items()}

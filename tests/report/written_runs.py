"""Runs written by hand: a few items whose sums can be done in the head, no model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from posttrain.artifacts import hash_file
from posttrain.evaluate.gain import published_gains
from posttrain.evaluate.run import write_scores
from posttrain.evaluate.scorecard import StageScores, build_scorecard
from posttrain.evaluate.suites import Measure, Task
from posttrain.records import Score

FOLLOWS = Measure("t/follows", ("t/follows",), "score", "share", "higher", "gain", "instructions followed", 0)
FACTS = Measure("t/facts", ("t/facts",), "score", "share", "higher", "capability", "facts", 1)
PROSE = Measure("t/prose", ("t/prose",), "score", "nats", "lower", "capability", "prose, nats a token", 2)
LENGTH = Measure("t/length", ("t/follows",), "tokens", "tokens", "lower", "", "tokens an answer", 3)
TASKS = (
    Task("t/follows", "generate", "checks", (), (FOLLOWS, LENGTH)),
    Task("t/facts", "choices", "choice", (), (FACTS,)),
    Task("t/prose", "perplexity", "nats", (), (PROSE,)),
)
N = 40


def scores(policy: str, *, follows: int, facts: int, prose: float = 3.0, tokens: float = 20.0, n: int = N) -> list[Score]:
    """The first `follows` of n items followed, the first `facts` answered; prose and tokens spread a little around a mean."""
    made = []
    for i in range(n):
        spread = (i % 5 - 2) / 100
        detail: dict[str, float | str | bool] = {"ended": True, "tokens": tokens + spread}
        made.append(Score(f"f{i}", "t/follows", "t/follows", policy, float(i < follows), "yes", f"do {i}", detail))
        made.append(Score(f"k{i}", "t/facts", "t/facts", policy, float(i < facts), "a", f"who {i}", {}))
        made.append(Score(f"p{i}", "t/prose", "t/prose", policy, prose + spread, "", f"text {i}", {}))
    return made


def write_run(
    run: Path, policies: Mapping[str, Sequence[Score]], stages: Sequence[Mapping[str, Any]] = (), **more: Any
) -> Path:
    """A run folder with these scores (`base` first) and stages (tables; `metrics`, `manifest`, `gold_rows` and
    `published_rows` are taken out).

    `settings` and `tokenizer` in `more` go into the manifests of the evaluations.
    """
    run.mkdir(parents=True)
    tables = [{"kind": "sft", "init": "base", **s} for s in stages] or [
        {"kind": "sft", "name": name, "init": "base", "data": "d.jsonl"} for name in policies if name != "base"
    ]
    for table in tables:
        _write_stage(run / table["name"], table)
    (run / "recipe.toml").write_text(tomli_w.dumps({"name": "hand", "base": {"model": "m"}, "stage": tables}))
    base = {"model": "m", "weights_hash": "w" * 64, "tokenizer_hash": more.get("tokenizer", "t"), "template": "gemma"}
    settings = {"suites": "s", "max_new_tokens": 64, "code": 1, **more.get("settings", {})}
    for name, made in policies.items():
        folder = run / "evaluate" / name
        folder.mkdir(parents=True)
        write_scores(folder / "scores.jsonl", made)
        rows = [{"prompt": "How?", "answer": f"{name} says so", "ended": True, "tokens": 3}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _manifest(folder, {"name": f"evaluate {name}", "stage": "evaluate", "policy": name, "settings": settings, "base": base})
    parents = {table["name"]: (table["kind"], table["init"]) for table in tables}
    scored = [StageScores(name, *parents.get(name, ("base", None)), made) for name, made in policies.items()]
    gains = published_gains(run / table["name"] for table in tables)
    (run / "scorecard.json").write_text(json.dumps(build_scorecard("hand", scored, TASKS, gains)))
    return run


def _write_stage(folder: Path, table: dict[str, Any]) -> None:
    """`manifest = None` in a table leaves the stage unmade."""
    metrics, manifest, gold_rows = table.pop("metrics", []), table.pop("manifest", {}), table.pop("gold_rows", [])
    published_rows = table.pop("published_rows", [])
    if manifest is None:
        return
    folder.mkdir()
    for name, rows in (("gold.jsonl", gold_rows), ("gold_published.jsonl", published_rows)):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    inputs = {table["init"]: f"print-{table['init']}"} if table["init"] != "base" else {}
    made = {
        "name": table["name"], "stage": table["kind"], "settings": {"stage": dict(table)}, "inputs": inputs,
        "base": {"model": "m"}, "data": {"d.jsonl": "h"}, "rows": {"d.jsonl": 7}, "seconds": 2.0, "steps": len(metrics),
        "tokens": 1000,
    }  # fmt: skip
    _manifest(folder, {**made, **manifest})


def _manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    whole = {"kind": "adapter", "fingerprint": f"print-{folder.name}", **manifest, "files": files}
    (folder / "manifest.json").write_text(json.dumps(whole))

"""Stages of rows written by hand: critique and revision, AI labels and contrast, with sums that can be done in the head."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from posttrain.artifacts import hash_file
from posttrain.constitution.principles import load_constitution

CONSTITUTION = """
name = "hand"
version = "3"
[[principle]]
id = "short"
title = "Answer in few words"
[[principle]]
id = "kind"
title = "Be kind"
[[principle]]
id = "no-violence"
title = "No violence"
tags = ["harm"]
"""
REFUSAL = "I cannot help with that."
LONG_REFUSAL = f"{REFUSAL} Sorry about it. Ask me something else."
HELP = "Here is what you can do today."
PROMPTS = {"p1": "violence", "p2": "violence", "p3": "", "p4": ""}
JUDGE = {"name": "policy:sft", "passes": True, "allowed_weak": False,
         "accuracy": {"value": 0.75, "low": 0.6, "high": 0.86, "n": 40}}  # fmt: skip
GATE = {"asked": 3, "decided": 2, "preferred": 2.0, "low": 0.3424, "high": 1.0, "passes": False}
AUDIT = {
    "judge": {"judge": "policy:sft", "kind": "local"}, "pairs": 40, "decided": 40, "passes": True,
    "accuracy": JUDGE["accuracy"], "consistency": {"value": 0.8, "low": 0.65, "high": 0.9, "n": 40},
}  # fmt: skip


def tables(folder: Path) -> list[dict[str, Any]]:
    """The stages of a recipe: sft, critique, sft on revisions, labels, contrast, dpo on both."""
    constitution, prompts = str(folder / "c.toml"), str(folder / "prompts.jsonl")
    return [
        {"kind": "sft", "name": "sft", "init": "base", "data": str(folder / "demos.jsonl")},
        {"kind": "critique", "name": "revised", "init": "sft", "data": prompts, "constitution": constitution,
         "leave_out": ["no-violence"]},
        {"kind": "sft", "name": "sl", "init": "sft", "data": ["stage:revised", str(folder / "demos.jsonl")]},
        {"kind": "label", "name": "ai", "init": "sl", "data": prompts, "constitution": constitution},
        {"kind": "contrast", "name": "pairs", "init": "sft", "data": prompts, "constitution": constitution},
        {"kind": "dpo", "name": "dpo", "init": "sl", "data": ["stage:ai", "stage:pairs"]},
    ]  # fmt: skip


def round_row(prompt: str, number: int, principle: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{prompt}/r{number}", "prompt_id": prompt, "category": PROMPTS.get(prompt, ""), "source": "prompts.jsonl",
        "round": number, "prompt": [{"role": "user", "content": f"Question {prompt}?"}], "answer": answer,
        "principle": principle, "detection": None, "critique": None, "revision": None, "outcome": "nothing found",
        "reason": "", "gate": None, "policy": "print-sft", "seed": 7, **more,
    }  # fmt: skip


def revised(critique: str, revision: str, detection: float, gate: float | None = None) -> dict[str, Any]:
    return {"outcome": "revised", "critique": critique, "revision": revision, "detection": detection, "gate": gate}


ROUNDS = [
    round_row("p1", 1, "short", "one two three four", **revised("Too long.", "one two", 0.9, 0.8)),
    round_row("p2", 1, "kind", "Take a knife.", **revised("Harmful.", REFUSAL, 0.7, 0.6)),
    round_row("p3", 1, "short", LONG_REFUSAL, detection=0.1),
    round_row("p4", 1, "kind", "", outcome="dropped", reason="an empty answer"),
    round_row("p1", 2, "kind", "one two", detection=0.2),
    round_row("p2", 2, "short", REFUSAL, detection=0.6, critique="c", revision="", outcome="dropped", reason="empty"),
    round_row("p3", 2, "kind", LONG_REFUSAL, **revised("It refuses.", HELP, 0.8)),
    round_row("p4", 2, "short", "", outcome="dropped", reason="an empty answer"),
]
REVISIONS = [
    {"id": r["id"], "prompt": r["prompt"], "completion": r["revision"], "principle": r["principle"], "round": r["round"]}
    for r in ROUNDS if r["outcome"] == "revised"
]  # fmt: skip


def vote(principle: str, weight: float, p: float | None, first: float | None, second: float | None) -> dict[str, Any]:
    why = "the orders contradict each other" if p is None else ""
    return {"principle": principle, "weight": weight, "probability": p, "first": first, "second": second, "why": why}


def judged(
    prompt: str, votes: Sequence[Mapping[str, Any]], p: float | None, human: float | None, outcome: str = "labelled"
) -> dict[str, Any]:
    return {
        "id": f"{prompt}/1-2", "prompt_id": prompt, "category": PROMPTS[prompt], "source": "prompts.jsonl",
        "prompt": [{"role": "user", "content": f"Question {prompt}?"}], "a": f"A of {prompt}", "b": f"B of {prompt}",
        "a_by": "sl", "b_by": "sft", "human": human, "votes": list(votes), "probability": p, "outcome": outcome,
        "reason": "" if outcome == "labelled" else "no decisive vote", "seed": 7,
    }  # fmt: skip


SILENT = [vote("b", 1.0, None, None, None), vote("c", 1.0, None, None, None)]
JUDGED = [
    judged("p1", [vote("a", 2.0, 0.8, 0.9, 0.7), vote("b", 1.0, 0.3, 0.4, 0.2), vote("c", 1.0, None, 0.6, 0.3)], 1.9 / 3, 1.0),
    judged("p2", [vote("a", 2.0, 0.4, 0.45, 0.35), vote("b", 1.0, 0.9, 0.95, 0.85), vote("c", 1.0, 0.7, 0.8, 0.6)], 0.6, 0.0),
    judged("p3", [vote("a", 2.0, 0.9, 0.9, 0.9), *SILENT], 0.9, None),
    judged("p4", [vote("a", 2.0, None, None, None), *SILENT], None, 1.0, "abstained"),
]
LABELS = [
    {"id": r["id"], "prompt": r["prompt"], "chosen": r["a"], "rejected": r["b"], "probability": r["probability"],
     "category": r["category"], "principles": ["a"]}
    for r in JUDGED if r["outcome"] == "labelled"
]  # fmt: skip
CONTRASTS = [
    {"id": "p1", "prompt": [{"role": "user", "content": "Question p1?"}], "chosen": REFUSAL, "rejected": "Yes it is.",
     "principles": ["short", "kind"]},
    {"id": "p3", "prompt": [{"role": "user", "content": "Question p3?"}], "chosen": "Yes.", "rejected": "Yes it is so.",
     "principles": ["kind"]},
]  # fmt: skip
DEMOS = [{"id": f"d{i}", "prompt": f"Say {i}.", "completion": f"{i}"} for i in range(1, 4)]


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path) -> None:
    """The constitution and the data files that the recipe names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "c.toml").write_text(CONSTITUTION, encoding="utf-8")
    lines(folder / "prompts.jsonl", [{"id": p, "prompt": f"Question {p}?", "category": c} for p, c in PROMPTS.items()])
    lines(folder / "demos.jsonl", DEMOS)


def write_stages(run: Path, folder: Path, **manifests: Mapping[str, Any]) -> None:
    """The folders of all stages; `manifests` changes fields of a stage's manifest by its name."""
    stages = {table["name"]: table for table in tables(folder)}
    judge = {"judge": JUDGE, "constitution": {"name": "hand", "version": "3", "fingerprint": _mark(folder)}}
    made: dict[str, tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]] = {
        "revised": ({"rows.jsonl": REVISIONS, "rounds.jsonl": ROUNDS}, {**judge, "gate": GATE}),
        "ai": ({"rows.jsonl": LABELS, "judged.jsonl": JUDGED}, judge),
        "pairs": ({"rows.jsonl": CONTRASTS}, {"pairs_dropped": {"with equal answers": 2}}),
    }
    for name, table in stages.items():
        files, more = made.get(name, ({}, {}))
        _write_stage(run / name, table, files, {**more, **manifests.get(name, {})})


def write_trail(run: Path, folder: Path, **manifests: Mapping[str, Any]) -> Path:
    """A whole run without scores: recipe, data files and stages."""
    write_files(folder)
    run.mkdir(parents=True)
    recipe = {"name": "trail", "base": {"model": "m"}, "stage": tables(folder)}
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
    write_stages(run, folder, **manifests)
    return run


def _mark(folder: Path) -> str:
    return load_constitution(str(folder / "c.toml")).fingerprint


def _write_stage(
    folder: Path, table: dict[str, Any], files: Mapping[str, Sequence[Mapping[str, Any]]], more: Mapping[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines(folder / name, rows)
    if "judge" in more:
        (folder / "judge_audit.json").write_text(json.dumps(AUDIT), encoding="utf-8")
    data = [table["data"]] if isinstance(table["data"], str) else table["data"]
    inputs = {table["init"]: f"print-{table['init']}"} if table["init"] != "base" else {}
    validation = {} if files else {"validation": 0.0}
    manifest = {
        "kind": "rows" if files else "adapter", "name": table["name"], "stage": table["kind"], "policy": table["name"],
        "fingerprint": f"print-{table['name']}", "settings": {"seed": 7, "stage": {**validation, **table}}, "inputs": inputs,
        "base": {"model": "m", "weights_hash": "w" * 64}, "seed": 7,
        "data": {path: hash_file(Path(path)) for path in data if not path.startswith("stage:")}, "rows": {}, "warnings": [],
        **more,
    }  # fmt: skip
    manifest["files"] = {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

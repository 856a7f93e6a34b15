"""`posttrain show`: a summary of a run, or a stage with its settings and its lineage.

Input: artifacts. Output: the data for `--json` and the text. A run shows its scorecard and its stages; a stage shows its
manifest and its lineage back to the data and the base.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.artifacts import EVALUATIONS, lineage, read_manifest, read_recipe
from posttrain.errors import ArtifactError
from posttrain.evaluate.table import format_table, loss_words
from posttrain.evaluate.tax import shown_losses
from posttrain.report import formatting
from posttrain.report.compare import compare
from posttrain.report.provenance import flat
from posttrain.report.run import read_scorecard, read_stages, stage_names

__all__ = ["compare", "show"]

_NAME = 14


def show(target: Path) -> tuple[dict[str, Any], str]:
    """Data and text of a run folder, or of a stage in it (also `base`).

    Raises ArtifactError if there is neither, or a file is missing or damaged.
    """
    if (target / "recipe.toml").is_file() or not (target.parent / "recipe.toml").is_file():
        return _show_run(target)
    return _show_base(target.parent) if target.name == "base" else _show_stage(target.parent, target.name)


def _show_run(run: Path) -> tuple[dict[str, Any], str]:
    recipe, _ = read_recipe(run)
    stages = [
        {"name": s.name, "kind": s.kind, "init": s.init, "status": s.status, "evaluated": _evaluated(run, s.name)}
        | {key: (s.manifest or {}).get(key) for key in ("steps", "tokens", "seconds", "fingerprint")}
        for s in read_stages(run, recipe)
    ]
    scorecard = read_scorecard(run) if (run / "scorecard.json").is_file() else None
    losses = shown_losses(scorecard["stages"]) if scorecard else []
    data = {"run": recipe.get("name", run.name), "losses": losses, "stages": stages, "scorecard": scorecard}
    width = shutil.get_terminal_size((120, 24)).columns
    table = format_table(scorecard, width=width) if scorecard else "no scorecard yet: no evaluation is finished"
    return data, f"{table}\n\n{_stage_table(stages)}"


def _evaluated(run: Path, name: str) -> bool:
    return read_manifest(run / EVALUATIONS / name) is not None


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    head = ("stage", "kind", "from", "status", "evaluated", "steps", "tokens", "time", "fingerprint")
    rows = [
        (str(s["name"]), str(s["kind"]), str(s["init"]), str(s["status"]), "yes" if s["evaluated"] else "no",
         formatting.plain(s["steps"]), formatting.plain(s["tokens"]),
         formatting.duration(s["seconds"]), str(s["fingerprint"] or "–"))
        for s in stages
    ]  # fmt: skip
    return formatting.aligned([head, *rows])


def _show_stage(run: Path, name: str) -> tuple[dict[str, Any], str]:
    recipe, _ = read_recipe(run)
    names = stage_names(recipe)
    manifest = read_manifest(run / name) if name in names else None
    if manifest is None:
        finished = ["base", *(n for n in names if read_manifest(run / n) is not None)]
        problem = "not finished" if name in names else "no stage of this run"
        raise ArtifactError(
            str(run / name), problem, allowed=f"there is: {', '.join(finished)}", do="finish the run with `posttrain run`"
        )
    chain = lineage(run, name)
    card = read_scorecard(run) if (run / "scorecard.json").is_file() else {"stages": []}
    losses = [row for row in shown_losses(card["stages"]) if row["stage"] == name]
    lines = [*_summary(manifest)]
    lines += ["", "significant losses", *(f"  {loss_words(row)}" for row in losses)] if losses else []
    lines += ["", "settings", *_indented(flat(manifest.get("settings", {})))]
    lines += ["", "final metrics", *_indented(flat(manifest.get("metrics", {})))] if manifest.get("metrics") else []
    lines += [f"\nwarning: {warning}" for warning in manifest.get("warnings", ())]
    lines += ["", "lineage, back to the base", *_lineage(chain, manifest.get("base", {}))]
    return {"manifest": manifest, "losses": losses, "lineage": chain}, "\n".join(lines)


def _show_base(run: Path) -> tuple[dict[str, Any], str]:
    manifest = read_manifest(run / EVALUATIONS / "base")
    if manifest is None:
        raise ArtifactError(str(run / "base"), "the base was not evaluated yet", do="run the recipe first")
    base = manifest.get("base", {})
    return {"base": base, "evaluation": manifest}, "\n".join([f"base {base.get('model', '')}", *_indented(flat(base))])


def _summary(manifest: Mapping[str, Any]) -> list[str]:
    rows = [
        ("artifact", f"{manifest.get('kind', '?')} {manifest['fingerprint']}"),
        ("stage", f"{manifest.get('name', '?')} ({manifest.get('stage', '?')})"),
        ("work", f"{formatting.plain(manifest.get('steps'))} steps, {formatting.plain(manifest.get('tokens'))} tokens, "
                 f"{formatting.duration(manifest.get('seconds'))}"),
        ("made with", f"posttrain {manifest.get('version', '?')} ({manifest.get('commit') or 'no commit'}), "
                      f"python {manifest.get('python', '?')}, {manifest.get('device', '?')}, {manifest.get('dtype', '?')}"),
        ("libraries", ", ".join(f"{name} {number}" for name, number in manifest.get("libraries", {}).items())),
        ("seed", formatting.plain(manifest.get("seed"))),
    ]  # fmt: skip
    return [f"{name:<{_NAME}}{value}" for name, value in rows]


def _indented(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _lineage(chain: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[str]:
    """Every artifact that a stage was made from, with the hashes and rows of its data: the stage first, the base last."""
    fingerprints = {str(manifest.get("name")): manifest["fingerprint"] for manifest in chain}
    lines = []
    for manifest in chain:
        inputs = manifest.get("inputs", {})
        lines.append(
            f"  {manifest.get('name')} ({manifest.get('stage')}) {manifest['fingerprint']} from {', '.join(inputs) or 'base'}"
        )
        for path, digest in manifest.get("data", {}).items():
            rows = manifest.get("rows", {}).get(path)
            lines.append(f"    data {path}: {formatting.plain(rows)} rows, sha256 {digest}")
        older = [name for name, fingerprint in inputs.items() if name in fingerprints and fingerprints[name] != fingerprint]
        lines += [f"    made from an earlier {name}: {inputs[name]}" for name in older]
    return [*lines, f"  base {base.get('model', '?')}: weights {base.get('weights_hash', '?')}"]

"""Read a run folder for the report, `show` and `compare`.

Input: artifacts. Output: one `RunRecord`. The recipe is read but not validated, so unknown kinds of stages load too. Every file
that a manifest names must exist and be readable. Not read: weights, scores of single items (`compare` reads them), and files
outside the run folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import EVALUATIONS, partial_folder, read_jsonl, read_manifest, read_recipe
from posttrain.constitution.trail_files import RowsStage, UnfinishedStage, read_rows_stage, read_unfinished
from posttrain.errors import ArtifactError
from posttrain.evaluate.gain import GOLD, PUBLISHED
from posttrain.file_types import check_metrics, check_scorecard
from posttrain.stages import makes

# The report reads the output of `posttrain evaluate --best-of … --out RUN/best-of/NAME`.
BEST_OF = "best-of"
_BEST_OF_KEYS = frozenset(["prompts", "samples", "policy", "reward"])
_PAIR = {"id", "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens"}
_RERUN = "run the recipe again"
# Measures of an evaluation by gold: one value per prompt, the mean and the standard error.
_GOLD_MEASURES = ("kl", "score", "gold")


class StageRecord(NamedTuple):
    """A stage of the recipe and its files. `manifest` is None if it is not finished."""

    name: str
    kind: str
    init: str
    data: tuple[str, ...]
    manifest: dict[str, Any] | None
    metrics: tuple[dict[str, Any], ...]
    data_report: dict[str, Any] | None
    status: str
    # PPO only: the evaluations that chose the policy, and those of the start and the chosen policy on fresh answers.
    gold: tuple[dict[str, Any], ...] = ()
    published: tuple[dict[str, Any], ...] = ()


class Policy(NamedTuple):
    """An evaluated policy: the manifest of its evaluation and its answers to the sample prompts."""

    name: str
    manifest: dict[str, Any]
    samples: tuple[dict[str, Any], ...]


class RewardModel(NamedTuple):
    """A measured reward model: its measures and the scored pairs."""

    name: str
    measures: dict[str, Any]
    pairs: tuple[dict[str, Any], ...] = ()


class RunRecord(NamedTuple):
    """The content of a run. `notes` are warnings for the reader."""

    name: str
    recipe: dict[str, Any]
    recipe_text: str
    scorecard: dict[str, Any]
    stages: tuple[StageRecord, ...]
    policies: tuple[Policy, ...]
    notes: tuple[str, ...]
    rewards: tuple[RewardModel, ...] = ()
    best_of: tuple[dict[str, Any], ...] = ()
    # Stages that make rows, with their records, and stages that asked a judge and were not finished.
    rows: tuple[RowsStage, ...] = ()
    unfinished_rows: tuple[UnfinishedStage, ...] = ()

    @property
    def base(self) -> str:
        """The base model's name as the recipe writes it."""
        table = self.recipe.get("base")
        return str(table.get("model", "base")) if isinstance(table, dict) else "base"


def load_run(folder: Path) -> RunRecord:
    """Read a run. Raises ArtifactError if it is not a run, has no scorecard yet, or a file is missing or damaged."""
    recipe, text = read_recipe(folder)
    scorecard = read_scorecard(folder)
    stages = read_stages(folder, recipe)
    names = ["base", *(stage.name for stage in stages if makes(stage.kind) == "policy")]
    models = [stage.name for stage in stages if makes(stage.kind) == "reward model"]
    policies = tuple(policy for name in names if (policy := _policy(folder / EVALUATIONS / name, name)) is not None)
    rewards = tuple(model for name in models if (model := _reward(folder / EVALUATIONS / name, name)) is not None)
    notes = _notes(scorecard, stages, policies)
    best_of = tuple(map(_best_of, sorted((folder / BEST_OF).glob("*/best_of.json"))))
    rows = tuple(made for stage in stages if (made := read_rows_stage(folder / stage.name)) is not None)
    begun = tuple(one for stage in stages if (one := read_unfinished(folder / stage.name, stage.kind)) is not None)
    return RunRecord(
        str(recipe.get("name", folder.name)), recipe, text, scorecard, stages, policies, notes, rewards, best_of, rows, begun
    )


def read_scorecard(folder: Path) -> dict[str, Any]:
    """The scorecard of a run. Raises ArtifactError if it is missing or damaged."""
    path = folder / "scorecard.json"
    if not path.is_file():
        raise ArtifactError(str(folder), "no scorecard.json: nothing was evaluated yet", do="run the recipe to its end")
    scorecard = _read_json(path)
    check_scorecard(scorecard, str(path), do=f"remove {path} and {_RERUN}")
    if not scorecard["stages"]:
        raise ArtifactError(str(path), "a scorecard without stages", do=f"remove {path} and {_RERUN}")
    return scorecard


def read_stages(folder: Path, recipe: Mapping[str, Any]) -> tuple[StageRecord, ...]:
    """The recipe's stages in order, finished or not. Raises ArtifactError for a file that is missing or damaged."""
    return tuple(_stage(folder / str(table["name"]), table) for table in recipe.get("stage", []))


def stage_names(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the recipe's stages in order."""
    return [str(table["name"]) for table in recipe.get("stage", [])]


def _stage(folder: Path, table: Mapping[str, Any]) -> StageRecord:
    manifest = read_manifest(folder)
    data = table.get("data", ())
    sources = (
        [data] if isinstance(data, str) else [source.get("path") if isinstance(source, dict) else source for source in data]
    )
    report = _read_json(_required_file(folder, "data_report.json")) if _has_file(folder, "data_report.json", manifest) else None
    metrics = _rows(folder, "metrics.jsonl") if _has_file(folder, "metrics.jsonl", manifest) else ()
    check_metrics(list(metrics), str(folder / "metrics.jsonl"), do=f"remove {folder} and {_RERUN}")
    gold, published = (_gold(folder, name) if _has_file(folder, name, manifest) else () for name in (GOLD, PUBLISHED))
    if manifest is not None:
        status = "finished"
    else:
        status = "unfinished" if partial_folder(folder).is_dir() else "not made yet"
    return StageRecord(
        str(table["name"]), str(table.get("kind", "stage")), str(table.get("init", "base")),
        tuple(str(source) for source in sources), manifest, metrics, report, status, gold, published,
    )  # fmt: skip


def _policy(folder: Path, name: str) -> Policy | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    samples = _rows(folder, "samples.jsonl") if _has_file(folder, "samples.jsonl", manifest) else ()
    return Policy(name, manifest, samples)


def _gold(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    """Evaluations of a PPO stage, all on the same prompts."""
    rows = _rows(folder, name)
    for row in rows:
        means = [row.get(f"{key}{end}") for key in _GOLD_MEASURES for end in ("", "_se")]
        lists = [row.get(f"{key}_B") for key in _GOLD_MEASURES]
        valid = isinstance(row.get("policy"), str) and isinstance(row.get("iteration"), int)
        valid &= all(isinstance(x, int | float) for x in means)
        valid &= all(isinstance(x, list) and len(x) == len(rows[0].get("gold_B", ())) > 0 for x in lists)
        if not valid or not all(isinstance(v, int | float) for x in lists for v in x or ()):
            raise ArtifactError(str(folder / name), "not rows of evaluations", do=f"remove {folder} and {_RERUN}")
    return rows


def _reward(folder: Path, name: str) -> RewardModel | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    pairs = _rows(folder, "pairs.jsonl") if _has_file(folder, "pairs.jsonl", manifest) else ()
    if not all(set(pair) >= _PAIR for pair in pairs):
        raise ArtifactError(str(folder / "pairs.jsonl"), "not scored pairs", do=f"remove {folder} and {_RERUN}")
    return RewardModel(name, _read_json(_required_file(folder, "reward.json")), pairs)


def _best_of(path: Path) -> dict[str, Any]:
    result = _read_json(path)
    if not result.get("best_of") or not result.keys() >= _BEST_OF_KEYS:
        raise ArtifactError(str(path), "not a result of best-of-n", do="measure it again with `posttrain evaluate … --best-of`")
    return result


def _has_file(folder: Path, name: str, manifest: Mapping[str, Any] | None) -> bool:
    """Whether a finished artifact has this file or names it."""
    return manifest is not None and (name in manifest.get("files", {}) or (folder / name).is_file())


def _required_file(folder: Path, name: str) -> Path:
    """The path of a file that must exist. Raises ArtifactError if it is missing."""
    path = folder / name
    if not path.is_file():
        raise ArtifactError(str(path), "is missing", do=f"remove {folder} and {_RERUN}")
    return path


def _rows(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    path = _required_file(folder, name)
    try:
        rows = tuple(read_jsonl(path))
    except (ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as JSON lines", do=f"remove {folder} and {_RERUN}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ArtifactError(str(path), "not rows of JSON objects", do=f"remove {folder} and {_RERUN}")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as JSON", do=f"remove {path.parent} and {_RERUN}") from None
    if not isinstance(value, dict):
        raise ArtifactError(str(path), "not a JSON object", do=f"remove {path.parent} and {_RERUN}")
    return value


def _notes(scorecard: Mapping[str, Any], stages: tuple[StageRecord, ...], policies: tuple[Policy, ...]) -> tuple[str, ...]:
    """Warnings about artifacts that are newer than the scorecard or were made from replaced inputs."""
    notes = []
    marks = set(scorecard.get("fingerprints", ()))
    finished = {stage.name: stage.manifest["fingerprint"] for stage in stages if stage.manifest}
    newer = [name for name, mark in finished.items() if marks and mark not in marks]
    newer += [f"the evaluation of {p.name}" for p in policies if marks and p.manifest["fingerprint"] not in marks]
    if newer:
        notes.append(f"Newer than this scorecard: {', '.join(newer)}. Run the recipe again.")
    for stage in stages:
        inputs = stage.manifest.get("inputs", {}) if stage.manifest else {}
        older = [name for name, mark in inputs.items() if name in finished and finished[name] != mark]
        if older:
            notes.append(f"{stage.name} was made from an earlier {', '.join(older)}. Run the recipe again.")
    unfinished = [f"{stage.name} ({stage.status})" for stage in stages if stage.manifest is None]
    if unfinished:
        notes.append(f"Unfinished stages: {', '.join(unfinished)}.")
    for stage in stages:
        warnings = stage.manifest.get("warnings", ()) if stage.manifest else ()
        notes += [f"{stage.name}: {warning}" for warning in warnings]
    return tuple(notes)

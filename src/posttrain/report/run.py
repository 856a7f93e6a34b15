"""A run folder read as data: what every section of the report, `show` and `compare` are drawn from.

Where it stands: artifacts in, one frozen `Run` out. Only the recipe's own words are read (not checked again), so a kind
of stage that this version does not know is loaded like any other. A file that a manifest names must be there and whole.
Left out: weights, scores of single items (`compare` reads those itself), and anything outside of the run folder.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import partial_folder, read_jsonl, read_manifest
from posttrain.errors import ArtifactError
from posttrain.evaluate.gain import GOLD, PUBLISHED
from posttrain.file_types import check_metrics, check_scorecard
from posttrain.stages import makes

EVALUATIONS = "evaluate"
# Where `posttrain evaluate --best-of … --out RUN/best-of/NAME` leaves what the report draws.
BEST_OF = "best-of"
_BEST_OF_KEYS = frozenset(["prompts", "samples", "policy", "reward"])
_PAIR = {"id", "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens"}
_AGAIN = "run the recipe again"
# What an evaluation by gold has of every prompt, and the mean and standard error of.
_MEASURED = ("kl", "score", "gold")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class Stage(NamedTuple):
    """A stage of the recipe and what it left. `manifest` is None where it is not finished."""

    name: str
    kind: str
    init: str
    data: tuple[str, ...]
    manifest: dict[str, Any] | None
    metrics: tuple[dict[str, Any], ...]
    data_report: dict[str, Any] | None
    status: str
    # Of a ppo stage: the evaluations that chose its policy, and those of start and chosen policy on fresh answers.
    gold: tuple[dict[str, Any], ...] = ()
    published: tuple[dict[str, Any], ...] = ()


class Policy(NamedTuple):
    """A policy that was evaluated: the manifest of its evaluation and its answers to the sample prompts."""

    name: str
    manifest: dict[str, Any]
    samples: tuple[dict[str, Any], ...]


class RewardModel(NamedTuple):
    """A reward model that was measured, what was found, and the scored pairs behind it."""

    name: str
    found: dict[str, Any]
    pairs: tuple[dict[str, Any], ...] = ()


class Run(NamedTuple):
    """Everything that a report says. `notes` are what a reader must know before trusting it."""

    name: str
    recipe: dict[str, Any]
    recipe_text: str
    scorecard: dict[str, Any]
    stages: tuple[Stage, ...]
    policies: tuple[Policy, ...]
    notes: tuple[str, ...]
    rewards: tuple[RewardModel, ...] = ()
    best_of: tuple[dict[str, Any], ...] = ()

    @property
    def base(self) -> str:
        """The base model's name as the recipe writes it."""
        table = self.recipe.get("base")
        return str(table.get("model", "base")) if isinstance(table, dict) else "base"


def load_run(folder: Path) -> Run:
    """Read a run. Raises ArtifactError where it is no run, has no scorecard yet, or a file is missing or damaged."""
    recipe, text = read_recipe(folder)
    scorecard = read_scorecard(folder)
    stages = read_stages(folder, recipe)
    names = ["base", *(stage.name for stage in stages if makes(stage.kind) == "policy")]
    models = [stage.name for stage in stages if makes(stage.kind) == "reward model"]
    policies = tuple(policy for name in names if (policy := _policy(folder / EVALUATIONS / name, name)) is not None)
    rewards = tuple(found for name in models if (found := _reward(folder / EVALUATIONS / name, name)) is not None)
    notes = _notes(scorecard, stages, policies)
    best_of = tuple(map(_best_of, sorted((folder / BEST_OF).glob("*/best_of.json"))))
    return Run(str(recipe.get("name", folder.name)), recipe, text, scorecard, stages, policies, notes, rewards, best_of)


def read_recipe(folder: Path) -> tuple[dict[str, Any], str]:
    """The recipe of a run as tables and as text. Raises ArtifactError where the folder is no run."""
    path = folder / "recipe.toml"
    try:
        text = path.read_text(encoding="utf-8")
        recipe = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(str(folder), "not a run folder", do="give a folder that `posttrain run` made") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise ArtifactError(str(path), "not readable as TOML", do=_AGAIN) from None
    tables = recipe.get("stage", [])
    # A name becomes a path: one of a run that came from elsewhere must not lead out of its folder.
    if not isinstance(tables, list) or not all(isinstance(t, dict) and _NAME.fullmatch(str(t.get("name"))) for t in tables):
        raise ArtifactError(str(path), "stages without a proper name", do=_AGAIN)
    return recipe, text


def read_scorecard(folder: Path) -> dict[str, Any]:
    """The scorecard of a run. Raises ArtifactError where there is none or it is damaged."""
    path = folder / "scorecard.json"
    if not path.is_file():
        raise ArtifactError(str(folder), "no scorecard.json: nothing was evaluated yet", do="run the recipe to its end")
    found = _read_json(path)
    check_scorecard(found, str(path), do=f"remove {path} and {_AGAIN}")
    if not found["stages"]:
        raise ArtifactError(str(path), "a scorecard of no stage", do=f"remove {path} and {_AGAIN}")
    return found


def read_stages(folder: Path, recipe: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The recipe's stages in order, finished or not. Raises ArtifactError for a file that is missing or damaged."""
    return tuple(_stage(folder / str(table["name"]), table) for table in recipe.get("stage", []))


def stage_names(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the recipe's stages in order."""
    return [str(table["name"]) for table in recipe.get("stage", [])]


def _stage(folder: Path, table: Mapping[str, Any]) -> Stage:
    manifest = read_manifest(folder)
    written = table.get("data", ())
    sources = [written] if isinstance(written, str) else [one.get("path") if isinstance(one, dict) else one for one in written]
    report = _read_json(_named(folder, "data_report.json")) if _kept(folder, "data_report.json", manifest) else None
    metrics = _rows(folder, "metrics.jsonl") if _kept(folder, "metrics.jsonl", manifest) else ()
    check_metrics(list(metrics), str(folder / "metrics.jsonl"), do=f"remove {folder} and {_AGAIN}")
    gold, published = (_gold(folder, name) if _kept(folder, name, manifest) else () for name in (GOLD, PUBLISHED))
    if manifest is not None:
        status = "finished"
    else:
        status = "unfinished" if partial_folder(folder).is_dir() else "not made yet"
    return Stage(
        str(table["name"]), str(table.get("kind", "stage")), str(table.get("init", "base")),
        tuple(str(source) for source in sources), manifest, metrics, report, status, gold, published,
    )  # fmt: skip


def _policy(folder: Path, name: str) -> Policy | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    samples = _rows(folder, "samples.jsonl") if _kept(folder, "samples.jsonl", manifest) else ()
    return Policy(name, manifest, samples)


def _gold(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    """Evaluations of a ppo stage, each of the same prompts."""
    rows = _rows(folder, name)
    for row in rows:
        means = [row.get(f"{key}{end}") for key in _MEASURED for end in ("", "_se")]
        lists = [row.get(f"{key}_B") for key in _MEASURED]
        whole = isinstance(row.get("policy"), str) and isinstance(row.get("iteration"), int)
        whole &= all(isinstance(x, int | float) for x in means)
        whole &= all(isinstance(x, list) and len(x) == len(rows[0].get("gold_B", ())) > 0 for x in lists)
        if not whole or not all(isinstance(v, int | float) for x in lists for v in x or ()):
            raise ArtifactError(str(folder / name), "not rows of evaluations", do=f"remove {folder} and {_AGAIN}")
    return rows


def _reward(folder: Path, name: str) -> RewardModel | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    pairs = _rows(folder, "pairs.jsonl") if _kept(folder, "pairs.jsonl", manifest) else ()
    if not all(set(pair) >= _PAIR for pair in pairs):
        raise ArtifactError(str(folder / "pairs.jsonl"), "not scored pairs", do=f"remove {folder} and {_AGAIN}")
    return RewardModel(name, _read_json(_named(folder, "reward.json")), pairs)


def _best_of(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    if not found.get("best_of") or not found.keys() >= _BEST_OF_KEYS:
        raise ArtifactError(str(path), "not best-of-n", do="measure it again with `posttrain evaluate … --best-of`")
    return found


def _kept(folder: Path, name: str, manifest: Mapping[str, Any] | None) -> bool:
    """Whether a finished artifact has this file, or ought to."""
    return manifest is not None and (name in manifest.get("files", {}) or (folder / name).is_file())


def _named(folder: Path, name: str) -> Path:
    """A file that a manifest names."""
    path = folder / name
    if not path.is_file():
        raise ArtifactError(str(path), "is missing", do=f"remove {folder} and {_AGAIN}")
    return path


def _rows(folder: Path, name: str) -> tuple[dict[str, Any], ...]:
    path = _named(folder, name)
    try:
        rows = tuple(read_jsonl(path))
    except (ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as JSON lines", do=f"remove {folder} and {_AGAIN}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ArtifactError(str(path), "not rows of JSON objects", do=f"remove {folder} and {_AGAIN}")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as JSON", do=f"remove {path.parent} and {_AGAIN}") from None
    if not isinstance(found, dict):
        raise ArtifactError(str(path), "not a JSON object", do=f"remove {path.parent} and {_AGAIN}")
    return found


def _notes(scorecard: Mapping[str, Any], stages: tuple[Stage, ...], policies: tuple[Policy, ...]) -> tuple[str, ...]:
    """What was made again after the scorecard, or out of something that is not there any more."""
    notes = []
    marks = set(scorecard.get("fingerprints", ()))
    made = {stage.name: stage.manifest["fingerprint"] for stage in stages if stage.manifest}
    newer = [name for name, mark in made.items() if marks and mark not in marks]
    newer += [f"the evaluation of {p.name}" for p in policies if marks and p.manifest["fingerprint"] not in marks]
    if newer:
        notes.append(f"Made after this scorecard, which does not know of it: {', '.join(newer)}. Run the recipe again.")
    for stage in stages:
        inputs = stage.manifest.get("inputs", {}) if stage.manifest else {}
        older = [name for name, mark in inputs.items() if name in made and made[name] != mark]
        if older:
            notes.append(f"{stage.name} was made from an earlier {', '.join(older)}. Run the recipe again.")
    undone = [f"{stage.name} ({stage.status})" for stage in stages if stage.manifest is None]
    if undone:
        notes.append(f"Not all of the recipe is done: {', '.join(undone)}.")
    for stage in stages:
        warnings = stage.manifest.get("warnings", ()) if stage.manifest else ()
        notes += [f"{stage.name}: {warning}" for warning in warnings]
    return tuple(notes)

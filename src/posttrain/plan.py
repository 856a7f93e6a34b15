"""Plan a run: every step with its fingerprint, and whether the step is done, resumes or is due.

`pipeline.py` runs these steps; `--dry-run` prints them. This module does not import torch, so that a run with nothing to do
returns in a second. The fingerprint of a step is a hash of its settings, its inputs and the version of its code. A step whose
published artifact has the same fingerprint is skipped.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from posttrain.artifacts import EVALUATIONS, fingerprint, partial_folder, read_manifest
from posttrain.data.chat import TEMPLATES
from posttrain.data.sources import data_hashes
from posttrain.evaluate.suites import Task, evaluation_prompts, first_items, load_suites, suite_fingerprint
from posttrain.judge.function_source import source_hash
from posttrain.models.source import BaseModelFolder, locate_base, pinned
from posttrain.recipe import Recipe
from posttrain.stages import KINDS, Stage, data_of, row_stages, with_rows_of
from posttrain.stages.kind import Preparation, load_function

# Increase a number when the code of that step gives other results for the same input. Stages have version numbers in `stages/`.
STEP_VERSIONS = {"evaluate": 1, "measure": 2}
# The file of a partial folder that records the fingerprint of its step.
WORKING_ON = "working_on.json"

Status = Literal["done", "resume", "due"]


class Step(NamedTuple):
    """One artifact to make: the artifact of a stage, or the scores of a policy or reward model."""

    name: str
    kind: str
    policy: str
    stage: Stage | None
    folder: Path
    fingerprint: str
    # Fingerprints of the input artifacts, by name.
    inputs: dict[str, str]
    data: dict[str, str]
    settings: dict[str, Any]
    status: Status
    why: str
    # Unfinished work resumes if it has this hash: the fingerprint without the sources of reward functions.
    work: str


class Plan(NamedTuple):
    """All steps of a run in order."""

    run: Path
    recipe: Recipe
    source: BaseModelFolder
    tasks: tuple[Task, ...]
    evaluation_prompts: frozenset[str]
    steps: tuple[Step, ...]

    @property
    def data(self) -> dict[str, str]:
        """sha256 of every data source by path."""
        return {path: digest for step in self.steps for path, digest in step.data.items()}

    @property
    def preparation(self) -> Preparation:
        """How the data of this run is rendered."""
        return Preparation(self.recipe.seed, self.evaluation_prompts, self.source.context())

    @property
    def due(self) -> tuple[Step, ...]:
        """The steps that the run will work on."""
        return tuple(step for step in self.steps if step.status != "done")


def make_plan(recipe: Recipe, run: Path, *, until: str | None = None) -> Plan:
    """The steps of a recipe in a run folder. Steps after the stage `until` are included only if they are done.

    Raises PosttrainError for a base, a suite or data that does not exist.
    """
    recipe = recipe.model_copy(update={"stage": tuple(with_rows_of(stage, run) for stage in recipe.stage)})
    whole = load_suites(recipe.evaluation.suites)
    tasks = first_items(whole, recipe.evaluation.limit)
    # Training leaves out the prompts of all evaluation items, including items beyond the limit.
    prompts = evaluation_prompts(whole)
    source = locate_base(pinned(recipe.base.model, run))
    base_print = fingerprint(_base_identity(recipe, source))
    known = {"base": base_print}
    suites, prompts_hash = suite_fingerprint(tasks), fingerprint(sorted(prompts))
    hashes: dict[str, str] = {}
    steps = [_evaluation_step(recipe, run, suites, "base", base_print)]
    later = False
    for stage in recipe.stage:
        step = _stage_step(recipe, run, stage, known, prompts_hash, hashes)
        known[stage.name] = step.fingerprint
        made = [step]
        if KINDS[stage.kind].makes == "policy":
            made.append(_evaluation_step(recipe, run, suites, stage.name, step.fingerprint))
        elif KINDS[stage.kind].makes == "reward model":
            made.append(_measuring_step(run, stage, step.fingerprint))
        steps += [entry for entry in made if not later or step.status == entry.status == "done"]
        later |= stage.name == until
    return Plan(run, recipe, source, tasks, prompts, tuple(steps))


def _base_identity(recipe: Recipe, source: BaseModelFolder) -> list[str]:
    base = recipe.base
    path = source.folder / "chat_template.jinja"  # not covered by the hash of the tokenizer
    has_own = base.template == "auto" and path.exists()
    template = path.read_text(encoding="utf-8") if has_own else TEMPLATES.get(base.template, "")
    return [source.weights_hash, source.tokenizer_hash, base.template, template, base.dtype]


def _stage_step(
    recipe: Recipe, run: Path, stage: Stage, known: dict[str, str], prompts_hash: str, hashes: dict[str, str]
) -> Step:
    """`known` has the fingerprints of the base and of earlier stages, `prompts_hash` is that of the evaluation prompts.
    `hashes` caches the hashes of data."""
    kind = KINDS[stage.kind]
    reads = kind.reads(stage)
    inputs = {name: known[name] for name in sorted({*reads.policies, *reads.reward_models, *row_stages(stage)})}
    data: dict[str, str] = {}
    for sources in data_of(stage).values():
        data |= data_hashes(sources, hashes)
    if kind.documents is not None:
        data |= load_function(kind.documents)(stage)
    settings = {
        "stage": stage.effective(),
        "adapter": recipe.adapter.model_dump(mode="json"),
        "seed": recipe.seed,
        "evaluation_prompts": prompts_hash,
        "code": kind.code,
    }
    work = fingerprint({"settings": settings, "inputs": {**inputs, "base": known["base"]}, "data": data})
    functions = sorted(function.name for function in reads.functions)
    settings |= {"functions": {name: source_hash(name) for name in functions}} if functions else {}
    mark = fingerprint({"settings": settings, "inputs": {**inputs, "base": known["base"]}, "data": data})
    status, why = _status(run / stage.name, mark, settings, inputs, data, work)
    manifest = read_manifest(run / stage.name) if status == "done" else None
    if manifest is not None and (refused := kind.refuses(stage, manifest)):
        status, why = "due", refused
    return Step(stage.name, stage.kind, stage.name, stage, run / stage.name, mark, inputs, data, settings, status, why, work)


def _evaluation_step(recipe: Recipe, run: Path, suites: str, policy: str, policy_print: str) -> Step:
    settings = {
        "suites": suites,
        "max_new_tokens": recipe.evaluation.max_new_tokens,
        "sample_tokens": recipe.evaluation.sample_tokens,
        "samples": list(recipe.evaluation.samples),
        "seed": recipe.seed,
        "code": STEP_VERSIONS["evaluate"],
    }
    mark = fingerprint({"settings": settings, "policy": policy_print})
    folder = run / EVALUATIONS / policy
    inputs = {policy: policy_print}
    status, why = _status(folder, mark, settings, inputs, {})
    return Step(f"evaluate {policy}", "evaluate", policy, None, folder, mark, inputs, {}, settings, status, why, mark)


def _measuring_step(run: Path, stage: Stage, mark_of_stage: str) -> Step:
    """The step that measures a reward model on the held-out pairs of its stage."""
    settings = {"code": STEP_VERSIONS["measure"]}
    mark = fingerprint({"settings": settings, "reward": mark_of_stage})
    folder, inputs = run / EVALUATIONS / stage.name, {stage.name: mark_of_stage}
    status, why = _status(folder, mark, settings, inputs, {})
    return Step(f"measure {stage.name}", "measure", stage.name, None, folder, mark, inputs, {}, settings, status, why, mark)


def _status(
    folder: Path, mark: str, settings: dict[str, Any], inputs: dict[str, str], data: dict[str, str], work: str | None = None
) -> tuple[Status, str]:
    manifest = read_manifest(folder)
    if manifest is not None and manifest["fingerprint"] == mark:
        missing = [name for name in manifest.get("files", {}) if not (folder / name).is_file()]
        return ("due", f"{missing[0]} is missing") if missing else ("done", "its manifest matches")
    unfinished_work = unfinished(folder)
    if unfinished_work == (work or mark):
        return "resume", "unfinished work is there"
    if manifest is None:
        return "due", "starts again: the unfinished work has other settings or data" if unfinished_work else "not made yet"
    changed = _differences(manifest.get("settings", {}), settings)
    changed += [f"input {name}" for name, value in inputs.items() if manifest.get("inputs", {}).get(name) != value]
    changed += [f"data {name}" for name, value in data.items() if manifest.get("data", {}).get(name) != value]
    return "due", f"changed: {', '.join(changed[:4]) or 'the base or its template'}"


def unfinished(folder: Path) -> str | None:
    """The fingerprint of the unfinished work on a step, or None."""
    try:
        marker = json.loads((partial_folder(folder) / WORKING_ON).read_text(encoding="utf-8"))
        return str(marker["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted names of the settings that differ, with both values if they are short."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(before.keys() | after.keys())
        return [d for n in names for d in _differences(before.get(n), after.get(n), f"{path}.{n}".lstrip("."))]
    if before == after:
        return []
    values = f" {before} → {after}"
    return [path.removeprefix("stage.") + (values if len(values) < 40 else "")]

"""Run a plan: the only module that knows the order of the stages. Each step of the plan makes one artifact.

    recipe -> plan -> [evaluate base] -> stage -> [evaluate it] -> ... -> scorecard.json -> report.html

Heavy modules are imported only when a step is due, so a finished run returns in a second. A step is built in a hidden sibling
folder that records the fingerprint of the step. A kill leaves that folder, and the next run resumes from its checkpoints.
"""

import contextlib
import ctypes
import gc
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain import __version__
from posttrain.artifacts import (
    EVALUATIONS,
    disk_error,
    is_disk_error,
    os_error_in,
    partial_folder,
    publish,
    recover,
    verify_files,
    write_bytes,
    write_json,
    write_jsonl,
)
from posttrain.errors import ArtifactError, Interrupted, ModelError, MovedError, RecipeError, nearest
from posttrain.evaluate.gain import published_gains
from posttrain.evaluate.scorecard import StageScores, build_scorecard, load_scores
from posttrain.locks import HeldFolder, run_lock
from posttrain.plan import WORKING_ON, Plan, Step, make_plan, unfinished
from posttrain.recipe import Recipe
from posttrain.stages import KINDS, ROWS_FILE, Stage, row_stages
from posttrain.stages.kind import Outcome, load_function
from posttrain.stop import StopSignal
from posttrain.terminal import say
from posttrain.waiting_threads import sleep_while_waiting

if TYPE_CHECKING:
    from posttrain.models.adapter_files import Policies

# Files that a step needs only while it runs. They are not part of the artifact.
SCRATCH = ("checkpoints", WORKING_ON)


class RunOutcome(NamedTuple):
    """What `run_recipe` did."""

    worked: int
    scorecard: dict[str, Any]
    report: Path


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    """The run folder of a recipe: `out`, or `runs/NAME`."""
    return out if out is not None else Path("runs") / recipe.name


def check_until(recipe: Recipe, until: str | None) -> None:
    """Raises RecipeError if `until` is not a stage of the recipe."""
    names = [stage.name for stage in recipe.stage]
    if until is not None and until not in names:
        found = f'"{until}" is not a stage'
        raise RecipeError("--until", found, allowed=f"there is: {', '.join(names)}", do=nearest(until, names))


def run_recipe(recipe: Recipe, recipe_text: str, run: Path, *, until: str | None = None) -> RunOutcome:
    """Make every missing artifact of a recipe, then the scorecard and the report.

    Raises PosttrainError for mistakes that the user can correct, and Interrupted after a request to stop (state is saved).
    """
    check_until(recipe, until)
    sleep_while_waiting()
    try:
        with StopSignal().installed() as stop:
            fresh = not run.exists()
            if fresh:  # a mistake in the recipe creates no folder
                _check_data(make_plan(recipe, run, until=until))
            with run_lock(run) as locked, _report_moves(locked):
                for folder in (run, run / EVALUATIONS):
                    recover(folder, scratch=SCRATCH)
                plan = make_plan(recipe, run, until=until)
                if plan.due:
                    if not fresh:
                        _check_data(plan)
                    write_bytes(run / "recipe.toml", recipe_text.encode())
                    _run_due_steps(plan, stop, locked)
                locked.check()
                return _finish(plan)
    except OSError as error:
        if is_disk_error(error):
            raise disk_error(run, error) from error
        raise


@contextlib.contextmanager
def _report_moves(locked: HeldFolder) -> Iterator[None]:
    """Replace errors of the file system by MovedError if the run folder was renamed or removed."""
    try:
        yield
    except MovedError:
        raise
    except (OSError, ArtifactError):
        locked.check()
        raise


def _run_due_steps(plan: Plan, stop: StopSignal, locked: HeldFolder) -> None:
    """Load the base once, then run the steps that are due. Raises Interrupted between steps after a request to stop."""
    say(f"loading {plan.recipe.base.model}")
    from safetensors import SafetensorError

    from posttrain.kernels import advice
    from posttrain.models.adapter_files import Policies
    from posttrain.models.base_model import load_base
    from posttrain.models.source import pinned
    from posttrain.models.untrained_tokens import token_ids, untrained_tokens

    recipe = plan.recipe
    settings, full = recipe.base, recipe.adapter.kind == "full"
    base = load_base(
        pinned(settings.model, plan.run), template=settings.template, dtype=settings.dtype, device=settings.device, full=full
    )
    if base.source.weights_hash != plan.source.weights_hash:
        raise ModelError(
            f'[base] model = "{settings.model}"', "its weights were changed after the run was planned",
            do="run the same command again",
        )  # fmt: skip
    if (note := advice(base.dtype, base.device)) is not None:
        say(f"note: {note}")
    policies = Policies(base, plan.run)
    token_ids(base, recipe.adapter.train_tokens)  # reports a token that is not in the vocabulary before training
    for warning in () if full else untrained_tokens(base, recipe.adapter.train_tokens):
        say(f"warning: {warning}")
    for step in plan.due:
        if stop.asked:
            raise Interrupted(f"stopped before {step.name}; run the same command to go on")
        try:
            _run_step(plan, step, policies, stop, locked)
        except SafetensorError as error:  # reports a disk error only in its message
            disk = os_error_in(str(error))
            if disk is None:
                raise
            raise disk_error(step.folder, disk) from error


def _run_step(plan: Plan, step: Step, policies: "Policies", stop: StopSignal, locked: HeldFolder) -> None:
    """Build one step in a new or unfinished folder and publish it. Raises ArtifactError if the run folder was moved."""
    started = time.monotonic()
    locked.check()
    folder = _open_partial(step)
    if step.stage is not None:
        extra = _run_stage(plan, step, folder, policies, stop)
    else:
        work = _measure if step.kind == "measure" else _evaluate
        extra = work(plan, step, folder, policies, stop)
    manifest = _manifest(plan, step, policies, extra, time.monotonic() - started)
    locked.check()
    publish(folder, step.folder, manifest, scratch=SCRATCH)
    _release_memory()


def _release_memory() -> None:
    """Return freed memory to the system. Otherwise glibc keeps the fragments, and they add to the peak of the next step."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _check_data(plan: Plan) -> None:
    """Render the data of every stage that is due, and import its reward functions, so that mistakes in a late stage appear
    before the first stage trains.

    Raises DataError as the stage would, and RecipeError for a function that does not exist.
    """
    if not any(step.stage for step in plan.due):
        return
    say("checking the data")
    from posttrain.data.doctor import prepare_stage
    from posttrain.data.sources import hashes_in, refuse_changed
    from posttrain.judge.functions import check_function
    from posttrain.models.base_model import load_chat

    chat = load_chat(plan.source, plan.recipe.base.template)
    due = {step.name for step in plan.due}
    for step in plan.due:
        if step.stage is None:
            continue
        kind = KINDS[step.stage.kind]
        if not due & set(row_stages(step.stage)):  # rows that this run has still to make are checked later
            report = prepare_stage(step.stage, chat, plan.preparation).report
            refuse_changed(hashes_in(report), step.data)
            for warning in (*report["warnings"], *kind.warnings(step.stage)):
                say(f"warning: {step.name}: {warning}")
        for function in kind.reads(step.stage).functions:
            planned = step.settings["functions"][function.name]
            check_function(function.name, timeout=function.timeout, where=f'stage "{step.name}"', planned=planned)


def _open_partial(step: Step) -> Path:
    """The hidden folder in which a step is built. A folder with another fingerprint is removed first."""
    folder = partial_folder(step.folder)
    if unfinished(step.folder) != step.work:
        shutil.rmtree(folder, ignore_errors=True)
    for new in (folder.parent, folder):  # never the run folder itself
        new.mkdir(exist_ok=True)
    write_json(folder / WORKING_ON, {"fingerprint": step.work})
    return folder


def _run_stage(plan: Plan, step: Step, folder: Path, policies: "Policies", stop: StopSignal) -> dict[str, Any]:
    """Run one stage. Returns the fields of its manifest that the plan does not have."""
    from posttrain.progress import open_trackers
    from posttrain.train.checkpoint import Owner
    from posttrain.train.stage import StageContext

    stage = step.stage
    assert stage is not None
    say(f"{step.name}: {step.why}")
    for name in row_stages(stage):
        verify_files(plan.run / name, (ROWS_FILE,))
    trackers = open_trackers(
        plan.recipe.trackers, folder=plan.run, run=plan.recipe.name, stage=step.name, settings=step.settings
    )
    with contextlib.closing(HeldFolder(folder)) as partial:
        context = StageContext(
            policies.base, policies, plan.recipe, folder, stop, trackers, plan.evaluation_prompts, Owner(step.work, partial),
            step.settings.get("functions", {}), plan.data,
        )  # fmt: skip
        outcome: Outcome = load_function(KINDS[stage.kind].run)(context, stage)
    for warning in outcome.warnings:
        say(f"warning: {warning}")
    return {**outcome.manifest, "warnings": list(outcome.warnings)}


def _evaluate(plan: Plan, step: Step, folder: Path, policies: "Policies", stop: StopSignal) -> dict[str, Any]:
    """Score one policy on every task and generate its answers to the sample prompts."""
    from posttrain.evaluate.run import answer_samples, evaluate_policy, write_scores

    recipe = plan.recipe
    adapter = policies.activate(step.policy)
    scores = evaluate_policy(
        policies.base, adapter, step.policy, plan.tasks, max_new_tokens=recipe.evaluation.max_new_tokens, seed=recipe.seed,
        label=f"evaluate {step.policy}", stop=stop,
    )  # fmt: skip
    write_scores(folder / "scores.jsonl", scores)
    samples = answer_samples(
        policies.base, adapter, recipe.evaluation.samples or sample_prompts(plan), seed=recipe.seed,
        max_new_tokens=recipe.evaluation.sample_tokens,
    )  # fmt: skip
    write_jsonl(folder / "samples.jsonl", samples)
    return {"items": len(scores)}


def _measure(plan: Plan, step: Step, folder: Path, policies: "Policies", stop: StopSignal) -> dict[str, Any]:
    """Score the pairs that a reward model was not trained on."""
    from posttrain.data.doctor import prepare_stage
    from posttrain.data.prepare import PreparedPairs
    from posttrain.data.rankings import rank_prompts
    from posttrain.data.sources import hashes_in, refuse_changed
    from posttrain.evaluate.pairs import describe
    from posttrain.evaluate.reward_model import measure_reward_model, write_measured

    (stage,) = (entry.stage for entry in plan.steps if entry.stage is not None and entry.name == step.policy)
    base = policies.base
    prepared = prepare_stage(stage, base.chat, plan.preparation)
    assert isinstance(prepared, PreparedPairs)
    refuse_changed(hashes_in(prepared.report), plan.data)
    adapter = policies.activate(step.policy)
    measured = measure_reward_model(base, adapter, rank_prompts(prepared.validation), label=step.name, stop=stop)
    write_measured(folder, measured)
    if measured.found["pairs"]:
        say(f"{step.policy}: {describe(measured.found)}")
    return {"items": measured.found["pairs"]}


def sample_prompts(plan: Plan) -> tuple[str, ...]:
    """The prompts that every policy answers side by side."""
    from posttrain.evaluate.suites import sample_prompts as of_tasks

    return of_tasks(plan.tasks)


def _manifest(plan: Plan, step: Step, policies: "Policies", extra: dict[str, Any], seconds: float) -> dict[str, Any]:
    kind = "scores" if step.stage is None else artifact_kind(step.stage, full=plan.recipe.adapter.kind == "full")
    report = partial_folder(step.folder) / "data_report.json"
    data_report = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    sources = [*data_report.get("sources", []), *data_report.get("ptx", {}).get("sources", [])]
    rows = {source["path"]: source["rows"] for source in sources}
    # The plan has no hashes of rows that earlier stages make.
    read = {source["path"]: source["sha256"] for source in sources}
    base = policies.base
    return {
        "kind": kind, "name": step.name, "stage": step.kind, "policy": step.policy, "fingerprint": step.fingerprint,
        "settings": step.settings, "inputs": step.inputs, "base": base.identity(), "data": {**read, **step.data}, "rows": rows,
        **environment(base.device.type, str(base.dtype)), "seed": plan.recipe.seed, "seconds": round(seconds, 1), **extra,
    }  # fmt: skip


def artifact_kind(stage: Stage, *, full: bool) -> str:
    """The `kind` in the manifest of a stage's artifact."""
    words = {"policy": "weights" if full else "adapter", "reward model": "reward", "rows": "rows"}
    return words[KINDS[stage.kind].makes]


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Versions and machine, as needed to reproduce the run."""
    libraries = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    return {
        "version": __version__, "commit": _commit(), "libraries": {name: version(name) for name in libraries},
        "python": platform.python_version(), "machine": platform.machine(), "device": device,
        "dtype": dtype.removeprefix("torch."),
    }  # fmt: skip


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" if files were changed, or None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None  # installed: a repository around it belongs to another project
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _finish(plan: Plan) -> RunOutcome:
    """Write the scorecard and the report from the artifacts. They are rewritten only if something changed."""
    scored = [step for step in plan.steps if step.kind == "evaluate"]
    stages = []
    for step in scored:
        kind, parent = stage_kind(plan.recipe, step.policy)
        verify_files(step.folder, ("scores.jsonl",))
        stages.append(StageScores(step.policy, kind, parent, load_scores(step.folder / "scores.jsonl")))
    worked = len(plan.due)
    path, report = plan.run / "scorecard.json", plan.run / "report.html"
    marks = [step.fingerprint for step in plan.steps]
    scorecard = _read_scorecard(path)
    if worked or scorecard is None or scorecard.get("fingerprints") != marks:
        gains = published_gains(step.folder for step in plan.steps if step.stage is not None)
        scorecard = {**build_scorecard(plan.recipe.name, stages, plan.tasks, gains), "fingerprints": marks}
        report.unlink(missing_ok=True)  # first: a report must never be older than the scorecard beside it
        write_json(path, scorecard)
    if not report.exists():
        from posttrain.report.render import write_report

        write_report(plan.run)
    return RunOutcome(worked, scorecard, report)


def _read_scorecard(path: Path) -> dict[str, Any] | None:
    try:
        scorecard = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return scorecard if isinstance(scorecard, dict) else None


def stage_kind(recipe: Recipe, policy: str) -> tuple[str, str | None]:
    """The kind of a policy's stage and the policy that it started from."""
    for stage in recipe.stage:
        if stage.name == policy:
            return stage.kind, stage.init
    return "base", None

"""A whole run through the command line on the tiny model: once, again, changed, cut short, killed, moved, damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.artifacts import lineage, read_manifest
from posttrain.cli import main
from posttrain.locks import run_lock
from posttrain.models.base_model import BaseModel
from tiny_runs import TINY, command, content, copied_run, finished_run, plan_of, posttrain, undisturbed_run, weights

STEPS = ["evaluate base", "sft", "evaluate sft", "dpo", "evaluate dpo", "rm", "measure rm", "ppo", "evaluate ppo"]


def test_a_run_leaves_a_folder_that_explains_itself():
    names = set(content(finished_run()))
    stage = {"manifest.json", "metrics.jsonl", "data_report.json", "adapter_model.safetensors", "adapter_config.json"}
    scored = {"manifest.json", "scores.jsonl", "samples.jsonl"}
    assert names == (
        {"recipe.toml", "scorecard.json", "report.html"}
        | {f"{s}/{n}" for s in ("sft", "dpo", "rm", "ppo") for n in stage}
        | {"ppo/samples.jsonl", "ppo/gold.jsonl", "ppo/gold_published.jsonl"}
        | {f"evaluate/{p}/{n}" for p in ("base", "sft", "dpo", "ppo") for n in scored}
        | {f"evaluate/rm/{n}" for n in ("manifest.json", "reward.json", "pairs.jsonl")}
    )
    scorecard = json.loads((finished_run() / "scorecard.json").read_text())
    assert [(s["name"], s["kind"], s["parent"]) for s in scorecard["stages"]] == [
        ("base", "base", None), ("sft", "sft", "base"), ("dpo", "dpo", "sft"), ("ppo", "ppo", "sft"),
    ]  # fmt: skip
    changes = scorecard["stages"][2]["measures"]["starter/facts"]["changes"]
    assert [c["against"] for c in changes] == ["sft", "base"]


def test_a_manifest_says_all_that_is_needed_to_make_it_again(tiny: BaseModel):
    found = {name: read_manifest(finished_run() / name) for name in ("sft", "dpo", "evaluate/base", "evaluate/dpo")}
    dpo = found["dpo"]
    assert dpo is not None
    assert (dpo["kind"], dpo["stage"], dpo["name"], dpo["policy"], dpo["seed"]) == ("adapter", "dpo", "dpo", "dpo", 0)
    assert dpo["settings"]["stage"]["beta"] == 0.1
    assert dpo["settings"]["adapter"]["rank"] == 4
    assert dpo["inputs"] == {"sft": found["sft"]["fingerprint"]}
    assert dpo["base"] == tiny.identity()
    assert set(dpo["base"]) == {"model", "weights_hash", "tokenizer_hash", "template", "template_hash"}
    (path,) = dpo["data"]
    assert path == "starter/preferences.jsonl"
    assert len(dpo["data"][path]) == 64
    lines = (Path(sys.modules["posttrain"].__file__).parent / path).read_text().splitlines()
    assert dpo["rows"] == {path: len(lines)}
    assert dpo["libraries"].keys() == {"torch", "transformers", "safetensors", "tokenizers", "numpy"}
    assert dpo["version"]
    assert dpo["device"] == "cpu"
    assert dpo["dtype"] in ("float32", "bfloat16")
    assert dpo["seconds"] > 0
    assert dpo["tokens"] > 0
    assert {"dpo/loss", "dpo/margin"} <= dpo["metrics"].keys()
    assert dpo["commit"] is None or len(dpo["commit"].removesuffix("-dirty")) == 40
    assert set(dpo["files"]) == {"metrics.jsonl", "data_report.json", "adapter_model.safetensors", "adapter_config.json"}
    assert found["evaluate/dpo"]["inputs"] == {"dpo": dpo["fingerprint"]}
    assert found["evaluate/base"]["kind"] == "scores"
    assert [m["name"] for m in lineage(finished_run(), "dpo")] == ["dpo", "sft"]


def test_again_does_nothing_and_says_so_without_torch():
    before = content(finished_run())
    code = (
        "import sys; from posttrain.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(TINY), "--out", str(finished_run())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == f"{finished_run()}: nothing to do, every stage is finished"
    assert last == "[]"
    assert content(finished_run()) == before


def test_a_dry_run_writes_nothing_and_shows_rows_tokens_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert main(["run", str(TINY), "--out", str(run), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not run.exists()
    for step in STEPS:
        assert any(line.startswith(f"{step} ") and "not made yet" in line for line in text.splitlines())
    assert main(["run", str(TINY), "--out", str(run), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [s["step"] for s in plan["steps"]] == STEPS
    assert plan["steps"][0]["rows"] == 56  # 7 tasks of 8 items
    told = [s for s in plan["steps"] if s["kind"] != "measure"]
    assert all(s["rows"] > 0 and s["tokens"] > s["rows"] and s["seconds"] >= 0 for s in told)
    # two layers of 2 (64·64 + 64·32) + 3 · 64·128, and 263 rows of 64
    assert plan["parameters"] == 2 * (2 * (64 * 64 + 64 * 32) + 3 * 64 * 128) + 263 * 64
    assert not run.exists()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_says_what_a_compiler_would_save_where_there_is_none(dtype: str, tmp_path: Path) -> None:
    more = ("--set", f"base.dtype={dtype}", "--until", "sft")
    for compiler, said in (("/nowhere/cc", dtype == "bfloat16"), (os.environ.get("CC", "cc"), None)):
        done = posttrain(*command(tmp_path / str(said), *more), env={"CC": compiler})
        assert done.returncode == 0
        assert ("note: no working C compiler" in done.stderr) == bool(said)


def test_only_what_depends_on_a_changed_setting_is_made_again(capsys: pytest.CaptureFixture[str]):
    run = finished_run()
    assert set(plan_of(capsys, run).values()) == {("done", "its manifest matches")}
    assert plan_of(capsys, run, "--set", "dpo.beta=0.2") == {
        "evaluate base": ("done", "its manifest matches"),
        "sft": ("done", "its manifest matches"),
        "evaluate sft": ("done", "its manifest matches"),
        "dpo": ("due", "changed: beta 0.1 → 0.2"),
        "evaluate dpo": ("due", "changed: input dpo"),
        "rm": ("done", "its manifest matches"),
        "measure rm": ("done", "its manifest matches"),
        "ppo": ("done", "its manifest matches"),
        "evaluate ppo": ("done", "its manifest matches"),
    }
    changed = plan_of(capsys, run, "--set", "sft.epochs=0.2")
    assert changed["evaluate base"] == ("done", "its manifest matches")
    assert changed["sft"] == ("due", "changed: epochs 0.1 → 0.2")
    assert changed["dpo"] == ("due", "changed: input sft")
    for scored in (
        "evaluation.max_new_tokens=8",
        "evaluation.sample_tokens=8",
        'evaluation.samples=["Hi"]',
        "evaluation.limit=4",
    ):
        changed = plan_of(capsys, run, "--set", scored)
        assert [name for name, (status, _) in changed.items() if status == "due"] == [s for s in STEPS if "evaluate" in s]
    for harmless in (
        "sft.checkpoint_every=7", "sft.checkpoint_minutes=1", "name=other", 'trackers=["tensorboard"]', "base.recompute=true",
    ):  # fmt: skip
        assert {status for status, _ in plan_of(capsys, run, "--set", harmless).values()} == {"done"}
    assert {status for status, _ in plan_of(capsys, run, "--set", "base.template=chatml").values()} == {"due"}
    assert {status for status, _ in plan_of(capsys, run, "--set", "seed=1").values()} == {"due"}


def test_unfinished_work_for_other_settings_is_told_before_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run/.sft.partial").mkdir(parents=True)
    (tmp_path / "run/.sft.partial/working_on.json").write_text('{"fingerprint": "of another learning rate"}')
    plan = plan_of(capsys, tmp_path / "run")
    assert plan["sft"] == ("due", "starts again: the unfinished work has other settings or data")
    assert plan["dpo"] == ("due", "not made yet")


def test_changed_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]}
    Path("d.jsonl").write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i in range(4)))
    Path("one.toml").write_text(
        'name = "one"\n[base]\nmodel = "random:tiny"\ntemplate = "gemma"\n[evaluation]\nlimit = 1\nmax_new_tokens = 1\n'
        'samples = ["Hi"]\nsample_tokens = 1\n[[stage]]\nkind = "sft"\nname = "sft"\ndata = "d.jsonl"\nvalidation = 0.0\n'
    )
    assert main(["run", "one.toml"]) == 0
    assert (tmp_path / "runs" / "one" / "report.html").exists()
    assert {s for s, _ in plan_of(capsys, Path("runs/one"), recipe=Path("one.toml")).values()} == {"done"}
    Path("d.jsonl").write_text(json.dumps(row) + "\n")
    assert plan_of(capsys, Path("runs/one"), recipe=Path("one.toml"))["sft"] == ("due", "changed: data d.jsonl")


def test_until_stops_after_a_stage_and_a_finished_run_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert main(command(run, "--until", "sft", "--json")) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)["stages"]] == ["base", "sft"]
    assert not (run / "dpo").exists()
    assert main(command(run)) == 0
    before = content(run)
    assert main(command(run, "--until", "sft", "--json")) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out.split("report: ")[-1].split("\n", 1)[1])["stages"]] == [
        "base", "sft", "dpo", "ppo",
    ]  # fmt: skip
    assert content(run) == before


def test_the_same_recipe_twice_gives_the_same_bits(tmp_path: Path):
    assert main(command(tmp_path / "again")) == 0
    assert weights(tmp_path / "again") == weights(undisturbed_run())


KILLED = """
import importlib, os, signal, sys
from posttrain.cli import main
module = importlib.import_module("posttrain.{module}")
real, left = module.{name}, {after}
def killed(*arguments, **keywords):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.{signal})
    return real(*arguments, **keywords)
module.{name} = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        ("train.step", "TrainingSteps.optimise", 4),
        pytest.param("evaluate.run", "answer_samples", 2, marks=pytest.mark.slow),
        pytest.param("train.step", "TrainingSteps.optimise", 2, marks=pytest.mark.slow),
        pytest.param("train.checkpoint", "fsync_tree", 1, marks=pytest.mark.slow),
        pytest.param("evaluate.run", "write_scores", 0, marks=pytest.mark.slow),
        pytest.param("artifacts", "_move_into_place", 1, marks=pytest.mark.slow),
        pytest.param("pipeline", "build_scorecard", 0, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_the_run_goes_on_to_the_same_bits(tmp_path: Path, module: str, name: str, after: int):
    more = ("--set", "sft.checkpoint_every=1", "--set", "dpo.checkpoint_every=1")
    code = KILLED.format(module=module, name=name, after=after, signal="SIGKILL")
    done = subprocess.run([sys.executable, "-c", code, *command(tmp_path / "run", *more)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run" / "scorecard.json").exists()
    assert main(command(tmp_path / "run", *more)) == 0
    assert weights(tmp_path / "run") == weights(undisturbed_run())
    assert not [p for p in (tmp_path / "run").rglob(".*") if p.name != ".lock"]


def test_sigterm_saves_ends_with_0_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code = KILLED.format(module="train.step", name="TrainingSteps.optimise", after=1, signal="SIGTERM")
    done = subprocess.run([sys.executable, "-c", code, *command(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "sft: stopped after step 2 of 3; run the same command to go on"
    assert main(command(tmp_path / "run")) == 0
    errors = capsys.readouterr().err
    assert "sft: unfinished work is there" in errors
    assert "sft 1/3" not in errors
    assert weights(tmp_path / "run") == weights(undisturbed_run())


@pytest.mark.slow
def test_sigterm_before_the_first_step_and_in_an_evaluation_ends_with_0(tmp_path: Path):
    for module, name in (("models.load", "load_base"), ("evaluate.run", "generate")):
        code = KILLED.format(module=module, name=name, after=0, signal="SIGTERM")
        done = subprocess.run([sys.executable, "-c", code, *command(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "run the same command to go on" in done.stderr.splitlines()[-1]
        assert not (tmp_path / name / "scorecard.json").exists()


MOVED = """
import importlib, os, shutil, sys
from posttrain.cli import main
module = importlib.import_module("posttrain.{module}")
real, left = module.{name}, {after}
def moved(*arguments, **keywords):
    global left
    left -= 1
    if left == -1:
        {how}
    return real(*arguments, **keywords)
module.{name} = moved
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "name", "after", "how"),
    [
        pytest.param("train.step", "TrainingSteps.optimise", 1, "os.rename('run', 'moved')", marks=pytest.mark.slow),
        pytest.param("train.step", "TrainingSteps.optimise", 1, "shutil.rmtree('run')", marks=pytest.mark.slow),
        ("evaluate.run", "answer_samples", 1, "os.rename('run', 'moved'); os.mkdir('run')"),
    ],
    ids=["renamed", "removed", "replaced"],
)
def test_a_run_folder_that_goes_while_it_works_ends_the_run_by_name(
    module: str, name: str, after: int, how: str, tmp_path: Path
):
    code = MOVED.format(module=module, name=name, after=after, how=how)
    steps = ("--set", "sft.checkpoint_every=1")
    done = subprocess.run(
        [sys.executable, "-c", code, *command(Path("run"), *steps)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    if "rmtree" in how:
        assert (
            last
            == "error: run/.sft.partial · was removed while this process worked in it · run the same command to begin again"
        )
        assert list(tmp_path.iterdir()) == []
        return
    if "mkdir" in how:
        assert last.startswith("error: run · was renamed, and another folder has its name while")
        assert list((tmp_path / "run").iterdir()) == []
    else:
        kept = tmp_path / "moved/.sft.partial/checkpoints/step-00000001"
        assert last.startswith(
            f"error: run/.sft.partial · was renamed while this process worked in it · the last checkpoint is {kept}"
        )
        assert not (tmp_path / "run").exists()
    assert main(command(tmp_path / "moved")) == 0
    assert weights(tmp_path / "moved") == weights(undisturbed_run())


def test_a_second_run_on_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copied_run(tmp_path / "run")
    capsys.readouterr()
    with run_lock(run):
        assert main(["run", str(TINY), "--out", str(run), "--set", "seed=1"]) == 2
    assert capsys.readouterr().err == (
        f"error: {run} · another posttrain process works on this run · wait for it, or choose another folder with --out\n"
    )
    assert content(run) == content(finished_run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.suites=[\"strter\"]", '[evaluation] suites · "strter" is not a suite · there is: starter'),
        ("sft.data=none.jsonl", 'data "none.jsonl" · there is no such file'),
        ("dpo.data=starter/nothing.jsonl", 'data "starter/nothing.jsonl" · no such starter file'),
        ("base.model=no-model", '[base] model = "no-model" · neither a folder'),
        ("base.model=random:huge", '[base] model = "random:huge" · no random model "huge" · there is: random:tiny'),
    ],
)  # fmt: skip
def test_what_a_recipe_names_and_is_not_there_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
):
    for more in ((), ("--dry-run",)):
        assert main(command(tmp_path / "run", "--set", change, *more)) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
        assert list(tmp_path.iterdir()) == []


def test_bad_rows_of_the_last_stage_are_refused_before_the_first_one_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "Hi", "chosen": "same", "rejected": "same"}\n' * 5)
    assert main(command(tmp_path / "run", "--set", f"dpo.data={data}")) == 2
    assert "5 rows" in capsys.readouterr().err
    assert not (tmp_path / "run" / "sft").exists()
    assert not (tmp_path / "run" / "evaluate").exists()


@pytest.mark.slow
def test_0_of_20_kills_at_any_moment_change_a_bit(tmp_path: Path):
    """The process dies after a random time; the next goes on, until one ends."""
    import random

    random.seed(0)
    more = ("--set", "sft.checkpoint_every=1", "--set", "dpo.checkpoint_every=1")
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *command(tmp_path / "whole", *more)], capture_output=True, check=True
    )
    whole = time.monotonic() - started  # how long it takes on this machine: kills fall anywhere inside
    kills, runs = 0, 0
    while kills < 20:
        run = tmp_path / str(runs)
        runs += 1
        for patience in (0.9, 0.9, 0.9, 1000.0):
            process = subprocess.Popen(
                [sys.executable, "-m", "posttrain.cli", *command(run, *more)],
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            try:
                assert process.wait(timeout=random.uniform(0.3, patience) * whole) == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        assert weights(run) == weights(undisturbed_run())

"""Progress lines, metrics.jsonl and trackers."""

import io
import json
import math
import os
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.progress import Metrics, Progress, open_trackers


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep."""
        self.rows.append((step, metrics))

    def close(self) -> None:
        """Note it."""
        self.closed = True


def rows_of(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_readable_while_the_run_goes_on(tmp_path: Path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.log(1, {"sft/loss": 0.1 + 0.2})
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "sft/loss": 0.1 + 0.2}]
    metrics.close()


def test_what_is_not_finite_becomes_null_and_no_tracker_sees_it(tmp_path: Path):
    tracker = Kept()
    metrics = Metrics(tmp_path / "metrics.jsonl", trackers=(tracker,))
    metrics.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    metrics.close()
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.5}]
    assert tracker.rows == [(1, {"d": 1.5})]
    assert tracker.closed


def test_a_resumed_run_has_each_step_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (1, 2, 3, 4):
        metrics.log(step, {"x": float(step)})
    metrics.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "x": 5.')  # torn by a kill
    metrics = Metrics(path, resume_step=2)
    metrics.log(3, {"x": 30.0})
    metrics.close()
    assert [(r["step"], r["x"]) for r in rows_of(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_kill_while_resuming_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file is replaced, never emptied and written again: at the moment before the new name all old rows stand."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n', encoding="utf-8")
    before: list[int] = []
    replace = os.replace

    def seen(source: str, target: str) -> None:
        before.append(len(rows_of(path)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    Metrics(path, resume_step=1).close()
    assert before == [2]
    assert len(rows_of(path)) == 1


def test_a_new_run_starts_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n', encoding="utf-8")
    Metrics(path).close()
    assert path.read_text(encoding="utf-8") == ""


def test_elsewhere_than_on_a_terminal_a_line_is_printed_every_tenth():
    stream = io.StringIO()
    progress = Progress("sft", 1000, stream=stream)
    for _ in range(1000):
        progress.update(tokens=7, loss=1.23456)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11  # the first step and every tenth
    assert lines[0].startswith("sft 1/1000 · loss 1.235 · ")
    assert " tokens/s · " in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("sft 1000/1000")
    assert not lines[-1].endswith("left")


def test_on_a_terminal_one_line_is_rewritten():
    stream = Terminal()
    progress = Progress("sft", 3, stream=stream)
    for _ in range(3):
        progress.update()
    said = stream.getvalue()
    assert said.count("\r\x1b[2K") == 3
    assert said.count("\n") == 1
    assert said.endswith("\n")


def test_a_resumed_run_counts_from_where_it_was():
    stream = io.StringIO()
    Progress("dpo", 10, done=8, stream=stream).update()
    assert stream.getvalue().startswith("dpo 9/10 · ")


def test_work_of_no_items_is_no_division_by_zero():
    stream = io.StringIO()
    Progress("evaluate", 0, stream=stream).update(0)
    assert stream.getvalue().startswith("evaluate 0/1")


def test_no_tracker_is_no_import(tmp_path: Path):
    assert open_trackers((), folder=tmp_path, run="r", stage="s", settings={}) == ()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_a_mistake_in_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)  # as if it were not installed
    with pytest.raises(RecipeError, match=rf'trackers · "{name}" is not installed · pip install "posttrain\[trackers\]"'):
        open_trackers((name,), folder=tmp_path, run="r", stage="s", settings={})


def test_tensorboard_keeps_every_value(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(("tensorboard",), folder=tmp_path, run="r", stage="sft", settings={"epochs": 1})
    metrics = Metrics(tmp_path / "metrics.jsonl", trackers=(tracker,))
    for step, value in ((1, 0.5), (2, math.nan), (3, 0.25)):
        metrics.log(step, {"sft/loss": value})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("sft/loss")] == [(1, 0.5), (3, 0.25)]

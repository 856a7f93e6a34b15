"""Progress lines and metrics: a progress line on a terminal, a line per tenth of the work elsewhere, and metrics.jsonl.

Trackers are optional (TensorBoard, Weights & Biases, MLflow). Their libraries are imported only if the recipe names them.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from posttrain.artifacts import write_bytes
from posttrain.errors import RecipeError
from posttrain.terminal import printable


class Tracker(Protocol):
    """An additional destination of metrics."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Flush and close."""


class Metrics:
    """Appends rows to metrics.jsonl and sends them to trackers. On resume, rows after the resumed step are removed."""

    def __init__(self, path: Path, *, resume_step: int = 0, trackers: tuple[Tracker, ...] = ()) -> None:
        lines = [line for line in _whole_lines(path) if json.loads(line).get("step", 0) <= resume_step]
        write_bytes(path, "".join(lines).encode())  # atomic: a kill here must not lose rows
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step. Non-finite values become null, since JSON has no NaN."""
        clean = {key: (value if math.isfinite(value) else None) for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log({key: value for key, value in clean.items() if value is not None}, step)

    def close(self) -> None:
        """Flush to disk and close the trackers."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


class Progress:
    """Progress of a long task: `label step/total · loss · tokens/s · time left`.

    `total` and `done` are in the caller's unit (steps, items). A terminal shows one line that is updated; elsewhere
    a line is printed after about every tenth of the work.
    """

    def __init__(self, label: str, total: int, *, done: int = 0, stream: TextIO | None = None) -> None:
        self.label, self.total, self.done = printable(label), max(total, 1), done
        self._stream = stream or sys.stderr
        self._start, self._first = time.monotonic(), done
        self._last_print = -1
        self._tokens = 0

    def update(self, step: int = 1, *, tokens: int = 0, **values: float) -> None:
        """Report `step` more finished units and `tokens` tokens. `values` are printed too."""
        self.done += step
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / seconds
        seconds_left = (self.total - self.done) / rate if rate else 0.0
        parts = [f"{self.label} {self.done}/{self.total}"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        if self._tokens:
            parts.append(f"{self._tokens / seconds:,.0f} tokens/s")
        parts.append(f"{clock(seconds_left)} left" if self.done < self.total else f"{clock(seconds)}")
        self._show(" · ".join(parts))

    def _show(self, line: str) -> None:
        if self._stream.isatty():
            end = "\n" if self.done >= self.total else ""
            self._stream.write(f"\r\x1b[2K{line}{end}")
            self._stream.flush()
            return
        tenth = self.done * 10 // self.total
        if tenth != self._last_print:
            self._last_print = tenth
            self._stream.write(line + "\n")
            self._stream.flush()


def clock(seconds: float) -> str:
    """A duration in short: `42s` or `4m05s`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def open_trackers(
    names: tuple[str, ...], *, folder: Path, run: str, stage: str, settings: dict[str, Any]
) -> tuple[Tracker, ...]:
    """The trackers of a recipe. Raises RecipeError when a library is not installed."""
    makers: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
    return tuple(makers[name](folder=folder, run=run, stage=stage, settings=settings) for name in names)


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise RecipeError(
            "recipe · trackers",
            f'"{name}" is not installed',
            do='pip install "posttrain[trackers]", or remove it from trackers',
        ) from None


class _TensorBoard:
    def __init__(self, *, folder: Path, run: str, stage: str, settings: dict[str, Any]) -> None:
        _library("tensorboard", "tensorboard")
        self._writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard" / stage))
        self._writer.add_text("settings", json.dumps(settings, default=str))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, *, folder: Path, run: str, stage: str, settings: dict[str, Any]) -> None:
        library = _library("wandb", "wandb")
        self._run = library.init(project="posttrain", group=run, name=f"{run}/{stage}", config=settings, dir=str(folder))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, *, folder: Path, run: str, stage: str, settings: dict[str, Any]) -> None:
        self._library = _library("mlflow", "mlflow")
        self._library.set_experiment(run)
        self._library.start_run(run_name=stage)
        self._library.log_params({key: str(value)[:250] for key, value in settings.items()})

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._library.log_metrics({key.replace("/", "_"): value for key, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._library.end_run()

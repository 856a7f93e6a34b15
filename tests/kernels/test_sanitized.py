"""The tests of the bindings, with the C code compiled for the address and undefined-behaviour sanitisers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
TESTED = ("test_bindings", "test_bounds", "test_binding_limits", "test_compiled_choice", "test_slots", "test_tiles")
# These start processes of their own, or compile.
LEFT_OUT = "not compiler and not was_compiled and not rounded"


def sanitised() -> dict[str, str]:
    """What a process needs in its environment. Skips where the compiler lacks the sanitisers."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler here")
    shown = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in ("libasan.so", "libubsan.so")]  # fmt: skip
    if not all(Path(path).is_absolute() and Path(path).exists() for path in shown):
        pytest.skip(f"{compiler} has no sanitisers: libasan.so or libubsan.so is missing")
    return os.environ | {"CC": f"{compiler} {FLAGS}", "LD_PRELOAD": shown[0], "ASAN_OPTIONS": "detect_leaks=0"}


def run(environment: dict[str, str], *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_sanitisers_find_nothing_in_the_tests_of_the_bindings(tmp_path: Path) -> None:
    environment = sanitised() | {"POSTTRAIN_CACHE": str(tmp_path)}
    files = [f"tests/kernels/{name}.py" for name in TESTED]
    made = run(environment, "-c", "from posttrain.kernels.cpu.build import library; print(library())")
    assert "CDLL" in made.stdout, made.stderr[-3000:]
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *files)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "ERROR: AddressSanitizer" not in done.stderr
    assert "runtime error" not in done.stderr


@pytest.mark.slow
def test_the_sanitisers_see_a_place_out_of_range(tmp_path: Path) -> None:
    """Of a call past the bindings, whose checks would refuse it."""
    environment = sanitised() | {"POSTTRAIN_CACHE": str(tmp_path)}
    code = """
import torch
from posttrain.kernels.cpu import build
x, y = torch.zeros(8).bfloat16(), torch.zeros(8).bfloat16()
found = build.library()
found.gated(x.data_ptr(), x.data_ptr(), 800000, 0, y.data_ptr())
"""
    done = run(environment, "-c", code)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr

"""The compiled library on disk: one that is damaged is compiled again, and never loaded."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.kernels.cpu.bounds import SIGNATURES
from posttrain.kernels.cpu.build import library
from posttrain.kernels.cpu.selftest import works

if library() is None:
    pytest.skip("no C compiler here, or POSTTRAIN_COMPILE=0: nothing is compiled", allow_module_level=True)

CODE = "from posttrain.kernels.cpu import build as library; assert library.library() is not None"


def load_in(cache: Path) -> Path:
    """A new process loads the library, compiled or kept; returns its file."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | {"POSTTRAIN_CACHE": str(cache)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = (cache / "kernels").glob("*.so")
    return made


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a whole library."""
    folder = tmp_path_factory.mktemp("cache")
    load_in(folder)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip_a_bit, id="a flipped bit"),
        pytest.param(lambda data: b"", id="empty", marks=pytest.mark.slow),
        pytest.param(lambda data: data[: len(data) // 2], id="cut off", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_library_is_compiled_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    (made,) = (cache / "kernels").glob("*.so")
    whole = made.read_bytes()
    made.write_bytes(damage(whole))
    assert load_in(cache) == made
    assert len(made.read_bytes()) == len(whole)
    assert made.with_suffix(".sha256").exists()


def test_a_whole_library_is_kept(cache: Path) -> None:
    before = load_in(cache).stat()
    after = load_in(cache).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


class Broken:
    """A library, one function of which does nothing."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: 0) if name == self._name else getattr(self._whole, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_library_with_a_function_that_does_nothing_does_not_work(name: str) -> None:
    whole = library()
    assert whole is not None
    if name == "products" and not whole.tiles():
        pytest.skip("this processor has no matrix tiles (AMX)")
    assert works(whole)
    assert not works(Broken(whole, name))  # type: ignore[arg-type]


@pytest.mark.parametrize(("compiler", "made"), [("cc -g0 -DSPARE=1", True), ("cc '", False), ("cc -no-such-flag", False)])
def test_the_compiler_may_have_arguments(compiler: str, made: bool, tmp_path: Path) -> None:
    code = "from posttrain.kernels.cpu.build import library; print(library() is not None)"
    environment = os.environ | {"POSTTRAIN_CACHE": str(tmp_path), "CC": compiler}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(made)

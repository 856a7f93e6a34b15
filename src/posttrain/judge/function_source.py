"""The source of a reward function: its files, their hash, and an import of the bytes that were hashed.

`plan.py` puts the hash into the fingerprint of a stage, `function_worker.py` imports with `import_source`. The source is the
function's module, the packages around it, and the modules that these import from the folder beside them by import statements,
which are read without running anything. Of an installed package only the module itself counts. Left out: modules that are
imported by a computed name, and data files that a function reads.
"""

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from posttrain.artifacts import fingerprint

# Folders of installed code: of Python itself, and of packages.
_INSTALLED = {"site-packages", "dist-packages", Path(sysconfig.get_path("stdlib")).name}


class FunctionSource(NamedTuple):
    """The files of a function by the name of their module, each with the bytes that were read."""

    files: dict[str, tuple[Path, bytes]]

    def hash(self) -> str:
        """sha256 of a single file; of several files a hash of their names and hashes; "" where there is none."""
        hashes = {name: hashlib.sha256(data).hexdigest() for name, (_, data) in self.files.items()}
        return next(iter(hashes.values()), "") if len(hashes) < 2 else fingerprint(hashes)


def read_source(reference: str) -> FunctionSource:
    """The files of the function `package.module:function`, none where there is no such module. They are not run."""
    module = reference.partition(":")[0]
    origins = _origins(module, [os.getcwd(), *sys.path])
    files: dict[str, tuple[Path, bytes]] = {}
    if module not in origins:
        return FunctionSource(files)
    path = origins[module]
    root = path.parents[module.count(".") + (path.name == "__init__.py")]
    installed = bool(_INSTALLED & set(root.parts))
    pending = {module: path} if installed else dict(origins)
    while pending:
        name, path = pending.popitem()
        try:
            files[name] = path, path.read_bytes()
        except OSError:
            continue
        if not installed:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for imported in _imports(files[name][1], package):
                pending |= {k: v for k, v in _origins(imported, [str(root)]).items() if k not in files}
    return FunctionSource(dict(sorted(files.items())))


def source_hash(reference: str) -> str:
    """The hash of a function's files, "" where its module is not found."""
    return read_source(reference).hash()


def _origins(module: str, places: Sequence[str]) -> dict[str, Path]:
    """The .py files that importing a module runs: those of its packages and its own, as far as they exist."""
    origins: dict[str, Path] = {}
    name = ""
    for step in module.split("."):
        name = f"{name}.{step}".lstrip(".")
        spec = PathFinder.find_spec(step, places)
        if spec is None:
            break
        places = list(spec.submodule_search_locations or ())
        if spec.origin is not None and spec.origin.endswith(".py"):
            origins[name] = Path(spec.origin)
    return origins


def _imports(source: bytes, package: str) -> Iterator[str]:
    """The names of modules that a source may import; for `from a import b` both a and a.b."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # importing it reports the error
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*around, *([node.module] if node.module else [])])
            if start:
                yield start
                yield from (f"{start}.{alias.name}" for alias in node.names)


class _SourceLoader(SourceFileLoader):
    """Compiles the bytes that were read. It ignores compiled files on disk: they may be of another version."""

    def __init__(self, name: str, path: str, data: bytes) -> None:
        super().__init__(name, path)
        self._data = data

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError("no compiled file")

    def get_data(self, path: str) -> bytes:
        return self._data


class _SourceFinder:
    """Finds the modules of a source before any other finder does."""

    def __init__(self, source: FunctionSource) -> None:
        self._files = source.files

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in self._files else None
        if spec is None or spec.origin is None or Path(spec.origin).resolve() != self._files[name][0].resolve():
            return None
        spec.loader = _SourceLoader(name, spec.origin, self._files[name][1])
        return spec


def import_source(reference: str, source: FunctionSource) -> ModuleType:
    """Import the module of a reference. From now on the modules of `source` are imported from the bytes in it."""
    sys.meta_path.insert(0, _SourceFinder(source))
    return importlib.import_module(reference.partition(":")[0])

"""The interface of the kernels: who may import what, and a copy of the package that lacks the folder `kernels/cpu`."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "posttrain"
# Tests of models and of generation that need no compiled function; they take seconds.
SELECTED = [
    "tests/models/test_target_logprobs.py", "tests/models/test_adapter_slots.py", "tests/models/test_lora.py",
    "tests/models/test_patch_modules.py", "tests/generate/test_shares.py",
]  # fmt: skip
# Of both types the log-probabilities of a mixed batch as the engine has them and as the trainer has them.
BOTH_TYPES = """
import json, torch
from posttrain import kernels
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.base_model import load_base
from posttrain.models.lora import LoraSettings
from posttrain.models.segments import Segments, Span
apart, counts = {}, 0
for dtype in ("float32", "bfloat16"):
    base = load_base("random:tiny", template="plain", dtype=dtype, device="cpu")
    adapter = base.adapters.create("a", LoraSettings(8, 16.0, 0.0, "all", "standard"), seed=0)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    prompts, found = [list(range(7 + k, 40 + 9 * k)) for k in range(4)], []
    for name in ("a", "base"):
        for prompt, rollout in zip(prompts, generate(base, prompts, SamplingSettings(12, 1.0, 1.0, 0), name)):
            ids = torch.tensor([*prompt, *rollout.completion_ids])
            hidden = base.hidden(ids, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), name)
            own = base.logprobs(hidden[len(prompt) - 1 : -1], ids[len(prompt) :], name)
            found += (own - torch.tensor(rollout.model_logprobs)).abs().tolist()
            counts += len(rollout.completion_ids)
    adapter.requires_grad_(True)
    hidden = base.hidden(ids, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), "a")
    base.logprobs(hidden[:-1], ids[1:], "a").sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters().values())
    apart[dtype] = max(found)
print(json.dumps([kernels._cpu.__name__, counts, apart]))
"""


def test_kernels_are_imported_through_their_interface_alone() -> None:
    """No file outside of `kernels/` imports another module of it than `kernels/__init__.py`."""
    inner = {f"posttrain.kernels.{path.stem}" for path in (SOURCE / "kernels").glob("*") if path.stem != "__init__"}
    wrong, seen = [], 0
    for path in SOURCE.rglob("*.py"):
        if (SOURCE / "kernels") in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            seen += sum(name == "posttrain.kernels" for name in names)
            wrong += [f"{path.name}:{node.lineno} {name}" for name in names if any(name.startswith(x) for x in inner)]
    assert seen > 10
    assert wrong == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds a copy of the package without `kernels/cpu`."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(SOURCE, folder / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(folder / "posttrain" / "kernels" / "cpu")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_without_the_folder_of_cpu_kernels_sampler_and_trainer_agree(plain: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", BOTH_TYPES], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    backend, count, apart = json.loads(done.stdout)
    assert backend == "posttrain.kernels.reference"
    assert count > 90
    assert apart["float32"] < 1e-4
    assert apart["bfloat16"] < 0.15


def test_without_the_folder_of_cpu_kernels_tests_of_models_and_generation_pass(plain: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SELECTED]
    done = subprocess.run(command, env=plain, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "100%" in done.stdout

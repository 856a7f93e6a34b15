"""The house stands as CONTRIBUTING.md draws it: arrows, one file a heavy dependency, sizes; and nothing that can run data."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from loaded_modules import loaded_by
from posttrain.stages import KINDS
from tiny_runs import finished_run

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "posttrain"
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = {
    "transformers": {"models"},
    "tokenizers": {"models"},
    "huggingface_hub": {"models"},
    "gguf": {"models"},
    "safetensors": {"models", "train", "pipeline"},
    "datasets": {"data/sources.py"},
    "pyarrow": {"data/sources.py"},
    "matplotlib": {"report/plots.py"},
    "jinja2": {"data/template.py", "data/sandbox.py"},
    "fastapi": {"serve/app.py"},
    "starlette": {"serve/app.py"},
    "uvicorn": {"serve/run.py", "serve/connections.py"},
    "prometheus_client": {"serve/metrics.py"},
    "httpx": {"generate/remote.py"},
    "rich": set(),
    "peft": set(),
    "trl": set(),
    "requests": set(),
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}


class Import(NamedTuple):
    """One import: where it stands, what it names, and whether a type checker alone sees it."""

    path: Path
    line: int
    module: str
    checked_only: bool


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = {
        id(inside)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inside in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, id(node) in checked)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            yield Import(path, node.lineno, str(node.module), id(node) in checked)
            for alias in node.names:
                yield Import(path, node.lineno, f"{node.module}.{alias.name}", id(node) in checked)


IMPORTS = [found for path in MODULES for found in imports_of(path)]


def levels() -> dict[str, int]:
    """The arrows of CONTRIBUTING.md: package or module -> how far to the right."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^`(cli → .*)`$", text, re.MULTILINE)
    return {name.strip(): level for level, names in enumerate(line.split("→")) for name in names.split("·")}


def part_of(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return relative(path).split("/")[0].removesuffix(".py")


def test_every_part_stands_in_the_line_of_arrows():
    there = {part_of(path) for path in MODULES} - {"__init__"}
    assert there <= levels().keys()
    assert levels().keys() <= there


def test_imports_run_left_to_right_and_never_back():
    order = levels()
    wrong, seen = [], 0
    for found in IMPORTS:
        name = found.module.split(".")
        if name[0] != "posttrain" or len(name) < 2 or name[1] not in order or part_of(found.path) == "__init__":
            continue
        seen += 1
        before, after = part_of(found.path), name[1]
        if order[before] > order[after] and before != after:
            wrong.append(f"{relative(found.path)}:{found.line} ({before} → {after})")
    assert seen > 100
    assert wrong == []


def test_no_two_parts_import_each_other():
    pairs = {
        (part_of(f.path), f.module.split(".")[1]) for f in IMPORTS if f.module.startswith("posttrain.") and not f.checked_only
    }
    assert [(a, b) for a, b in pairs if a < b and (b, a) in pairs] == []


def module_of(path: Path) -> str:
    return ".".join(("posttrain", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules of a graph that reach themselves."""

    def reached(start: str) -> set[str]:
        found, waiting = set[str](), [start]
        while waiting:
            new = edges[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    return sorted(name for name in edges if name in reached(name))


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside of functions count, those for a type checker do not; nor does the package that a module lies in."""
    edges: dict[str, set[str]] = {module_of(path): set() for path in MODULES}
    lines: dict[tuple[Path, int], list[str]] = {}
    for found in IMPORTS:
        if not found.checked_only:
            lines.setdefault((found.path, found.line), []).append(found.module)
    for (path, _), (first, *names) in lines.items():
        modules = [name for name in names if name in edges]
        edges[module_of(path)] |= {first} & edges.keys() if len(modules) < max(len(names), 1) else set()
        edges[module_of(path)] |= set(modules)
    assert sum(map(len, edges.values())) > 500
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_text_goes_to_a_terminal_through_one_file():
    """`posttrain.terminal` spells control characters; a child that speaks over a pipe does not."""
    printing = {
        relative(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    }
    assert printing == {"terminal.py"}


def test_a_heavy_dependency_stands_in_its_own_file():
    wrong = []
    for found in IMPORTS:
        allowed = HEAVY.get(found.module.split(".")[0])
        if allowed is not None and not {part_of(found.path), relative(found.path)} & allowed:
            wrong.append(f"{relative(found.path)}:{found.line} imports {found.module}")
    assert wrong == []


def test_stages_do_not_call_each_other():
    """The module that does the work of a stage is named by its kind alone, and imported by nobody."""
    work = {kind.run.partition(":")[0] for kind in KINDS.values()}
    assert len(work) == len(KINDS)
    assert [f"{relative(f.path)}:{f.line}" for f in IMPORTS if f.module in work] == []


GENERIC = [
    "pipeline.py", "plan.py", "recipe.py", "estimate.py", "api.py", "cli.py", "data/doctor.py", "data/report.py",
    "models/target.py",
    *sorted(relative(path) for path in (SOURCE / "report").glob("*.py")),
]  # fmt: skip


@pytest.mark.parametrize("name", GENERIC)
def test_no_kind_of_stage_is_named_outside_of_its_file(name: str):
    """Neither as a text nor by its class; a metric, an anchor or a key of a file may have the same name."""
    tree = ast.parse((SOURCE / name).read_text(encoding="utf-8"))
    classes = {kind.settings.__name__ for kind in KINDS.values()}
    modules = {f"posttrain.stages.{kind}" for kind in KINDS}
    wrong = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in classes]
    wrong += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in modules]
    # A comparison with a kind, or a table by kinds.
    compared = [c for n in ast.walk(tree) if isinstance(n, ast.Compare) for c in (n.left, *n.comparators)]
    texts = [t.value for n in compared for t in ast.walk(n) if isinstance(t, ast.Constant)]
    dicts = [n for n in ast.walk(tree) if isinstance(n, ast.Dict)]
    tables = [[ast.literal_eval(k) for k in n.keys if isinstance(k, ast.Constant)] for n in dicts]
    wrong += [str(text) for text in texts if text in KINDS]
    assert wrong + [keys for keys in tables if len(KINDS.keys() & set(keys)) > 1] == []


def test_the_report_the_plan_and_the_command_load_no_torch():
    report = [f"posttrain.report.{path.stem}" for path in (SOURCE / "report").glob("*.py") if path.stem != "__init__"]
    light = ["posttrain.cli", "posttrain.pipeline", "posttrain.plan", "posttrain.artifacts", "posttrain.recipe", *report]
    loaded = loaded_by("\n".join(f"import {name}" for name in light))
    assert set(light) <= loaded
    assert loaded & {"torch", "transformers", "datasets", "pyarrow"} == set()


def test_every_module_has_a_docstring_and_a_name_that_says_something():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{relative(path)} has no docstring"
        assert path.stem not in FORBIDDEN_NAMES, relative(path)
        assert path.parent.name not in FORBIDDEN_NAMES, relative(path)


def test_files_have_at_most_400_lines_and_functions_60():
    files = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    long: list[str] = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        long += [f"{path.name}: {text.count(chr(10))} lines"] * (text.count("\n") > 400)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path.name}: {node.name} has {length} lines"] * (length > 60)
    assert long == []


def test_classes_inherit_only_from_what_the_house_allows():
    roots = {
        "nn.Module", "torch.autograd.Function", "autograd.Function", "Exception", "Protocol", "BaseModel", "NamedTuple",
        "TorchDispatchMode",
    }  # fmt: skip
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for path in MODULES
        # A sandbox, limits of a connection, a stream and a loader are made by overriding the library's own class.
        if relative(path)
        not in {"data/sandbox.py", "data/template.py", "serve/connections.py", "streams.py", "judge/function_source.py"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }

    def rooted(name: str) -> bool:
        return name in roots or (name in bases and all(map(rooted, bases[name])) and bool(bases[name]))

    assert {name: found for name, found in bases.items() if not all(map(rooted, found))} == {}


def test_no_two_classes_share_a_name():
    files: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                files.setdefault(node.name, []).append(relative(path))
    assert len(files) > 250
    assert {name: paths for name, paths in files.items() if len(paths) > 1} == {}


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load",
    "yaml.load", "yaml.unsafe_load", "joblib.load", "numpy.load", "np.load", "marshal.load", "marshal.loads",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}


def dangers(path: Path) -> list[str]:
    """What in a file could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        found += [f"{path.name}:{node.lineno} {name}"] * (name in FORBIDDEN_CALLS)
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            bad = keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and value != "False"
            bad |= keyword.arg == "weights_only"
            found += [f"{path.name}:{node.lineno} {keyword.arg}={value}"] * bad
    return found


def test_no_pickle_no_eval_no_shell_no_remote_code():
    assert [found for path in MODULES for found in dangers(path)] == []
    assert [f for f in IMPORTS if f.module.split(".")[0] in FORBIDDEN_MODULES] == []
    assert len(MODULES) > 50


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')", "torch.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(p)", "os.system('ls')",
        "subprocess.run('ls', shell=True)", "AutoModel.from_pretrained(p, trust_remote_code=True)", "f(trust_remote_code=x)",
    ],
)  # fmt: skip
def test_the_gate_sees_what_it_is_for(tmp_path: Path, text: str):
    (tmp_path / "bad.py").write_text(text)
    assert dangers(tmp_path / "bad.py")


LISTENING = """
import sys
events = []
def hook(event, arguments):
    if event == "pickle.find_class":
        events.append(arguments)
    elif event == "socket.connect":
        events.append((event, *map(str, arguments)))
sys.addaudithook(hook)
from pathlib import Path
from posttrain.data.sources import read_rows
from posttrain.models.target import open_target
from posttrain.report.render import write_report
from posttrain.train.checkpoint import Checkpoint, load_newest, save_checkpoint
run, scratch = Path(sys.argv[1]), Path(sys.argv[2])
target = open_target(str(run / "dpo"))
for name in target.names:
    target.policies.activate(name)
import torch
save_checkpoint(scratch, 1, Checkpoint({"a": torch.zeros(3)}, {"step": 1}))
assert load_newest(scratch).state == {"step": 1}
for path in sys.argv[3:]:
    assert read_rows(path)
write_report(run)
from posttrain.cli import main
assert main(["run", str(run / "recipe.toml"), "--out", str(run), "--set", "dpo.epochs=0.02"]) == 0
import pickle
pickle.loads(pickle.dumps(Path("x")))  # the hook hears this one
print(events[-1], len(events))
"""


def test_0_unpickled_classes_and_0_connections_while_everything_is_loaded(tmp_path: Path):
    """Models, adapters, checkpoints, data in five formats, the report and a run that trains and evaluates."""
    import shutil

    import datasets

    rows = [{"prompt": "Say hi.", "completion": f"Hi {i}."} for i in range(3)]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "d.parquet"))
    made.to_csv(str(tmp_path / "d.csv"))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [str(tmp_path / name) for name in ("saved", "d.parquet", "d.csv", "d.json", "d.jsonl")]
    run = shutil.copytree(finished_run(), tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(run), str(tmp_path / "scratch"), *paths], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last, _, count = done.stdout.splitlines()[-1].rpartition(" ")
    assert "Path" in last
    assert count == "1", done.stdout.splitlines()[-1]


def test_no_test_module_imports_another():
    """What tests share lies in modules of its own, so that each file of tests can be read and run alone."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in files if path.stem.startswith("test_")}
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and node.module in names)
        or (isinstance(node, ast.Import) and {alias.name for alias in node.names} & names)
    ]
    assert wrong == []

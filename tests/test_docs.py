"""The documentation tells what the program does: settings, verbs, metrics, commands, examples and links are held here."""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import posttrain
from adapter_sizes import count_parameters
from posttrain.cli import build_parser
from posttrain.data.chat import TEMPLATES
from posttrain.data.formats import read_demonstrations, read_preferences
from posttrain.evaluate.checks import KINDS
from posttrain.evaluate.suites import load_suites
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import load_base
from posttrain.models.source import locate_base
from posttrain.pipeline import run_recipe
from posttrain.recipe import Recipe, parse_recipe, to_toml
from posttrain.records import Message
from posttrain.settings import Adapter, Base, Evaluation, Source
from posttrain.stages import KINDS as STAGE_KINDS
from posttrain.stages.reward_parts import RewardPart

ROOT = Path(__file__).parents[1]
SOURCE = Path(posttrain.__file__).parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# How fenced blocks begin: ```toml, or ```jsonl questions.jsonl with a word of our own.
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_METRIC = re.compile(r"^(?:sft|dpo|train|time)/[a-z_]*[a-z]$")


class Block:
    """A fenced block of a page."""

    def __init__(self, page: Path, info: str, text: str) -> None:
        self.page, self.text = page, text
        self.language, _, self.title = info.strip().partition(" ")


def blocks(page: Path, language: str) -> list[Block]:
    found = [Block(page, info, text) for info, text in _FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language == language]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for language in languages for block in blocks(page, language)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the configuration page -------------------------------------------------------------------------------------------


def test_the_configuration_page_is_current(generator):
    assert generator.PAGE.read_text(encoding="utf-8") == generator.render(), "out of date: run `make docs`"


def test_every_setting_stands_in_the_configuration_page_with_a_meaning():
    rows = dict(
        re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (DOCS / "configuration.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    models = [Recipe, Base, Adapter, Source, RewardPart, Evaluation, *(kind.settings for kind in STAGE_KINDS.values())]
    settings = {name for model in models for name in model.model_fields}
    assert len(settings) > 30
    assert sorted(name for name in settings if not rows.get(name, "").strip()) == []


def test_every_verb_and_argument_stands_in_the_configuration_page(generator):
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    verbs = list(generator.verbs(build_parser()))
    assert [words for words, _ in verbs if f"### `{words}`" not in page] == []
    unexplained = [
        f"{words} {action.dest}"
        for words, parser in verbs
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and not action.help
    ]
    assert unexplained == []


# --- metrics ----------------------------------------------------------------------------------------------------------


def documented_metrics() -> set[str]:
    section = (DOCS / "metrics.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([a-z_/]+)`", cell)}


def test_every_metric_name_in_the_source_is_explained():
    found = {
        node.value
        for folder in ("losses", "train")
        for path in (SOURCE / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _METRIC.match(node.value)
    }
    sums = {"sft/nll"}  # a sum inside a step, never logged
    assert len(found) > 15
    assert found - documented_metrics() - sums == set()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A run of every stage kind on the tiny model, float32, one question for an evaluation."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "suite.toml").write_text(
        'name = "one"\n[[task]]\nname = "q"\nanswer = "choices"\nitems = "q.jsonl"\n', encoding="utf-8"
    )
    (folder / "q.jsonl").write_text('{"id": "q", "question": "a", "choices": [" b", " c"], "answer": 0}\n', encoding="utf-8")
    asks = [f"Say the letter {letter}." for letter in "abcdefghijkl"]
    sft = [{"prompt": ask, "completion": ask[-2]} for ask in asks]
    dpo = [{"prompt": ask, "chosen": ask[-2], "rejected": "no"} for ask in asks]
    for name, rows in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    stage = {"epochs": 1.0, "batch": 4, "learning_rate": 0.01, "validation": 0.3}
    rollouts = {"iterations": 1, "prompts": 4, "minibatch": 4, "max_new_tokens": 4, "gold": "rm", "validation": 0.3}
    rollouts |= {"ptx_coef": 1.0, "ptx_data": str(folder / "sft.jsonl")}
    recipe = parse_recipe({
        "name": "docs", "base": {"model": "random:tiny", "template": "chatml", "dtype": "float32"},
        "stage": [
            {"kind": "sft", "name": "sft", "data": str(folder / "sft.jsonl"), **stage},
            {"kind": "dpo", "name": "dpo", "init": "sft", "data": str(folder / "dpo.jsonl"), **stage},
            {"kind": "reward", "name": "rm", "init": "sft", "data": str(folder / "dpo.jsonl"), **stage},
            {"kind": "ppo", "name": "ppo", "init": "sft", "reward": "rm", "data": str(folder / "sft.jsonl"), **rollouts},
        ],
        "evaluation": {"suites": [str(folder / "suite.toml")], "samples": ["Hello"], "sample_tokens": 4},
    })  # fmt: skip
    run_recipe(recipe, to_toml(recipe), folder / "run")
    return folder / "run"


def test_the_metrics_of_a_run_are_exactly_those_that_are_explained(tiny_run):
    logged = {
        name
        for stage in ("sft", "dpo", "rm", "ppo")
        for line in (tiny_run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        for name in json.loads(line)
    } - {"step"}
    assert logged == documented_metrics()


def test_the_files_of_a_run_are_those_that_are_listed(tiny_run):
    page = (DOCS / "artifacts.md").read_text(encoding="utf-8").split("## The manifest")[0]
    files = {path.relative_to(tiny_run).as_posix() for path in tiny_run.rglob("*") if path.is_file()}
    stages = {re.sub(r"^evaluate/rm/", "evaluate/STAGE/", re.sub(r"^(sft|dpo|rm|ppo)/", "STAGE/", name)) for name in files}
    listed = {re.sub(r"^evaluate/[a-z]+/", "evaluate/POLICY/", name) for name in stages} - {"evaluate/STAGE/manifest.json"}
    assert len(listed) > 8
    assert sorted(name for name in listed if f"`{name}`" not in page) == []


def test_the_manifest_fields_are_those_that_are_explained(tiny_run):
    page = (DOCS / "artifacts.md").read_text(encoding="utf-8").split("## The manifest")[1].split("\n## ")[0]
    explained = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    manifests = [tiny_run / place / "manifest.json" for place in ("sft", "dpo", "rm", "ppo", "evaluate/base", "evaluate/rm")]
    fields = {field for path in manifests for field in json.loads(path.read_text(encoding="utf-8"))}
    assert fields - explained == set()
    assert explained - fields - {"adapter", "weights", "scores", "code", "field"} == set()


# --- links, files, names ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_resolve():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            place = (page.parent / target).resolve() if target else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_source_files_that_pages_name_exist():
    missing = []
    for page in (*DOCS.glob("*.md"), ROOT / "README.md"):
        for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)`", prose(page)):
            if not any((place / name).exists() for place in (SOURCE, ROOT, DOCS)):
                missing.append(f"{page.name}: {name}")
    assert missing == []


def test_functions_that_the_pages_name_exist_in_their_file():
    missing = []
    for line in "".join(prose(DOCS / f"{page}.md") for page in ("algorithms", "computing", "metrics")).splitlines():
        for file, names in re.findall(r"`([\w/]+\.py)` \(([^)]*)\)", line):
            text = (SOURCE / file).read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)`", names):
                if not re.search(rf"(?:def|class) {name.rsplit('.', maxsplit=1)[-1]}\b", text):
                    missing.append(f"{file}: {name}")
    assert missing == []


def test_checks_of_the_evaluation_page_are_those_that_exist():
    section = (DOCS / "evaluation.md").read_text(encoding="utf-8").split("## Checks")[1].split("\n## ")[0]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(KINDS)


def test_error_lines_of_the_troubleshooting_page_are_in_the_source():
    strings = " ".join(
        node.value
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) + re.findall(r"^\*\*(`.*?)\*\*", page, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    assert [text for text in quoted if text not in strings] == []


# --- commands and examples --------------------------------------------------------------------------------------------


def shell_commands() -> list[tuple[str, str]]:
    """Lines of shell blocks that call posttrain, without prompt, folder and comment."""
    found = []
    for block in all_blocks("sh", "bash", "console", "shell"):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = re.sub(r"^\$ |^\.venv/bin/", "", re.sub(r"\s+(#|\||>|&&).*$", "", line.strip()))
            if command.startswith("posttrain "):
                found.append((block.page.name, command))
    return found


def inline_commands() -> list[tuple[str, str]]:
    """`posttrain …` in running text; those with words in capitals stand for many commands and are left to the verb."""
    return [(page.name, text) for page in PAGES for text in re.findall(r"`(posttrain [^`]+)`", prose(page))]


def test_shell_commands_parse():
    commands = shell_commands()
    assert len(commands) > 15
    refused = []
    for page, command in commands:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                build_parser().parse_args(shlex.split(command)[1:])
        except SystemExit:
            refused.append(f"{page}: {command}: {errors.getvalue().splitlines()[-1]}")
    assert refused == []


def test_inline_commands_name_verbs_that_exist(generator):
    verbs = {words for words, _ in generator.verbs(build_parser())} | {"posttrain data"}
    commands = inline_commands()
    assert commands
    unknown = [f"{p}: {c}" for p, c in commands if not any(c == v or c.startswith(v + " ") for v in verbs)]
    assert unknown == []


def test_recipes_of_the_pages_are_accepted():
    known = [block for block in all_blocks("toml") if block.page.name != "extending.md"]  # which adds a kind
    recipes = [raw for block in known if "stage" in (raw := tomllib.loads(block.text)) and "base" in raw]
    assert recipes
    for raw in recipes:
        parse_recipe(raw)


def test_the_data_examples_are_read_as_what_they_are(tmp_path):
    readers = {"sft": read_demonstrations, "dpo": read_preferences}
    examples = [block for block in blocks(DOCS / "data.md", "jsonl") if block.title in readers]
    assert [sum(block.title == kind for block in examples) for kind in readers] == [4, 6]
    for number, block in enumerate(examples):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block.text, encoding="utf-8")
        read = readers[block.title](str(path), seed=0)
        assert (len(read.records), read.problems) == (1, ())


def test_the_example_suite_loads(tmp_path):
    (suite,) = [block for block in blocks(DOCS / "evaluation.md", "toml") if "[[task]]" in block.text]
    (tmp_path / "suite.toml").write_text(suite.text, encoding="utf-8")
    for block in blocks(DOCS / "evaluation.md", "jsonl"):
        (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    tasks = load_suites([str(tmp_path / "suite.toml")])
    assert [(task.name, len(task.items)) for task in tasks] == [("shop/knowledge", 1), ("shop/style", 1), ("shop/prose", 1)]


def test_the_peft_example_answers_as_the_run_does(tiny_run):
    (block,) = blocks(DOCS / "your-own.md", "python")
    folder = locate_base("random:tiny").folder
    code = block.text.replace("models/my-base", str(folder)).replace("runs/mine", str(tiny_run))
    code = code.replace("max_new_tokens=64", "max_new_tokens=24")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        # PEFT asks transformers for a property under its old name; neither is ours
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        exec(compile(code, "your-own.md", "exec"), {})

    base = load_base("random:tiny", template="chatml", dtype="float32")
    prompt = base.chat.encode_prompt([Message("user", "What are your opening hours?")])
    settings = SamplingSettings(24)
    policies = Policies(base, tiny_run)
    answers = {name: generate(base, [prompt], settings, policies.activate(name))[0].text for name in ("base", "dpo")}
    assert printed.getvalue() == answers["dpo"] + "\n"
    assert answers["dpo"] != answers["base"], "an adapter that changes nothing would pass"


def test_templates_that_the_pages_name_exist():
    table = (DOCS / "your-own.md").read_text(encoding="utf-8").split("## 2.")[1].split("## 3.")[0]
    assert set(re.findall(r'^\| `"(\w+)"`', table, re.MULTILINE)) == set(TEMPLATES)


def test_the_count_of_the_large_model_is_right():
    width, keys, inner = 8192, 1024, 28_672
    layer = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
    layer |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    shapes = {f"{number}.{name}": shape for number in range(80) for name, shape in layer.items()}
    assert count_parameters(shapes, 8) == 103_546_880
    assert "103.5 M" in (DOCS / "algorithms.md").read_text(encoding="utf-8")
    assert count_parameters(layer, 1) == 161_792


def test_pages_are_short():
    for page in DOCS.glob("*.md"):
        if page.name not in ("configuration.md", "models.md", "extending.md"):  # generated tables, and whole files of code
            assert len(page.read_text(encoding="utf-8").splitlines()) <= 150, page.name


def tree_of_readme() -> dict[str, str]:
    """Paths of README's map below src/posttrain, with what it says of them."""
    block = re.search(r"```\nsrc/posttrain/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        if not line.startswith(" "):
            continue
        name, _, text = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth - 1 :] = [name]
        found["".join(folders)] = text.strip()
    return found


def test_the_map_of_the_readme_is_what_is_on_the_disk():
    source = ROOT / "src" / "posttrain"
    tree = tree_of_readme()
    empty = [path for path in source.rglob("__init__.py") if len(path.read_text(encoding="utf-8").splitlines()) < 3]
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if path not in empty} - {"__init__.py"}
    assert {path for path in tree if path.endswith(".py")} == modules
    assert all((source / path).is_dir() for path in tree if path.endswith("/"))
    assert all(10 <= len(text) <= 90 for text in tree.values())
    assert len(set(tree.values())) == len(tree)

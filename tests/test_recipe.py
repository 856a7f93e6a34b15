"""Recipes: all of ours parse; a mistake is told by place, finding, what is allowed and what to do; nothing is written."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from posttrain import recipe as recipe_module
from posttrain.cli import main
from posttrain.data.chat import TEMPLATES
from posttrain.recipe import RESERVED_NAMES, Recipe, load_recipe, parse_recipe, to_toml
from posttrain.settings import Adapter, Base, Evaluation, Source
from posttrain.stages import KINDS
from posttrain.stages.reward_parts import RewardPart

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
GOOD = """
name = "mine"
[base]
model = "random:tiny"
template = "gemma"
[[stage]]
kind = "sft"
name = "sft"
data = "starter/demonstrations.jsonl"
[[stage]]
kind = "dpo"
name = "dpo"
init = "sft"
data = "starter/preferences.jsonl"
"""
SFT_SETTINGS = (
    "kind, name, init, data, learning_rate, schedule, warmup, weight_decay, clip, checkpoint_every, checkpoint_minutes, seed, "
    "epochs, batch, max_tokens, validation, keep, patience, validate_every, allow_dropped"
)

# (what is replaced, by what, the whole message)
MISTAKES = [
    (
        'kind = "sft"',
        'kind = "sft"\nlerning_rate = 1e-4',
        f'stage "sft" · unknown setting "lerning_rate" · there is: {SFT_SETTINGS} · did you mean "learning_rate"?',
    ),
    (
        'template = "gemma"',
        'tempalte = "gemma"',
        '[base] · unknown setting "tempalte" · there is: model, template, dtype, device, recompute · did you mean "template"?',
    ),
    (
        'template = "gemma"',
        'template = "gema"',
        "[base] · template = 'gema' · 'auto', 'gemma', 'chatml', 'llama3' or 'plain'",
    ),
    (
        'name = "mine"',
        'name = "mine"\nzzz = 1',
        'top level · unknown setting "zzz" · there is: name, seed, base, adapter, stage, evaluation, trackers',
    ),
    (
        'kind = "dpo"',
        'kind = "dpoo"',
        'stage "dpo" · kind = "dpoo" · there is: sft, dpo, reward, ppo, contrast, critique, label · did you mean "dpo"?',
    ),
    (
        'kind = "sft"\n',
        "",
        'stage "sft" · "kind" is missing · there is: sft, dpo, reward, ppo, contrast, critique, label · add it',
    ),
    ('data = "starter/demonstrations.jsonl"\n', "", 'stage "sft" · "data" is missing · add it'),
    (
        'init = "sft"',
        'init = "sfft"',
        'stage "dpo" · init = "sfft" is not an earlier policy stage · there is: base, sft · did you mean "sft"?',
    ),
    ('init = "sft"', 'init = "dpo"', 'stage "dpo" · init = "dpo" is not an earlier policy stage · there is: base, sft'),
    (
        'name = "sft"',
        'name = "sft"\ninit = "dpo"',
        'stage "sft" · init = "dpo" is not an earlier policy stage · there is: base',
    ),
    (
        'init = "sft"',
        'init = "sft"\nreference = "rm"',
        'stage "dpo" · reference = "rm" is not an earlier policy stage · there is: init, base, sft',
    ),
    (
        'name = "dpo"\ninit = "sft"',
        'name = "sft"',
        'stage "sft" · a second stage of that name · give each stage a different name',
    ),
    ('name = "sft"', 'name = "base"', 'stage "base" · the name "base" is reserved · choose another name'),
    (
        'name = "sft"',
        'name = "../up"',
        "stage \"../up\" · name = '../up' · lower-case letters, digits, _ . -, at most 64, a letter or digit first",
    ),
    ('kind = "sft"', 'kind = "sft"\nbatch = "16"', "stage \"sft\" · batch = '16' · a whole number"),
    ('kind = "sft"', 'kind = "sft"\nbatch = true', 'stage "sft" · batch = True · a whole number'),
    ('kind = "sft"', 'kind = "sft"\nbatch = 0', 'stage "sft" · batch = 0 · greater than or equal to 1'),
    ('kind = "sft"', 'kind = "sft"\nlearning_rate = "high"', "stage \"sft\" · learning_rate = 'high' · a number"),
    ('kind = "dpo"', 'kind = "dpo"\nbeta = inf', 'stage "dpo" · beta = inf · a finite number'),
    ('kind = "dpo"', 'kind = "dpo"\nbeta = nan', 'stage "dpo" · beta = nan · a finite number'),
    (
        'kind = "dpo"',
        'kind = "dpo"\nloss = "sigmod"',
        "stage \"dpo\" · loss = 'sigmod' · 'sigmoid', 'robust', 'ipo' or 'hinge'",
    ),
    (
        'kind = "dpo"',
        'kind = "dpo"\nloss = "ipo"\nlabel_smoothing = 0.1',
        'stage "dpo" · label_smoothing with loss = "ipo" · sigmoid or robust · remove it',
    ),
    (
        'kind = "dpo"',
        'kind = "dpo"\nloss = "robust"',
        'stage "dpo" · loss = "robust" without label_smoothing · 0 < label_smoothing < 0.5 · set it',
    ),
    ('data = "starter/demonstrations.jsonl"', "data = 3", 'stage "sft" · data = 3 · a string'),
    (
        'data = "starter/demonstrations.jsonl"',
        'data = [{path = "a.jsonl", wieght = 2}]',
        'stage "sft" · unknown setting "wieght" · there is: path, weight · did you mean "weight"?',
    ),
    ('data = "starter/demonstrations.jsonl"', "data = [{weight = 2}]", 'stage "sft" · "data.path" is missing · add it'),
    (
        '[[stage]]\nkind = "dpo"',
        '[adapter]\nrank = 0\n[[stage]]\nkind = "dpo"',
        "[adapter] · rank = 0 · greater than or equal to 1",
    ),
    (
        '[[stage]]\nkind = "dpo"',
        '[adapter]\nkind = "full"\ntrain_tokens = ["<eos>"]\n[[stage]]\nkind = "dpo"',
        '[adapter] · train_tokens with kind = "full" · remove it: every row is trained',
    ),
    (
        '[[stage]]\nkind = "dpo"',
        '[evaluation]\nsuites = "starter"\n[[stage]]\nkind = "dpo"',
        "[evaluation] · suites = 'starter' · a list",
    ),
    ('name = "mine"', 'name = "mine"\nseed = 1.5', "top level · seed = 1.5 · a whole number"),
    ('name = "mine"', "name = 7", "top level · name = 7 · a string"),
    (
        'kind = "sft"',
        'kind = "sft"\nbatch = 0\nclip = -1\nwarm_up = 1',
        'stage "sft" · clip = -1 (and 2 more) · greater than or equal to 0',
    ),
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error of a command that must end with exit code 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a good recipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(GOOD)
    return tmp_path


def the_only_file_is_the_recipe(folder: Path) -> bool:
    return [p.name for p in folder.rglob("*")] == ["r.toml"]


def test_every_recipe_here_parses_and_survives_being_written():
    assert {p.stem for p in RECIPES} >= {"quickstart", "tiny", "hh"}
    for path in RECIPES:
        recipe = load_recipe(path)
        assert recipe.name == path.stem
        assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe


def test_the_good_recipe_is_good(in_folder: Path):
    recipe = load_recipe(in_folder / "r.toml")
    assert [(s.kind, s.name, s.init) for s in recipe.stage] == [("sft", "sft", "base"), ("dpo", "dpo", "sft")]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[m[2][:60] for m in MISTAKES])
def test_a_mistake_is_told_by_the_formula_and_nothing_is_written(
    in_folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
):
    assert old in GOOD
    (in_folder / "r.toml").write_text(GOOD.replace(old, new, 1))
    assert refused(capsys, "run", "r.toml") == f"r.toml · {message}"
    assert the_only_file_is_the_recipe(in_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", '"name" is missing (and 2 more) · add it'),
        (b"name = ", "not TOML: Invalid value (at end of document) · correct that line"),
        (b"\xff\xfe", "not UTF-8 text (byte 0) · save the file as UTF-8"),
        (b'name = "x"\nbase.model = "random:tiny"\nstage = []\n', "no stage · add a [[stage]] table"),
        (
            b'name = "x"\nbase.model = "random:tiny"\n[stage]\nkind = "sft"\n',
            "`stage` must be an array of tables · write [[stage]], with two brackets, above each stage",
        ),
        (b'name = "x"\nstage = [3]\nbase = 3\n', "base = 3 (and 1 more) · a table"),
    ],
)
def test_a_file_that_is_no_recipe(in_folder: Path, capsys: pytest.CaptureFixture[str], text: bytes, message: str):
    (in_folder / "r.toml").write_bytes(text)
    assert refused(capsys, "run", "r.toml").endswith(message)
    assert the_only_file_is_the_recipe(in_folder)


def test_a_path_that_is_no_file(in_folder: Path, capsys: pytest.CaptureFixture[str]):
    give = "give the path of a recipe (.toml)"
    assert refused(capsys, "run", "no.toml") == f"no.toml · there is no file no.toml · {give}"
    (in_folder / "folder").mkdir()
    assert refused(capsys, "run", "folder") == f"folder · folder is a folder · {give}"
    assert refused(capsys, "run", "r.toml/x.toml") == f"x.toml · r.toml/x.toml cannot be read (Not a directory) · {give}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("beta", '--set · "beta" · STAGE.FIELD=VALUE · for instance --set dpo.beta=0.2'),
        (".beta=1", '--set · ".beta=1" · STAGE.FIELD=VALUE · for instance --set dpo.beta=0.2'),
        ("", '--set · "" · STAGE.FIELD=VALUE · for instance --set dpo.beta=0.2'),
        (
            "dppo.beta=1",
            '--set · "dppo" is neither a stage nor a table · there is: sft, dpo, base, adapter, evaluation'
            ' · did you mean "dpo"?',
        ),
        ("stage.0.beta=1", '--set · "stage" is neither a stage nor a table · there is: sft, dpo, base, adapter, evaluation'),
        ("base.model.name=1", '--set · "base.model.name" does not lead to a setting · STAGE.FIELD=VALUE'),
        ("dpo.beta=high", "r.toml · stage \"dpo\" · beta = 'high' · a number"),
        ("dpo.beta=", "r.toml · stage \"dpo\" · beta = '' · a number"),
        (
            "sede=1",
            'r.toml · top level · unknown setting "sede" · there is: name, seed, base, adapter, stage, evaluation, trackers'
            ' · did you mean "seed"?',
        ),
        ("adapter=3", "r.toml · top level · adapter = 3 · a table"),
    ],
)
def test_a_mistake_in_an_override(in_folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str):
    assert refused(capsys, "run", "r.toml", "--set", override) == message
    assert the_only_file_is_the_recipe(in_folder)


@pytest.mark.parametrize(
    ("override", "stage", "field", "value"),
    [
        ("dpo.beta=0.2", "dpo", "beta", 0.2),
        ("dpo.beta=1", "dpo", "beta", 1.0),
        ('dpo.loss="hinge"', "dpo", "loss", "hinge"),
        ("dpo.loss=hinge", "dpo", "loss", "hinge"),
        ("sft.data=my data.jsonl", "sft", "data", "my data.jsonl"),
        ("sft.data=2026-01-31", "sft", "data", "2026-01-31"),
        ("sft.data=a=b.jsonl", "sft", "data", "a=b.jsonl"),
        (' sft.data = "x" ', "sft", "data", "x"),
    ],
)
def test_overrides_of_stages(in_folder: Path, override: str, stage: str, field: str, value: Any):
    recipe = load_recipe(in_folder / "r.toml", (override,))
    assert next(s for s in recipe.stage if s.name == stage).model_dump()[field] == value


def test_overrides_of_tables_lists_and_the_top_level(in_folder: Path):
    overrides = (
        "seed=7", "name=other", "adapter.rank=2", 'adapter.targets=["q_proj", "v_proj"]', 'evaluation.samples=["a", "b, c"]',
        'sft.data=[{path="a.jsonl"}, {path="b.jsonl", weight=0.5}]', "seed=8",
    )  # fmt: skip
    recipe = load_recipe(in_folder / "r.toml", overrides)
    assert (recipe.seed, recipe.name, recipe.adapter.rank) == (8, "other", 2)
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.evaluation.samples == ("a", "b, c")
    sources = recipe.stage[0].data
    assert isinstance(sources, tuple)
    assert [(s.path, s.weight) for s in sources] == [("a.jsonl", 1.0), ("b.jsonl", 0.5)]


def test_the_place_and_the_first_mistake_stay_the_same_with_many(in_folder: Path, capsys: pytest.CaptureFixture[str]):
    wrong = ("sft.batch=0", "sft.epochs=0", "dpo.beta=0", "adapter.rank=0", 'adapter.targets=["a", 1]', "base.dtype=int8")
    message = refused(capsys, "run", "r.toml", *(part for w in wrong for part in ("--set", w)))
    assert message == "r.toml · [base] · dtype = 'int8' (and 5 more) · 'auto', 'bfloat16' or 'float32'"


@pytest.mark.parametrize("name", sorted(RESERVED_NAMES))
def test_a_stage_cannot_take_a_name_that_a_run_needs(in_folder: Path, name: str):
    with pytest.raises(recipe_module.RecipeError, match="is reserved"):
        load_recipe(in_folder / "r.toml", (f'dpo.name="{name}"',))


def test_every_setting_has_a_docstring():
    models = [Recipe, Base, Adapter, Evaluation, Source, RewardPart, *(kind.settings for kind in KINDS.values())]
    fields = [(m.__name__, name, field) for m in models for name, field in m.model_fields.items()]
    missing = [f"{m}.{name}" for m, name, field in fields if not field.description]
    assert len(fields) > 50
    assert missing == []


def test_templates_and_kinds_named_in_the_recipe_are_those_there_are():
    choices = Base.model_json_schema()["properties"]["template"]["enum"]
    assert choices == ["auto", *TEMPLATES]
    assert all(kind.settings.model_fields["kind"].annotation.__args__ == (name,) for name, kind in KINDS.items())

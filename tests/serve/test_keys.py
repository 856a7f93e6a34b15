"""API keys: what lies in the file, who passes, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.errors import ArtifactError, RecipeError
from posttrain.serve.keys import Key, Keys, add_key, revoke_key

HASH = hashlib.sha256(b"secret").hexdigest()
ANN = {"name": "ann", "sha256": HASH, "scopes": ["use"], "created": "2026-11-26T10:00:00+00:00"}


def written(folder: Path, *keys: object, mode: int = 0o600, text: str | None = None) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": keys}) if text is None else text)
    path.chmod(mode)
    return path


def test_a_key_that_was_made_passes_and_its_secret_is_nowhere(tmp_path: Path):
    path = tmp_path / "keys.json"
    ann, root = add_key(path, "ann", ("use",)), add_key(path, "root", ("use", "admin"))
    keys = Keys.read(path)
    found = keys.check(ann), keys.check(root)
    assert [(key.name, key.scopes) for key in found if key] == [("ann", ("use",)), ("root", ("use", "admin"))]
    assert keys.keys[0].sha256 == hashlib.sha256(ann.encode()).hexdigest()
    assert path.stat().st_mode & 0o777 == 0o600
    assert ann not in path.read_text()
    assert root.removeprefix("pt-") not in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_50_keys_differ_and_have_256_bits(tmp_path: Path):
    path = tmp_path / "keys.json"
    secrets = [add_key(path, f"k{number}", ("use",)) for number in range(50)]
    assert len(set(secrets)) == 50
    assert {len(secret) for secret in secrets} == {len("pt-") + 43}  # 43 letters of 6 bits hold 256
    keys = Keys.read(path)
    assert [key.name for secret in secrets if (key := keys.check(secret))] == [f"k{number}" for number in range(50)]


def test_nothing_else_passes(tmp_path: Path):
    keys = Keys.read(written(tmp_path, ANN))
    assert keys.check("secret") == Key("ann", HASH, ("use",), "2026-11-26T10:00:00+00:00")
    wrong = ["", "Secret", "secret ", " secret", "secre", "secret\x00", "sécret", "\ud800", "x" * 10**6, HASH, "*"]
    assert [presented for presented in wrong if keys.check(presented) is not None] == []
    assert Keys(()).check("") is None


def test_every_key_is_compared_whichever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What takes longer for one key than for another would tell which it is."""
    import hmac

    compared: list[str] = []
    whole = hmac.compare_digest

    def heard(a: str, b: str) -> bool:
        compared.append(a)
        return whole(a, b)

    monkeypatch.setattr(hmac, "compare_digest", heard)
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in "abc"]
    keys = Keys.read(written(tmp_path, *({**ANN, "name": n, "sha256": h} for n, h in zip("abc", hashes, strict=True))))
    for presented, name in (("a", "a"), ("c", "c"), ("nobody's", None)):
        compared.clear()
        found = keys.check(presented)
        assert (found.name if found else None) == name
        assert compared == hashes


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '{"keys": 3}', '{"keys": [3]}', '{"keys": [{}]}', "[" * 100_000, "\xff",
        *(json.dumps({"keys": [{**ANN, **change}]}) for change in (
            {"name": "a b"}, {"name": 3}, {"name": ""}, {"sha256": "secret"}, {"sha256": HASH.upper()}, {"sha256": None},
            {"scopes": []}, {"scopes": ["root"]}, {"scopes": "use"}, {"scopes": None}, {"created": "yesterday"}, {"created": 3},
        )),
        json.dumps({"keys": [{k: v for k, v in ANN.items() if k != "sha256"}]}),
    ],
)  # fmt: skip
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, text: str):
    with pytest.raises(ArtifactError, match="not a key file · create a new one with `posttrain keys add`"):
        Keys.read(written(tmp_path, text=text))


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o660, 0o644, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int):
    path = written(tmp_path, ANN, mode=mode)
    with pytest.raises(ArtifactError, match=f"mode {mode:o} · 600 \\(only the owner\\) · chmod 600 "):
        Keys.read(path)
    with pytest.raises(ArtifactError, match="chmod 600"):
        add_key(path, "bob", ("use",))
    path.chmod(0o600)
    assert [key.name for key in Keys.read(path).keys] == ["ann"]


def test_two_keys_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="two keys with the same name"):
        Keys.read(written(tmp_path, ANN, ANN))
    path = written(tmp_path, ANN)
    with pytest.raises(RecipeError, match='a key named "ann" exists · choose another name'):
        add_key(path, "ann", ("use",))


def test_a_key_that_was_revoked_passes_no_longer(tmp_path: Path):
    path = tmp_path / "keys.json"
    ann, bob = add_key(path, "ann", ("use",)), add_key(path, "bob", ("use",))
    revoke_key(path, "ann")
    assert Keys.read(path).check(ann) is None
    assert Keys.read(path).check(bob) is not None
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RecipeError, match="no key 'ann' · there is: bob"):
        revoke_key(path, "ann")


def test_names_and_scopes_that_cannot_be_are_refused_and_nothing_is_written(tmp_path: Path):
    path = tmp_path / "keys.json"
    for name in ("", " ann", "ann\n", "a/b", "-a", "a" * 101, "\x1b[2J"):
        with pytest.raises(RecipeError, match="--name"):
            add_key(path, name, ("use",))
    for scopes in ((), ("root",), ("use", "root")):
        with pytest.raises(RecipeError, match="use, admin"):
            add_key(path, "ann", scopes)
    with pytest.raises(ArtifactError, match=r"keys\.json · cannot be read \(No such file or directory\)"):
        Keys.read(path)
    with pytest.raises(ArtifactError, match="cannot be written"):
        add_key(tmp_path / "nowhere" / "keys.json", "ann", ("use",))
    assert list(tmp_path.iterdir()) == []


def test_keys_that_are_made_at_once_are_all_there(tmp_path: Path):
    """Eight processes, five keys each, one file."""
    code = (
        "import sys; from pathlib import Path; from posttrain.serve.keys import add_key\n"
        "for n in range(5): add_key(Path(sys.argv[1]), f'k{sys.argv[2]}.{n}', ('use',))"
    )
    path = tmp_path / "keys.json"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(8)]
    assert [process.wait(60) for process in running] == [0] * 8
    names = {key.name for key in Keys.read(path).keys}
    assert names == {f"k{process}.{number}" for process in range(8) for number in range(5)}
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, ANN)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot be written \(No space left on device\)"):
        add_key(path, "bob", ("use",))
    assert [key.name for key in Keys.read(path).keys] == ["ann"]
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(tmp_path / "keys.json")
    assert main(["keys", "add", path, "--name", "ann"]) == 0
    ann = capsys.readouterr().out.strip()
    assert main(["keys", "add", path, "--name", "root", "--admin"]) == 0
    root = capsys.readouterr().out.strip()
    keys = Keys.read(Path(path))
    assert [key.scopes for key in (keys.check(ann), keys.check(root)) if key] == [("use",), ("use", "admin")]
    assert main(["keys", "list", path]) == 0
    listed = capsys.readouterr().out
    assert [line.split("  ")[:2] for line in listed.splitlines()] == [["ann", "use"], ["root", "use, admin"]]
    assert keys.keys[0].sha256 not in listed
    assert main(["keys", "revoke", path, "ann"]) == 0
    assert Keys.read(Path(path)).check(ann) is None
    assert main(["keys", "revoke", path, "ann"]) == 2
    assert main(["keys", "list", str(tmp_path / "none.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err

"""requirements.lock names what constraints.txt names, each release with the hashes of its files."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pins(text: str) -> list[str]:
    return re.findall(r"^[A-Za-z0-9._-]+==[^\s\\]+", text, re.MULTILINE)


def test_the_lock_has_the_releases_of_the_constraints_and_a_hash_of_each() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert pins(lock) == pins(constraints), "run scripts/lock"
    assert len(pins(lock)) > 50
    for entry in re.split(r"\n(?=[A-Za-z0-9])", lock)[1:]:
        first, *hashes = entry.rstrip("\n").split(" \\\n    ")
        assert pins(first) == [first]
        assert hashes, f"{first} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", found) for found in hashes), first
        assert hashes == sorted(set(hashes))


def test_the_lock_names_no_place_to_fetch_from() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|--trusted", lock)

"""Figures of stored verdicts: LLMBar's published rows again, its layout, and files that are something else."""

import json
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.errors import DataError
from posttrain.judge.audit import audit_stored
from posttrain.judge.stored_verdicts import read_verdicts


def verdicts(right: int, wrong: int, first: int, second: int) -> list[dict[str, str]]:
    """Pairs that are right or wrong in both orders, and pairs where the answer shown first or second is always preferred.

    In every other pair the gold answer is b.
    """
    orders = [("gold", "gold")] * right + [("other", "other")] * wrong
    rows = []
    for n, (ab, ba) in enumerate([*orders, *[("a", "b")] * first, *[("b", "a")] * second]):
        gold, other = ("a", "b") if n % 2 == 0 else ("b", "a")
        named = {"gold": gold, "other": other, "a": "a", "b": "b"}
        rows.append({"gold": gold, "ab": named[ab], "ba": named[ba], "category": "LLMBar"})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"verdicts:{path}"


@pytest.mark.parametrize(
    ("counts", "accuracy", "consistency", "first", "consistent"),
    [
        # GPT-4 on Natural (100 pairs): accuracy .955, consistency .950, share of first .505.
        ((93, 2, 3, 2), "95.5%", "95.0%", "50.5%", "97.9%"),
        # GPT-4 on the adversarial sets (319): accuracy .810, consistency .922.
        ((246, 48, 13, 12), "81.0%", "92.2%", "50.2%", "83.7%"),
        # ChatGPT on the adversarial sets: .270, .643, and .141 among the consistent verdicts: consistent and wrong.
        ((29, 176, 57, 57), "27.0%", "64.3%", "50.0%", "14.1%"),
    ],
)
def test_the_published_rows_of_llmbar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
    counts: tuple[int, int, int, int], accuracy: str, consistency: str, first: str, consistent: str,
) -> None:  # fmt: skip
    name = write(tmp_path / "v.jsonl", verdicts(*counts))
    passes = counts[0] > counts[1]
    assert main(["judge", "audit", name]) == (0 if passes else 1)
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line.strip())
    shown = {label: value.strip().split()[0] for label, value in lines.items() if value.strip()}
    assert shown["accuracy of single orders"] == accuracy
    assert shown["both orders agree"] == consistency
    assert shown["prefers the answer shown first"] == first
    assert shown["accuracy where they agree"] == consistent
    assert "changed by an injected instruction" not in shown


def test_llmbar_s_transcripts_are_read(tmp_path: Path) -> None:
    """`winner` names the output and not its place; `swap = True` shows output 2 first."""

    def pair(label: int, plain: str | None, swapped: str | None) -> dict[str, object]:
        results = [{"swap = False": {"completion": ["…", "stop"], "winner": plain}, "swap = True": {"winner": swapped}}]
        return {"input": "p", "output_1": "one", "output_2": "longer", "label": label, "results": results}

    file = tmp_path / "Natural.json"
    # Right twice, wrong twice, the first twice, the second twice, unreadable once.
    rows = [pair(2, "2", "2"), pair(1, "2", "2"), pair(1, "1", "2"), pair(2, "2", "1"), pair(1, "1", None)]
    file.write_text(json.dumps(rows))
    found = audit_stored("stored", read_verdicts(str(file)))
    assert (found["pairs"], found["decided"]) == (5, 2)
    assert (found["each_order"]["value"], found["each_order"]["n"]) == (round(5 / 9, 4), 9)
    assert (found["consistency"]["value"], found["consistency"]["n"]) == (0.5, 4)
    # Shown first preferred: pair 1 once, 2 once, 3 twice, 4 never, 5 once.
    assert (found["first"]["value"], found["first"]["n"]) == (round(5 / 9, 4), 9)
    assert found["by_category"].keys() == {"Natural"}
    assert found["prefers_longer"]["value"] == 1.0
    assert found["abstained"] == {"the orders contradict each other": 2, "a stored verdict is missing": 1}


def test_probabilities_and_limits(tmp_path: Path) -> None:
    name = write(tmp_path / "v.jsonl", [{"gold": "b", "ab": 0.2, "ba": 0.4}, {"gold": "a", "ab": 1, "ba": None}])  # type: ignore[dict-item]
    pairs = read_verdicts(name.removeprefix("verdicts:"))
    # The gold answer is b, and a is shown first in ab.
    assert (pairs[0].verdict.first, pairs[0].verdict.second) == pytest.approx((0.6, 0.8))
    assert pairs[0].verdict.probability == pytest.approx(0.7)
    assert (pairs[1].verdict.first, pairs[1].verdict.second) == (1.0, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"gold": "a", "ab": "a"}', "pair 1 · is not a stored verdict"),
        ('{"gold": "c", "ab": "a", "ba": "a"}', "pair 1"),
        ('{"gold": "a", "ab": 2, "ba": 0}', "pair 1"),
        ('{"gold": "a", "ab": true, "ba": 0}', "pair 1"),
        ('{"gold": "a", "ab": "a", "ba": "b"}\n[1]', "pair 2"),
        ('{"gold": "a"', "line 1 · not JSON"),
        ('[{"label": 1, "results": []}]', "pair 1"),
        ("", "no verdicts"),
        ("\n", "no verdicts"),
    ],
)
def test_other_files_are_refused_with_the_place(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "v.jsonl").write_text(text)
    with pytest.raises(DataError, match=found):
        read_verdicts(str(tmp_path / "v.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        read_verdicts(str(tmp_path / "none.jsonl"))

"""What changed between two texts, word by word.

A word keeps the white space after it, so the pieces joined are the texts, up to white space. A long text without common words
is one removal and one addition.
"""

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

# Texts of more words are not compared word by word: the time grows with the product of their lengths.
MOST_WORDS = 4000


class Piece(NamedTuple):
    """A run of words: `same` in both texts, `removed` from the first or `added` in the second."""

    kind: str
    text: str


def word_diff(before: str, after: str) -> list[Piece]:
    """The pieces in order; where words are replaced, the removed ones come first."""
    a, b = words_of(before), words_of(after)
    if max(len(a), len(b)) > MOST_WORDS:
        return _pieces([("removed", before), ("added", after)])
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in a], [w.strip() for w in b], autojunk=False)
    runs: list[tuple[str, str]] = []
    for code, i, j, k, m in matcher.get_opcodes():
        if code == "equal":
            # The last word of one text has no white space after it, and the other text may go on.
            runs.append(("same", "".join(b[k : m - 1]) + max(a[j - 1], b[m - 1], key=len)))
            continue
        runs += [("removed", "".join(a[i:j])), ("added", "".join(b[k:m]))]
    return _pieces(runs)


def words_of(text: str) -> list[str]:
    """Words with the white space that follows each."""
    return re.findall(r"\S+\s*|^\s+", text)


def changed_share(before: str, after: str) -> float:
    """Share of the words of both texts that the other one does not have: 0 for equal texts, 1 without a common word."""
    a, b = ([w.strip() for w in words_of(text)] for text in (before, after))
    if not a and not b:
        return 0.0
    same = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return 1 - 2 * same / (len(a) + len(b))


def as_text(pieces: Sequence[Piece]) -> str:
    """The pieces as one text: [-removed-] and {+added+}."""
    marks = {"same": ("", ""), "removed": ("[-", "-]"), "added": ("{+", "+}")}
    written = []
    for piece in pieces:
        left, right = marks[piece.kind]
        core = piece.text.strip()
        start = piece.text[: len(piece.text) - len(piece.text.lstrip())]
        end = piece.text[len(piece.text.rstrip()) :] if core else ""
        written.append(f"{start}{left}{core}{right}{end}" if core else piece.text)
    return "".join(written)


def _pieces(runs: Sequence[tuple[str, str]]) -> list[Piece]:
    return [Piece(kind, text) for kind, text in runs if text]

"""Bytes of a user's file become text, JSON, JSON lines or TOML: one reader for data, suites and recipes.

Text is UTF-8, with or without a byte-order mark. A row of JSON lines ends at a newline alone: U+2028 and U+0085 in a text are
part of it. An object that names a value twice is refused, since readers differ in which of the two they take. No torch.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from typing import Any

# Lists and tables inside each other in a recipe, a suite or one of its items.
MAX_DEPTH = 32
SURROGATE = re.compile("[\ud800-\udfff]")


class Unreadable(Exception):
    """What is wrong with a file and what to do. `line` counts from 1; 0 where there is none."""

    def __init__(self, found: str, *, do: str, line: int = 0) -> None:
        self.found, self.do, self.line = found, do, line
        super().__init__(found)


def decode_text(data: bytes) -> str:
    """The text of a file. Raises Unreadable where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The byte is told as its place in the file: the mark in front of the text counts.
        byte = error.start + 3 * data.startswith(b"\xef\xbb\xbf")
        line = data[:byte].count(b"\n") + 1
        raise Unreadable(f"not UTF-8 text (byte {byte})", do="save the file as UTF-8", line=line) from None


def parse_json(text: str) -> Any:
    """One JSON value. Raises Unreadable; NaN and infinities are read, as Python writes them."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        reason = str(error).split(":")[0]
        raise Unreadable(f"not JSON ({reason})", do="write one JSON object a line", line=line) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unreadable(f'two values named "{_twice([name for name, _ in pairs])[:60]}"', do="keep one of them")
    return found


def _twice(names: list[str]) -> str:
    """The first name that was there before."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, from 1, and its value. Raises Unreadable with the line."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except Unreadable as bad:
            raise Unreadable(bad.found, do=bad.do, line=number) from None
        yield number, value


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises Unreadable, also where they are nested deeper than `MAX_DEPTH`."""
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise Unreadable("not TOML: nested too deeply", do="correct that line") from None
    except ValueError as error:  # also a whole number of thousands of digits
        raise Unreadable(f"not TOML: {error}", do="correct that line") from None
    if (reason := unusable(tables, numbers=False)) is not None:
        raise Unreadable(reason, do="correct it")
    return tables


def unusable(value: Any, *, numbers: bool = True) -> str | None:
    """Why a value cannot be kept and compared, or None: nested too deeply, half of a character; with `numbers` also one that is
    not finite or has more than 64 bits."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return f"lists or tables nested deeper than {MAX_DEPTH}"
        if isinstance(part, str) and SURROGATE.search(part):
            return "half of a character (a lone surrogate)"
        if (
            numbers
            and isinstance(part, int | float)
            and not (math.isfinite(part) if isinstance(part, float) else abs(part) < 2**63)
        ):
            return "a number that is not finite, or has more than 64 bits"
        if isinstance(part, dict):
            waiting += [(one, depth + 1) for pair in part.items() for one in pair]
        elif isinstance(part, list):
            waiting += [(one, depth + 1) for one in part]
    return None

"""Parse the files of a user: text, JSON, JSON lines and TOML, for data, suites and recipes.

Text is UTF-8, with or without a byte-order mark. Only a newline ends a row of JSON lines; U+2028 and U+0085 are part of the
text. Duplicate keys in an object are refused, since readers differ in which value they use. No torch.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from typing import Any

# Maximum nesting of lists and tables in a recipe, a suite or an item.
MAX_DEPTH = 32
SURROGATE = re.compile("[\ud800-\udfff]")


class Unreadable(Exception):
    """A problem of a file and its remedy. `line` counts from 1; 0 if unknown."""

    def __init__(self, found: str, *, do: str, line: int = 0) -> None:
        self.found, self.do, self.line = found, do, line
        super().__init__(found)


def decode_text(data: bytes) -> str:
    """The text of a file. Raises Unreadable if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset is that in the file, including the byte-order mark.
        byte = error.start + 3 * data.startswith(b"\xef\xbb\xbf")
        line = data[:byte].count(b"\n") + 1
        raise Unreadable(f"not UTF-8 text (byte {byte})", do="save the file as UTF-8", line=line) from None


def parse_json(text: str) -> Any:
    """One JSON value. NaN and infinities are accepted, as Python writes them. Raises Unreadable."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        reason = str(error).split(":")[0]
        raise Unreadable(f"not JSON ({reason})", do="write one JSON object a line", line=line) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise Unreadable(f'two values named "{_duplicate([name for name, _ in pairs])[:60]}"', do="keep one of them")
    return values


def _duplicate(names: list[str]) -> str:
    """The first duplicate name."""
    earlier: set[str] = set()
    return next(name for name in names if name in earlier or earlier.add(name))  # type: ignore[func-returns-value]


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """The line number (from 1) and value of each non-blank line. Raises Unreadable with the line."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except Unreadable as bad:
            raise Unreadable(bad.found, do=bad.do, line=number) from None
        yield number, value


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises Unreadable, also if they are nested deeper than `MAX_DEPTH`."""
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise Unreadable("not TOML: nested too deeply", do="correct that line") from None
    except ValueError as error:  # also an integer with thousands of digits
        raise Unreadable(f"not TOML: {error}", do="correct that line") from None
    if (reason := unusable(tables, numbers=False)) is not None:
        raise Unreadable(reason, do="correct it")
    return tables


def unusable(value: Any, *, numbers: bool = True) -> str | None:
    """Why a value cannot be stored or compared, or None: too deeply nested, a lone surrogate, or with `numbers` a number that
    is not finite or has more than 64 bits."""
    pending = [(value, 0)]
    while pending:
        part, depth = pending.pop()
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
            pending += [(nested, depth + 1) for pair in part.items() for nested in pair]
        elif isinstance(part, list):
            pending += [(nested, depth + 1) for nested in part]
    return None

"""Size limits for the values of chat templates, checked before a value is created. `data/sandbox.py` installs them in Jinja.

    size      a text has at most MAX_VALUE characters, a list at most MAX_ITEMS items including nested ones (a list that
              contains itself twice, thirty levels deep, has a billion items to compare or print), a number at most
              MAX_NUMBER_BITS
    sum       all values of one render take at most MAX_BYTES, whether they are still in use or not

Iterators become lists at once, so that a chain of filters cannot create uncounted values.
"""

import threading
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from typing import Any

# The largest text (characters), list (items including nested ones) and number (bits) of a template.
MAX_VALUE = 4 * 1024 * 1024
MAX_ITEMS = 100_000
MAX_NUMBER_BITS = 4096
MAX_BYTES = 128 * 1024 * 1024
# Limit of character comparisons: searching backwards and stripping compare every pair of characters.
_MAX_COMPARED = 50_000_000
# Bytes per item of a list.
_ITEM_BYTES = 64
# Line ends and white space as in Python's string methods.
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SPACES = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())


# Bytes of all values of the current render, by thread.
_SPENT = threading.local()


def begin_render() -> None:
    """Reset the byte count of this thread at the start of a render."""
    _SPENT.bytes = 0


# --- sizes ------------------------------------------------------------------------------------------------------------


def limit(size: int) -> None:
    """Raise OverflowError for a text with too many characters."""
    if size > MAX_VALUE:
        raise OverflowError(f"a value of more than {MAX_VALUE} characters or items")


def limit_items(items: int) -> None:
    """Raise OverflowError for a list with too many items."""
    if items > MAX_ITEMS:
        raise OverflowError(f"a list of more than {MAX_ITEMS} items")


def spend(size: int) -> None:
    """Count the bytes of a new value."""
    _SPENT.bytes += size
    if _SPENT.bytes > MAX_BYTES:
        raise OverflowError(f"values of more than {MAX_BYTES // 2**20} MiB")


def checked(value: Any) -> Any:
    """Check a new value: its size and its type. Iterators become lists."""
    if isinstance(value, str):
        limit(len(value))
        spend(value.__sizeof__())
        # Only plain str: Markup would escape the text that is added to it.
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, list | tuple | dict):
        limit_deep(value)
        spend(len(value) * _ITEM_BYTES)
    elif isinstance(value, int):
        if value.bit_length() > MAX_NUMBER_BITS:
            raise OverflowError("a number that is too large")
    elif isinstance(value, Iterator | KeysView | ValuesView | ItemsView):
        return listed(value)
    elif isinstance(value, bytes | bytearray | memoryview | complex | set | frozenset):
        raise TypeError(f"a value of the kind {type(value).__name__}")
    return value


def listed(values: Iterable[Any]) -> list[Any]:
    """Convert values to a list, counting them one by one."""
    if isinstance(values, str):
        limit_items(len(values))
    items: list[Any] = []
    characters = 0
    for value in values:
        characters += len(value) if isinstance(value, str) else 0
        limit_items(len(items) + 1)
        limit(characters)
        items.append(value)
    return list(checked(items))


def limit_deep(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> None:
    """Check a container with its nested items. Repeated references count each time, as printing and comparing visit them."""
    items, characters = 0, 0
    pending: list[Any] = [value]
    while pending:
        container = pending.pop()
        items += len(container)
        limit_items(items)
        for item in (*container, *container.values()) if isinstance(container, dict) else container:
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, list | tuple | dict):
                pending.append(item)
    limit(characters)


def concat(parts: Iterable[Any]) -> str:
    """Concatenate parts."""
    texts: list[str] = []
    size = 0
    for part in parts:
        text = text_of(part)
        size += len(text)
        limit(size)
        texts.append(text)
    joined = "".join(texts)
    spend(joined.__sizeof__())
    return joined


def text_of(value: Any) -> str:
    """Convert a value to text."""
    if isinstance(value, str):
        return value
    text = str(value)
    limit(len(text))
    spend(text.__sizeof__())
    return text


# --- operators --------------------------------------------------------------------------------------------------------


def multiply(left: Any, right: Any) -> Any:
    """`left * right`."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str) and isinstance(times, int):
            limit(len(sequence) * times)
        elif isinstance(sequence, list | tuple) and isinstance(times, int):
            limit_items(len(sequence) * times)
    return checked(left * right)


def power(left: Any, right: Any) -> Any:
    """`left ** right`."""
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_NUMBER_BITS:
        raise OverflowError("a number that is too large")
    return checked(left**right)


def add(left: Any, right: Any) -> Any:
    """`left + right`."""
    if isinstance(left, str) and isinstance(right, str):
        limit(len(left) + len(right))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        limit_items(len(left) + len(right))
    return checked(left + right)


def modulo(left: Any, right: Any) -> Any:
    """`left % right`, of numbers."""
    if isinstance(left, str):
        raise TypeError("text cannot be formatted with %")
    return checked(left % right)


def sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """`value[start:stop:step]`."""
    return checked(value[start:stop:step])


# --- methods of texts ---------------------------------------------------------------------------------------------------


def limit_compared(text: str, other: Any) -> None:
    """Raise OverflowError for two texts whose comparison is too expensive."""
    if isinstance(other, str) and len(text) * len(other) > _MAX_COMPARED:
        raise OverflowError("texts that are too long to compare")


def check_replace(text: str, old: str, new: str, count: int = -1) -> None:
    """Raise OverflowError for a replacement with a too long result."""
    occurrences = text.count(old)
    limit(len(text) + (occurrences if count < 0 else min(count, occurrences)) * len(new))


def _check_join(separator: str, parts: Sequence[Any]) -> None:
    limit(len(parts) * (len(separator) + 1) + sum(len(p) for p in parts if isinstance(p, str)))


def _check_pieces(text: str, separator: str | None = None, maxsplit: int = -1) -> None:
    if separator is not None:
        limit_compared(text[:1], separator)
    pieces = 1 + (text.count(separator) if separator else sum(text.count(space) for space in _SPACES))
    limit_items(pieces if maxsplit < 0 else min(maxsplit + 1, pieces))


def lines_in(text: str) -> int:
    """The maximum number of lines."""
    return 1 + sum(text.count(end) for end in _LINE_ENDS)


def check_lines(text: str, *_: Any) -> None:
    """Raise OverflowError for a text with too many lines."""
    limit_items(lines_in(text))


def _check_backwards(text: str, other: Any = None, *_: Any) -> None:
    limit_compared(text, other)


def _check_rsplit(text: str, separator: str | None = None, maxsplit: int = -1) -> None:
    limit_compared(text, separator)
    _check_pieces(text, separator, maxsplit)


# The check before each string method.
CHECKS: dict[str, Callable[..., None]] = {
    "replace": check_replace, "join": _check_join, "split": _check_pieces, "rsplit": _check_rsplit,
    "splitlines": check_lines, "rfind": _check_backwards, "rindex": _check_backwards, "rpartition": _check_backwards,
    "strip": _check_backwards, "lstrip": _check_backwards, "rstrip": _check_backwards,
}  # fmt: skip

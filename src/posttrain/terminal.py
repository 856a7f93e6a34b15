"""Output to the terminal, with control characters of data, names and answers escaped.

An escape sequence could move the cursor, rename the window or write the clipboard; a bidirectional override changes the order
of the displayed text. Newline and tab are kept. Files are not changed. JSON output stays valid JSON with the same meaning.
"""

import re
import sys

# C0 except tab and newline, DEL, C1; line separators; bidirectional embeddings, overrides and isolates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters escaped, such as \\u001b."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def show_text(text: object) -> None:
    """Print the result of a command on standard output."""
    print(printable(str(text)), flush=True)


def say(text: object) -> None:
    """Print a message on standard error."""
    print(printable(str(text)), file=sys.stderr, flush=True)

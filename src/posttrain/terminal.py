"""Text on its way to a person: control characters of data, names and answers are spelled out, so that none reaches a terminal.

An escape could move the cursor, rename the window or write a clipboard; a bidirectional override shows a text in another order
than it has. Newline and tab stay. Files are written as they are. JSON that is shown stays JSON: in its texts the spelling of a
character means that character.
"""

import re
import sys

# C0 but tab and newline, DEL, C1; separators of lines; embeddings, overrides and isolates of direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with each control character spelled, such as \\u001b."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def show_text(text: object) -> None:
    """A line, or several, of what a command found, on standard output."""
    print(printable(str(text)), flush=True)


def say(text: object) -> None:
    """A line of what is going on, on standard error."""
    print(printable(str(text)), file=sys.stderr, flush=True)

"""Parse the cells of a row: texts, numbers, and conversations in the formats of data files.

    [{"role", "content"}]                    messages
    [{"from", "value"}]                      ShareGPT
    "\\n\\nHuman: …\\n\\nAssistant: …"       hh-rlhf

`formats.py` selects the columns of a record and parses each of them here. An invalid cell raises `BadRow`.
"""

import math
import re
from typing import Any

from posttrain.data.meaning import unsupported_in_turn, untrained_reason
from posttrain.reading import SURROGATE
from posttrain.records import ROLES, Message, Role

_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
# A number as written in CSV files. `float` also accepts "1_000", "infinity" and digits of other scripts.
_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class BadRow(Exception):
    """A row that cannot be used; its text is the reason. `unread` names a field that training does not support."""

    def __init__(self, reason: str, unread: str = "") -> None:
        self.unread = unread
        super().__init__(reason)


def unread(name: str) -> BadRow:
    """The error for a row whose meaning depends on an unsupported field."""
    return BadRow(f"{name}: not supported, and without it the row means something else", name)


def text_of(value: Any, name: str) -> str:
    """A cell that must be text. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text but {type(value).__name__}")
    if SURROGATE.search(value):  # JSON can contain a lone surrogate ("\\ud83d"), which UTF-8 cannot encode
        raise BadRow(f"{name} holds half of a character (a lone surrogate)")
    return value


def label_of(value: Any) -> str:
    """A cell used as a label: its text, or an empty string if it has no valid text."""
    text = "" if value is None or isinstance(value, list | dict) else str(value)
    return "" if SURROGATE.search(text) else text


def number_of(value: Any, name: str) -> float | None:
    """A number or a numeral (CSV cells are all text); None for an empty cell. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and _NUMERAL.fullmatch(value.strip()):
        value = float(value)
    # Check the range of integers first: math.isfinite fails for integers with hundreds of digits.
    is_integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if not is_integer and not (isinstance(value, float) and math.isfinite(value)):
        raise BadRow(f"{name} is not a finite number")
    return float(value)


def is_transcript(value: Any) -> bool:
    """Whether a cell starts like a transcript of hh-rlhf."""
    return isinstance(value, str) and _HH_TURN.match(value) is not None


def side_of(value: Any, role: Role, name: str) -> tuple[Message, ...]:
    """Parse a text (one turn of `role`), a transcript or a list of messages. Raises BadRow."""
    if isinstance(value, str):
        return transcript_of(value, name) if is_transcript(value) else (Message(role, text_of(value, name)),)
    return messages_of(value, name)


def conversation_of(value: Any, name: str) -> tuple[Message, ...]:
    """Parse a whole conversation, given as messages or as a transcript. Raises BadRow."""
    return transcript_of(value, name) if isinstance(value, str) else messages_of(value, name)


def transcript_of(text: str, name: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf transcript. Raises BadRow."""
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise BadRow(f'{name} is not a "Human: … Assistant: …" transcript')
    turns = zip(parts[1::2], parts[2::2], strict=True)
    messages = tuple(
        Message("user" if speaker == "Human" else "assistant", text_of(text.strip(), name)) for speaker, text in turns
    )
    # A separate prompt often ends with "Assistant:", where the completions begin.
    return messages[:-1] if name == "prompt" and messages[-1] == Message("assistant", "") else messages


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """A list of {"role", "content"}. Raises BadRow."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is not a list of messages")
    return tuple(
        _turn(
            turn, "role", "content", {role: role for role in ROLES}, f"{name} has a turn without a role of {', '.join(ROLES)}"
        )
        for turn in value
    )


def sharegpt_of(value: Any) -> tuple[Message, ...]:
    """ShareGPT's list of {"from", "value"}, or of messages. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow("conversations is not a list")
    if value and isinstance(value[0], dict) and "role" in value[0]:
        return messages_of(value, "conversations")
    return tuple(
        _turn(turn, "from", "value", _SHAREGPT_ROLES, "a turn without a known from (human, gpt, system)") for turn in value
    )


def _turn(turn: Any, speaker: str, content_key: str, roles: dict[str, Role], problem: str) -> Message:
    """Parse one turn. `problem` is the reason of BadRow for an unknown speaker."""
    if not isinstance(turn, dict):
        raise BadRow(problem)
    if (name := unsupported_in_turn(turn, speaker, content_key)) is not None:
        raise unread(name)
    role_name = turn.get(speaker)
    role = roles.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise BadRow(problem)
    if role == "assistant" and (name := untrained_reason(turn)) is not None:
        raise unread(name)
    return Message(role, text_of(turn.get(content_key), content_key))


def exchanges_of(value: Any, name: str) -> tuple[Message, ...]:
    """Alpaca's earlier turns: a list of [question, answer]. Raises BadRow."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRow(f"{name} is not a list of [question, answer]")
    roles: tuple[Role, Role] = ("user", "assistant")
    return tuple(Message(role, text_of(text, name)) for pair in value for role, text in zip(roles, pair, strict=True))

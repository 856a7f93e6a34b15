"""What the cells of a row say: texts, numbers, and conversations in the forms that files have.

    [{"role", "content"}]                    messages
    [{"from", "value"}]                      ShareGPT
    "\\n\\nHuman: …\\n\\nAssistant: …"       hh-rlhf

Where it stands: `formats.py` knows which columns make a record, and asks here for each. A cell that cannot be read is a
`BadRow`.
"""

import math
import re
from typing import Any

from posttrain.data.meaning import not_trained, turn_says_more
from posttrain.reading import SURROGATE
from posttrain.records import ROLES, Message, Role

_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
# A number as a CSV file spells it; `float` would also take "1_000", "infinity" and digits of other scripts.
_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class BadRow(Exception):
    """A row that cannot be learned from; its text is the reason. `unread` names what it says and training does not read."""

    def __init__(self, reason: str, unread: str = "") -> None:
        self.unread = unread
        super().__init__(reason)


def unread(name: str) -> BadRow:
    """A row that would be taken for another one without what it says under `name`."""
    return BadRow(f"{name}: not supported, and without it the row means something else", name)


def text_of(value: Any, name: str) -> str:
    """A cell that must be text. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text but {type(value).__name__}")
    if SURROGATE.search(value):  # JSON can spell half of a character ("\\ud83d"), which no text can hold
        raise BadRow(f"{name} holds half of a character (a lone surrogate)")
    return value


def label_of(value: Any) -> str:
    """A cell that only names something: its text, or nothing where it has none that can be written."""
    text = "" if value is None or isinstance(value, list | dict) else str(value)
    return "" if SURROGATE.search(text) else text


def number_of(value: Any, name: str) -> float | None:
    """A number, also one that is spelled, as all cells of a CSV file are; None for an empty cell. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and _NUMERAL.fullmatch(value.strip()):
        value = float(value)
    # A float first: whether a whole number of hundreds of digits is finite cannot be asked.
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if not whole and not (isinstance(value, float) and math.isfinite(value)):
        raise BadRow(f"{name} is not a finite number")
    return float(value)


def is_transcript(value: Any) -> bool:
    """Whether a cell begins as hh-rlhf's transcripts do."""
    return isinstance(value, str) and _HH_TURN.match(value) is not None


def side_of(value: Any, role: Role, name: str) -> tuple[Message, ...]:
    """Text is one turn of `role`; a transcript and a list of messages are what they say. Raises BadRow."""
    if isinstance(value, str):
        return transcript_of(value, name) if is_transcript(value) else (Message(role, text_of(value, name)),)
    return messages_of(value, name)


def whole_of(value: Any, name: str) -> tuple[Message, ...]:
    """A whole conversation given as messages or as a transcript. Raises BadRow."""
    return transcript_of(value, name) if isinstance(value, str) else messages_of(value, name)


def transcript_of(text: str, name: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf transcript. Raises BadRow."""
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise BadRow(f'{name} is not a "Human: … Assistant: …" transcript')
    turns = zip(parts[1::2], parts[2::2], strict=True)
    found = tuple(Message("user" if who == "Human" else "assistant", text_of(said.strip(), name)) for who, said in turns)
    # A prompt of its own often ends in "Assistant:", where the sides begin.
    return found[:-1] if name == "prompt" and found[-1] == Message("assistant", "") else found


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


def _turn(turn: Any, speaker: str, said: str, roles: dict[str, Role], otherwise: str) -> Message:
    """One turn; `otherwise` says what it is where nobody known speaks."""
    if not isinstance(turn, dict):
        raise BadRow(otherwise)
    if (name := turn_says_more(turn, speaker, said)) is not None:
        raise unread(name)
    who = turn.get(speaker)
    role = roles.get(who) if isinstance(who, str) else None
    if role is None:
        raise BadRow(otherwise)
    if role == "assistant" and (name := not_trained(turn)) is not None:
        raise unread(name)
    return Message(role, text_of(turn.get(said), said))


def exchanges_of(value: Any, name: str) -> tuple[Message, ...]:
    """Alpaca's earlier turns: a list of [question, answer]. Raises BadRow."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRow(f"{name} is not a list of [question, answer]")
    roles: tuple[Role, Role] = ("user", "assistant")
    return tuple(Message(role, text_of(said, name)) for pair in value for role, said in zip(roles, pair, strict=True))

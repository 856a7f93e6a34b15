"""What the readers of `formats.py` return: valid records, the problems of other rows, and a description of each source."""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from posttrain.records import Conversation, Message, PreferencePair


class Problem(NamedTuple):
    """A dropped row and the reason. `unread` names an unsupported field that changes the meaning of the row."""

    source: str
    row: str
    reason: str
    unread: str = ""


class SourceInfo(NamedTuple):
    """One source: its path, layout, number of rows and hash."""

    path: str
    layout: str
    rows: int
    sha256: str


class Demonstrations(NamedTuple):
    """Valid conversations, and the problems of other rows."""

    records: tuple[Conversation, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]


class Preferences(NamedTuple):
    """Valid pairs, and the problems of other rows."""

    records: tuple[PreferencePair, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document without roles, as in pretraining."""

    id: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages for a policy to answer, and the category of the row."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    category: str = ""


R = TypeVar("R", Conversation, PreferencePair, PlainText, Prompt)


class Texts(NamedTuple):
    """Valid documents, and the problems of other rows."""

    records: tuple[PlainText, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]


class Prompts(NamedTuple):
    """Valid prompts, and the problems of other rows."""

    records: tuple[Prompt, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]

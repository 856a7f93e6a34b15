"""Locate the assistant's turns in the rendering of a conversation, and check that it contains every text.

A turn can be trained if both its prompt and the conversation up to it are prefixes of the whole rendering. Some templates
rewrite earlier turns (they drop old reasoning); such turns are only context.

Rendering every prefix takes time quadratic in the number of turns. Beyond `EXACT_TURNS`, the text that a turn adds is therefore
taken from a short window: the leading system messages, the previous exchange, and the turn. The windows must add up to the
whole rendering, and the prefixes of a half, a quarter, ... of the turns are rendered and compared. If anything differs, all of
these turns are context.
"""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from posttrain.errors import DataError
from posttrain.records import Message, Role

# Renders messages with or without the generation prompt.
Render = Callable[[Sequence[Message], bool], str]
EXACT_TURNS = 8
# Reasoning at the start of an answer ends with a closing tag or a newline.
_END_OF_REASONING = re.compile(r"</[^<>\n]*>|\[/[A-Z]+\]|\n")


class Turn(NamedTuple):
    """The index of an assistant message, and the range of the rendering that it adds."""

    message: int
    begin: int
    end: int


class Rendering(NamedTuple):
    """A rendered conversation, with the assistant's turns that the template did not rewrite."""

    text: str
    turns: tuple[Turn, ...]


def render_turns(render: Render, messages: Sequence[Message], *, generation_prompt: bool) -> Rendering:
    """Render a conversation and locate its turns. Raises DataError if the template rejects the messages."""
    text = render(messages, generation_prompt)
    indices = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(indices) <= EXACT_TURNS:
        return Rendering(text, _exact(render, messages, text, indices))
    try:
        return Rendering(text, _by_windows(render, messages, text, indices))
    except DataError:  # the template rejects a window
        return Rendering(text, ())


def _exact(render: Render, messages: Sequence[Message], text: str, indices: Sequence[int]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    end = 0
    for index in indices:
        try:
            before = render(messages[:index], True)
            after = render(messages[: index + 1], False)
        except DataError:
            continue
        if text.startswith(after) and after.startswith(before) and len(before) >= end:
            end = len(after)
            turns.append(Turn(index, len(before), end))
    return tuple(turns)


def _by_windows(render: Render, messages: Sequence[Message], text: str, indices: Sequence[int]) -> tuple[Turn, ...]:
    lead = list(takewhile(lambda message: message.role == "system", messages))
    turns = [*_exact(render, messages, text, indices[:2])]
    if len(turns) < 2:
        return ()
    for before_previous, previous, current in zip(indices, indices[1:], indices[2:], strict=False):
        window = [*lead, *messages[before_previous + 1 : current + 1]]
        earlier = render(window[: previous - current], False)
        before = render(window[:-1], True)
        after = render(window, False)
        begin = turns[-1].end + len(before) - len(earlier)
        turn = Turn(current, begin, begin + len(after) - len(before))
        extends = after.startswith(before) and before.startswith(earlier)
        if not extends or text[turns[-1].end : turn.end] != after[len(earlier) :]:
            return ()
        turns.append(turn)
    checked = len(turns) - 1
    while checked > 1:
        message_index, begin, end = turns[checked]
        if render(messages[:message_index], True) != text[:begin] or render(messages[: message_index + 1], False) != text[:end]:
            return ()
        checked //= 2
    return tuple(turns)


def roles_left_out(render: Render, shape: Sequence[tuple[Role, bool]], *, generation_prompt: bool) -> frozenset[Role]:
    """Roles whose messages a template drops, found with placeholder texts.

    `shape` has the role of each message and whether it has text. Raises DataError if the template rejects the messages.
    """
    texts = [f"\ue002{index}\ue003" if spoken else "" for index, (_, spoken) in enumerate(shape)]
    stand_ins = [Message(role, text) for (role, _), text in zip(shape, texts, strict=True)]
    rendered = render(stand_ins, generation_prompt)
    return frozenset(m.role for m in stand_ins if m.content not in rendered)


def text_left_out(messages: Sequence[Message], rendering: Rendering) -> Message | None:
    """The first message whose text is missing in the rendering, ignoring white space. For a rewritten answer only its end
    counts."""
    text, unchanged_turns = rendering.text, {turn.message for turn in rendering.turns}
    search_from, words = 0, None
    for index, message in enumerate(messages):
        content = message.content.strip()
        if message.role == "assistant" and index not in unchanged_turns:
            content = _END_OF_REASONING.split(content)[-1].strip()
        position = text.find(content, search_from)
        if position < 0:
            position = text.find(content)
        if position >= 0:
            search_from = position + len(content)
            continue
        words = " ".join(text.split()) if words is None else words
        if " ".join(content.split()) not in words:
            return message
    return None

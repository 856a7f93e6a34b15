"""Where the assistant's turns begin and end in the rendering of a conversation, and whether every text is in it.

A turn can be trained, and its ids are fixed, where both its prompt and the conversation up to it are beginnings of the
whole rendering. Some templates rewrite earlier turns (they drop old reasoning): such a turn is context and nothing more.

To render every beginning of a conversation takes a time that grows with the square of its turns. Beyond `EXACT_TURNS`, what a
turn adds is therefore read off a short window of the conversation: its leading system messages, the exchange before, and
the turn. What the windows add up to must be the whole rendering, and the beginnings of a half, a quarter, ... of
the turns are rendered and compared. Where anything differs, all of these turns are context.
"""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from posttrain.errors import DataError
from posttrain.records import Message, Role

# Renders messages, with or without the beginning of an answer behind them.
Render = Callable[[Sequence[Message], bool], str]
EXACT_TURNS = 8
# Reasoning stands at the beginning of an answer and ends with a closing tag or a line.
_END_OF_REASONING = re.compile(r"</[^<>\n]*>|\[/[A-Z]+\]|\n")


class Turn(NamedTuple):
    """An assistant message by its place among the messages, and where what it adds to the rendering begins and ends."""

    message: int
    begin: int
    end: int


class Rendering(NamedTuple):
    """A conversation as text, with the assistant's turns that the template left as they were."""

    text: str
    turns: tuple[Turn, ...]


def render_turns(render: Render, messages: Sequence[Message], *, generation_prompt: bool) -> Rendering:
    """Raises DataError where the template refuses the messages."""
    text = render(messages, generation_prompt)
    places = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(places) <= EXACT_TURNS:
        return Rendering(text, _exact(render, messages, text, places))
    try:
        return Rendering(text, _by_windows(render, messages, text, places))
    except DataError:  # a template that refuses a window is none that can be followed
        return Rendering(text, ())


def _exact(render: Render, messages: Sequence[Message], text: str, places: Sequence[int]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    done = 0
    for index in places:
        try:
            before = render(messages[:index], True)
            after = render(messages[: index + 1], False)
        except DataError:
            continue
        if text.startswith(after) and after.startswith(before) and len(before) >= done:
            done = len(after)
            turns.append(Turn(index, len(before), done))
    return tuple(turns)


def _by_windows(render: Render, messages: Sequence[Message], text: str, places: Sequence[int]) -> tuple[Turn, ...]:
    lead = list(takewhile(lambda message: message.role == "system", messages))
    turns = [*_exact(render, messages, text, places[:2])]
    if len(turns) < 2:
        return ()
    for one, two, three in zip(places, places[1:], places[2:], strict=False):
        window = [*lead, *messages[one + 1 : three + 1]]
        earlier = render(window[: two - three], False)
        before = render(window[:-1], True)
        after = render(window, False)
        begin = turns[-1].end + len(before) - len(earlier)
        turn = Turn(three, begin, begin + len(after) - len(before))
        whole = after.startswith(before) and before.startswith(earlier)
        if not whole or text[turns[-1].end : turn.end] != after[len(earlier) :]:
            return ()
        turns.append(turn)
    looked_at = len(turns) - 1
    while looked_at > 1:
        place, begin, end = turns[looked_at]
        if render(messages[:place], True) != text[:begin] or render(messages[: place + 1], False) != text[:end]:
            return ()
        looked_at //= 2
    return tuple(turns)


def roles_left_out(render: Render, shape: Sequence[tuple[Role, bool]], *, generation_prompt: bool) -> frozenset[Role]:
    """Roles of which a template leaves a message out, told by texts that stand in for those of the messages.

    `shape` has the role of each message and whether it has a text. Raises DataError where the template refuses them.
    """
    texts = [f"\ue002{index}\ue003" if spoken else "" for index, (_, spoken) in enumerate(shape)]
    stand_ins = [Message(role, text) for (role, _), text in zip(shape, texts, strict=True)]
    rendered = render(stand_ins, generation_prompt)
    return frozenset(m.role for m in stand_ins if m.content not in rendered)


def text_left_out(messages: Sequence[Message], rendering: Rendering) -> Message | None:
    """The first message whose text, but for white space, is not in the rendering; of an answer that is context, its end."""
    text, whole = rendering.text, {turn.message for turn in rendering.turns}
    place, words = 0, None
    for index, message in enumerate(messages):
        said = message.content.strip()
        if message.role == "assistant" and index not in whole:
            said = _END_OF_REASONING.split(said)[-1].strip()
        found = text.find(said, place)
        if found < 0:
            found = text.find(said)
        if found >= 0:
            place = found + len(said)
            continue
        words = " ".join(text.split()) if words is None else words
        if " ".join(said.split()) not in words:
            return message
    return None

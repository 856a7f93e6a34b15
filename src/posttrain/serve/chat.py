"""Chat in the terminal: answers stream, stages of a run are switched without loading the base again.

Commands inside: `/adapter NAME` switches, `/reset` forgets the conversation, `/help`, `/quit`. With `beside`, every line
is answered by several stages, and each keeps its own conversation. What a model writes is text to a terminal and never a
command to it: control characters are replaced. Left out: editing of lines, which the terminal does.
"""

import re
import sys
from collections.abc import Iterator
from typing import TextIO

from posttrain.errors import ModelError, PosttrainError
from posttrain.generate.engine import SamplingSettings, stream
from posttrain.models.target import Target
from posttrain.records import Message

# All control characters but tab and newline: with an escape a model could move the cursor or write a clipboard.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = "/adapter NAME switches to another stage · /reset forgets the conversation · /quit ends"


def chat(
    target: Target, settings: SamplingSettings, *, system: str = "", beside: tuple[str, ...] = (),
    source: TextIO | None = None, out: TextIO | None = None,
) -> int:  # fmt: skip
    """Read lines from `source` (standard input) and answer them on `out` until it ends. Returns the exit code."""
    talk = _Talk(target, settings, system, beside or (target.policy,), out or sys.stdout)
    for name in talk.speakers:
        talk.check(name)
    lines = source or sys.stdin
    talk.say(f"{target.base.source.model} · {', '.join(talk.speakers)} · {HELP}\n")
    while True:
        talk.say("you> ")
        try:
            line = lines.readline()
        except KeyboardInterrupt:
            line = ""
        if not line or line.strip() in ("/quit", "/exit"):
            talk.say("\n")
            return 0
        if line.strip():
            try:
                talk.handle(line.strip())
            except PosttrainError as error:  # a mistake in one line does not end the conversation
                talk.say(f"error: {error}\n")
            except KeyboardInterrupt:  # ends the answer, which is forgotten
                talk.say("\n")


class _Talk:
    """The conversations of the speakers."""

    def __init__(self, target: Target, settings: SamplingSettings, system: str, speakers: tuple[str, ...], out: TextIO) -> None:
        self.target, self.settings, self.speakers, self.out = target, settings, speakers, out
        self.opening = [Message("system", system)] if system else []
        self.histories = {name: list(self.opening) for name in speakers}

    def say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def check(self, name: str) -> None:
        if name not in self.target.names:
            raise ModelError("chat", f'"{name}" is not a stage here', allowed=f"there is: {', '.join(self.target.names)}")

    def handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/adapter":
            name = argument.strip()
            self.check(name)
            # the new speaker goes on with the conversation so far
            self.histories = {name: next(iter(self.histories.values()))}
            self.speakers = (name,)
            self.say(f"now {name}\n")
        elif command == "/reset":
            self.histories = {name: list(self.opening) for name in self.speakers}
            self.say("forgotten\n")
        elif line.startswith("/"):
            self.say(HELP + "\n")
        else:
            for name in self.speakers:
                self.answer(name, line)

    def answer(self, name: str, line: str) -> None:
        """Stream one answer; it joins the history only when it is whole."""
        chat_format = self.target.base.chat
        asked = [*self.histories[name], Message("user", line)]
        prompt = chat_format.encode_prompt(asked)
        room, longest = self.target.base.context, self.settings.max_new_tokens
        if len(prompt) + longest > room:
            raise ModelError(
                "chat", f"the conversation has {len(prompt)} tokens and an answer may take {longest}",
                allowed=f"together at most {room}", do="/reset forgets it, --max-new-tokens shortens the answers",
            )  # fmt: skip
        adapter = self.target.policies.activate(name)
        self.say(f"{name}> ")
        text = ""
        for piece in _texts(self.target, prompt, self.settings, adapter):
            self.say(_CONTROL.sub("\ufffd", piece))
            text += piece
        self.say("\n")
        self.histories[name] = [*asked, Message("assistant", text)] if text.strip() else self.histories[name]


def _texts(target: Target, prompt: list[int], settings: SamplingSettings, adapter: str) -> Iterator[str]:
    """New text as tokens come; a token that ends inside a character waits for the rest of it."""
    ids: list[int] = []
    shown = ""
    for token in stream(target.base, prompt, settings, adapter):
        ids.append(token)
        text = target.base.chat.decode(ids)
        if text.endswith("\ufffd") or not text.startswith(shown):
            continue
        yield text[len(shown) :]
        shown = text
    rest = target.base.chat.decode(ids)
    if rest.startswith(shown) and len(rest) > len(shown):
        yield rest[len(shown) :]

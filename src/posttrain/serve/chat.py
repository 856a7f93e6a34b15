"""Chat in the terminal: answers stream, stages of a run are switched without loading the base again.

Commands inside are in `HELP`. With `beside`, every line is answered by several stages, and each keeps its own conversation.
One engine answers all of it, so weights are packed and the conversation so far is computed once. What a model writes is text to
a terminal and never a command to it: control characters are spelled out. Left out: editing of lines, which the terminal does.
"""

import sys
from contextlib import closing
from functools import partial
from typing import NamedTuple, TextIO

from posttrain.artifacts import expand_home, write_jsonl
from posttrain.errors import ArtifactError, DataError, ModelError, PosttrainError
from posttrain.generate.engine import Engine, SamplingSettings, stream
from posttrain.generate.text import TextStream
from posttrain.models.target import Target
from posttrain.records import Message
from posttrain.terminal import printable

HELP = (
    "/adapter NAME switches to another stage · /system TEXT sets the system message, /system shows it · "
    "/undo forgets the last exchange · /reset forgets the conversation · /save FILE writes it as a demonstration · /quit ends"
)


def chat(
    target: Target, settings: SamplingSettings, *, system: str = "", beside: tuple[str, ...] = (),
    source: TextIO | None = None, out: TextIO | None = None,
) -> int:  # fmt: skip
    """Read lines from `source` (standard input) and answer them on `out` until it ends. Returns the exit code.

    Raises ModelError for a stage that is not there and for a system message that the template has no place for.
    """
    talk = _Talk(target, settings, system, beside or (target.policy,), out or sys.stdout)
    lines = source or sys.stdin
    talk.say(f"{target.base.source.model} · {', '.join(talk.histories)} · {HELP}\n")
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


class _Exchange(NamedTuple):
    """A line that was asked, its number, and what one speaker answered."""

    number: int
    question: Message
    answer: Message


class _Talk:
    """The conversations of the speakers under one system message."""

    def __init__(self, target: Target, settings: SamplingSettings, system: str, speakers: tuple[str, ...], out: TextIO) -> None:
        self.target, self.settings, self.out = target, settings, out
        for name in speakers:
            self.check(name)
        if system:
            self.check_system(system)
        self.system = system
        self.engine = Engine(target.base, serving=True)
        self.asked = 0
        self.histories: dict[str, list[_Exchange]] = {name: [] for name in speakers}

    def say(self, text: str) -> None:
        self.out.write(printable(text))
        self.out.flush()

    def show(self, piece: str) -> str:
        """Show a piece of an answer; returns it as it is."""
        if piece:
            self.say(piece)
        return piece

    def check(self, name: str) -> None:
        if name not in self.target.names:
            raise ModelError("chat", f'"{name}" is not a stage here', allowed=f"there is: {', '.join(self.target.names)}")

    def check_system(self, text: str) -> None:
        """Some templates refuse a system message, others leave it out without a word."""
        encode, line = self.target.base.chat.encode_prompt, Message("user", "Hi")
        try:
            known = encode([Message("system", text), line]) != encode([line])
        except DataError:
            known = False
        if not known:
            raise ModelError("chat", "the chat template of this model knows no system message", do="say it in your first line")

    def handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        commands = {
            "/adapter": self.switch,
            "/system": self.change_system,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
        }
        if command in commands:
            commands[command](argument.strip())
        elif line.startswith("/"):
            self.say(HELP + "\n")
        else:
            self.asked += 1
            for name in self.histories:
                self.answer(name, line)

    def switch(self, name: str) -> None:
        """The new speaker goes on with the conversation so far."""
        self.check(name)
        self.histories = {name: next(iter(self.histories.values()))}
        self.say(f"now {name}\n")

    def change_system(self, text: str) -> None:
        """Set the system message, of what was said before too; show it where there is no text."""
        if text:
            self.check_system(text)
            self.system = text
        self.say(f"system: {self.system or 'none'}\n")

    def undo(self, _: str) -> None:
        """Forget the last line that anybody answered."""
        answered = [history[-1] for history in self.histories.values() if history]
        if not answered:
            raise ModelError("chat", "there is nothing to forget")
        last = max(answered, key=lambda exchange: exchange.number)
        for name, history in self.histories.items():
            self.histories[name] = [exchange for exchange in history if exchange.number != last.number]
        self.say(f"forgotten: {last.question.content}\n")

    def reset(self, _: str) -> None:
        self.histories = {name: [] for name in self.histories}
        self.say("forgotten\n")

    def save(self, name: str) -> None:
        """Write each conversation as a row of `messages` into a new file."""
        path = expand_home(name)
        spoken = [speaker for speaker, history in self.histories.items() if history]
        if not name or not spoken:
            found = "a /save without a file" if not name else "there is nothing to save"
            raise ModelError("chat", found, do="/save FILE after an answer")
        if path.exists() or path.is_symlink():
            raise ArtifactError(str(path), "exists already", do="name a file that does not exist yet")
        rows = [{"messages": [{"role": m.role, "content": m.content} for m in self.messages(one)]} for one in spoken]
        try:
            write_jsonl(path, rows)
        except (ArtifactError, ValueError) as error:
            found = error.found if isinstance(error, ArtifactError) else "not the name of a file"
            raise ArtifactError(str(path), found, do="name another file") from None
        self.say(f"saved: {path}\n")

    def messages(self, name: str) -> list[Message]:
        """The conversation of a speaker."""
        opening = [Message("system", self.system)] if self.system else []
        return opening + [message for _, *pair in self.histories[name] for message in pair]

    def answer(self, name: str, line: str) -> None:
        """Stream one answer; it joins the history only when it is whole."""
        chat_format, question = self.target.base.chat, Message("user", line)
        prompt = chat_format.encode_prompt([*self.messages(name), question])
        room, longest = self.target.base.context, self.settings.max_new_tokens
        if len(prompt) + longest > room:
            raise ModelError(
                "chat", f"the conversation has {len(prompt)} tokens and an answer may take {longest}",
                allowed=f"together at most {room}", do="/reset forgets it, --max-new-tokens shortens the answers",
            )  # fmt: skip
        adapter = self.target.policies.activate(name)
        self.say(f"{name}> ")
        pieces, text = [], TextStream(partial(chat_format.decode, middle=False))
        with closing(stream(self.engine, prompt, self.settings, adapter)) as tokens:
            for token in tokens:
                pieces.append(self.show(text.add(token)))
        said = "".join([*pieces, self.show(text.end())])
        self.say("\n")
        if said.strip():
            self.histories[name].append(_Exchange(self.asked, question, Message("assistant", said)))

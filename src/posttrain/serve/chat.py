"""Chat in the terminal. Answers stream, and switching between the stages of a run does not reload the base.

`HELP` lists the commands. With `beside`, several stages answer every line, each with its own conversation. One engine serves
all of them, so weights are packed once and earlier turns come from the prefix cache. Control characters in answers are
escaped, so a model cannot send commands to the terminal. Line editing is left to the terminal.
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
    "/undo removes the last exchange · /reset clears the conversation · /save FILE writes it as a demonstration · /quit ends"
)


def chat(
    target: Target, settings: SamplingSettings, *, system: str = "", beside: tuple[str, ...] = (),
    source: TextIO | None = None, out: TextIO | None = None,
) -> int:  # fmt: skip
    """Read lines from `source` (standard input) and answer them on `out` until it ends. Returns the exit code.

    Raises ModelError for an unknown stage and for a system message that the template does not support.
    """
    conversations = _Conversations(target, settings, system, beside or (target.policy,), out or sys.stdout)
    lines = source or sys.stdin
    conversations.say(f"{target.base.source.model} · {', '.join(conversations.histories)} · {HELP}\n")
    while True:
        conversations.say("you> ")
        try:
            line = lines.readline()
        except KeyboardInterrupt:
            line = ""
        if not line or line.strip() in ("/quit", "/exit"):
            conversations.say("\n")
            return 0
        if line.strip():
            try:
                conversations.handle(line.strip())
            except PosttrainError as error:  # an error in one line does not end the conversation
                conversations.say(f"error: {error}\n")
            except KeyboardInterrupt:  # stops the answer, which is discarded
                conversations.say("\n")


class _Exchange(NamedTuple):
    """A line of the user, its number, and the answer of one speaker."""

    number: int
    question: Message
    answer: Message


class _Conversations:
    """One conversation per speaker (a stage), all with the same system message."""

    def __init__(self, target: Target, settings: SamplingSettings, system: str, speakers: tuple[str, ...], out: TextIO) -> None:
        self.target, self.settings, self.out = target, settings, out
        for name in speakers:
            self.check(name)
        if system:
            self.check_system(system)
        self.system = system
        self.engine = Engine(target.base, serving=True)
        self.line_number = 0
        self.histories: dict[str, list[_Exchange]] = {name: [] for name in speakers}

    def say(self, text: str) -> None:
        self.out.write(printable(text))
        self.out.flush()

    def show(self, piece: str) -> str:
        """Print a piece of an answer and return it."""
        if piece:
            self.say(piece)
        return piece

    def check(self, name: str) -> None:
        if name not in self.target.names:
            raise ModelError("chat", f'no stage "{name}"', allowed=f"there is: {', '.join(self.target.names)}")

    def check_system(self, text: str) -> None:
        """Raise ModelError if the template rejects or silently drops a system message."""
        encode, line = self.target.base.chat.encode_prompt, Message("user", "Hi")
        try:
            accepted = encode([Message("system", text), line]) != encode([line])
        except DataError:
            accepted = False
        if not accepted:
            raise ModelError(
                "chat", "the chat template of this model does not support a system message", do="put it in your first line"
            )

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
            self.line_number += 1
            for name in self.histories:
                self.answer(name, line)

    def switch(self, name: str) -> None:
        """Continue the conversation with another stage."""
        self.check(name)
        self.histories = {name: next(iter(self.histories.values()))}
        self.say(f"now {name}\n")

    def change_system(self, text: str) -> None:
        """Set the system message for the whole conversation, earlier turns included. Without text, print it."""
        if text:
            self.check_system(text)
            self.system = text
        self.say(f"system: {self.system or 'none'}\n")

    def undo(self, _: str) -> None:
        """Remove the last answered line from every conversation."""
        answered = [history[-1] for history in self.histories.values() if history]
        if not answered:
            raise ModelError("chat", "the conversation is empty")
        last = max(answered, key=lambda exchange: exchange.number)
        for name, history in self.histories.items():
            self.histories[name] = [exchange for exchange in history if exchange.number != last.number]
        self.say(f"removed: {last.question.content}\n")

    def reset(self, _: str) -> None:
        self.histories = {name: [] for name in self.histories}
        self.say("conversation cleared\n")

    def save(self, name: str) -> None:
        """Write each conversation as a row of `messages` into a new file."""
        path = expand_home(name)
        speakers = [name for name, history in self.histories.items() if history]
        if not name or not speakers:
            problem = "/save without a file name" if not name else "the conversation is empty"
            raise ModelError("chat", problem, do="/save FILE after an answer")
        if path.exists() or path.is_symlink():
            raise ArtifactError(str(path), "exists already", do="name a file that does not exist yet")
        rows = [{"messages": [{"role": m.role, "content": m.content} for m in self.messages(speaker)]} for speaker in speakers]
        try:
            write_jsonl(path, rows)
        except (ArtifactError, ValueError) as error:
            problem = error.found if isinstance(error, ArtifactError) else "not a file name"
            raise ArtifactError(str(path), problem, do="name another file") from None
        self.say(f"saved: {path}\n")

    def messages(self, name: str) -> list[Message]:
        """The conversation of a speaker."""
        opening = [Message("system", self.system)] if self.system else []
        return opening + [message for _, *pair in self.histories[name] for message in pair]

    def answer(self, name: str, line: str) -> None:
        """Stream one answer. Only a complete answer joins the history."""
        chat_format, question = self.target.base.chat, Message("user", line)
        prompt = chat_format.encode_prompt([*self.messages(name), question])
        room, longest = self.target.base.context, self.settings.max_new_tokens
        if len(prompt) + longest > room:
            raise ModelError(
                "chat", f"the conversation has {len(prompt)} tokens and an answer may take {longest}",
                allowed=f"together at most {room}", do="clear it with /reset, or lower --max-new-tokens",
            )  # fmt: skip
        adapter = self.target.policies.activate(name)
        self.say(f"{name}> ")
        pieces, text = [], TextStream(partial(chat_format.decode, middle=False))
        with closing(stream(self.engine, prompt, self.settings, adapter)) as tokens:
            for token in tokens:
                pieces.append(self.show(text.add(token)))
        answer = "".join([*pieces, self.show(text.end())])
        self.say("\n")
        if answer.strip():
            self.histories[name].append(_Exchange(self.line_number, question, Message("assistant", answer)))

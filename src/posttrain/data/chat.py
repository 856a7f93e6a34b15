"""The one renderer: a conversation becomes token ids and a mask of trained tokens. Training, rewards, rollouts,
evaluation and serving all come through here, so they cannot disagree by a token.

A template is rendered turn by turn. What an assistant turn adds to the text is what is trained, up to and including the
end-of-turn token; no markers inside the template are needed. Each piece is tokenised by itself, so the ids of a prompt
are always a prefix of the ids of the conversation. There is exactly one BOS where the model has one.

Text of a message that spells a control token ("<end_of_turn>") is tokenised as plain text: a user cannot end a turn.
Templates run in a sandbox with limits on size and time; they see messages and two token strings, nothing else.
"""

import hashlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jinja2
import jinja2.sandbox

from posttrain.errors import DataError, ModelError
from posttrain.records import Message

# Templates of this project's own writing; a model's own template is used where `template = "auto"` finds one.
TEMPLATES = {
    "gemma": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = (m.content | trim) ~ '\n\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ ns.system if m.role == 'user' }}{{ m.content | trim }}<end_of_turn>\n"
        "{% if m.role == 'user' %}{% set ns.system = '' %}{% endif %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}\n\n"
        "{% elif m.role == 'user' %}Question: {{ m.content | trim }}\nAnswer:"
        "{% else %} {{ m.content | trim }}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'user' %}Answer:{% endif %}"
    ),
}
# The token that ends an assistant turn, by template. Of a model's own template it is read off a rendered turn.
END_TOKENS = {"gemma": "<end_of_turn>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
MAX_TEMPLATE_CHARS = 64 * 1024
MAX_RENDERED_CHARS = 4 * 1024 * 1024
TEMPLATE_SECONDS = 0.1
_STAND_IN = "\ue000{}\ue001"  # private-use characters: they stand for control tokens spelled in a message


class Tokenizer(Protocol):
    """What the renderer needs of a tokenizer."""

    def encode(self, text: str, *, plain: bool) -> list[int]:
        """Ids of a text without added tokens; `plain` takes control-token text literally."""

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """Text of ids; `special` keeps control tokens."""

    def token_id(self, token: str) -> int | None:
        """Id of a whole token, or None where the vocabulary does not have it."""

    @property
    def bos(self) -> str | None:
        """Text of the token that begins a sequence."""

    @property
    def eos(self) -> str | None:
        """Text of the token that ends a sequence."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that are parsed as control tokens."""

    @property
    def chat_template(self) -> str | None:
        """The model's own template."""

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects a BOS in front of everything."""


class Encoded(NamedTuple):
    """Token ids and, for each, whether it is a target of training."""

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """A tokenizer and a template, checked against each other once."""

    def __init__(self, tokenizer: Tokenizer, template_name: str = "auto") -> None:
        self._tokenizer = tokenizer
        self.template_name, self.template = _choose_template(tokenizer, template_name)
        self._compiled = _compile(self.template)
        self._control = re.compile("|".join(map(re.escape, sorted(tokenizer.control_tokens, key=len, reverse=True))) or r"(?!)")
        self.bos_id = tokenizer.token_id(tokenizer.bos) if tokenizer.bos else None
        self.eos_id = tokenizer.token_id(tokenizer.eos) if tokenizer.eos else None
        self.template_ids = self._check_vocabulary()
        self.end_id = self._find_end()
        self.end_ids = frozenset(i for i in (self.end_id, self.eos_id) if i is not None)

    @property
    def fingerprint(self) -> str:
        """Hash of the template and of how it ends turns."""
        return hashlib.sha256(json.dumps([self.template, sorted(self.end_ids), self.bos_id]).encode()).hexdigest()[:16]

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Ids of a whole conversation with every assistant turn (and its end token) marked as trained."""
        ids: list[int] = []
        trained: list[bool] = []
        for text, is_turn in self._pieces(messages):
            piece = self._ids(text, first=not ids)
            if is_turn:
                piece, after = self._split_end(piece)
                ids += piece + after
                trained += [True] * len(piece) + [False] * len(after)
            else:
                ids += piece
                trained += [False] * len(piece)
        while trained and not trained[-1]:  # what a template writes after the last turn is never seen at generation
            ids.pop()
            trained.pop()
        return Encoded(ids, trained)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to the point where the assistant begins to speak."""
        ids: list[int] = []
        for text, is_turn in self._pieces(messages, prompt=True):
            piece = self._ids(text, first=not ids)
            ids += [i for part in self._split_end(piece) for i in part] if is_turn else piece
        return ids

    def encode_completion(self, prompt: Sequence[Message], completion: Sequence[Message]) -> list[int]:
        """Ids of the assistant's answer after `prompt`, its end token included."""
        whole = self.encode([*prompt, *completion]).ids
        return whole[len(self.encode_prompt(prompt)) :]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text with the model's BOS and no template, as the base saw it in pretraining."""
        return self._ids(text, first=True)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids, special=special)

    def _pieces(self, messages: Sequence[Message], prompt: bool = False) -> Iterator[tuple[str, bool]]:
        """The rendered text cut where the assistant begins and ends, with whether a piece is an assistant turn."""
        safe = [Message(m.role, self._control.sub(self._stand_in, m.content)) for m in messages]
        done = ""
        for index, message in enumerate(safe):
            if message.role != "assistant":
                continue
            before = self._render(safe[:index], add_generation_prompt=True)
            after = self._render(safe[: index + 1], add_generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError("chat template", f"turn {index + 1} rewrites an earlier turn", do="use another template")
            yield before[len(done) :], False
            yield after[len(before) :], True
            done = after
        if prompt:
            before = self._render(safe, add_generation_prompt=True)
            if not before.startswith(done):
                raise DataError("chat template", "the prompt rewrites an earlier turn", do="use another template")
            yield before[len(done) :], False

    def _stand_in(self, match: re.Match[str]) -> str:
        return _STAND_IN.format(self._tokenizer.control_tokens.index(match.group()))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        values = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._tokenizer.bos or "",
            "eos_token": self._tokenizer.eos or "",
        }
        return _run_template(self._compiled, values)

    def _ids(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if position % 2:
                ids += self._tokenizer.encode(self._tokenizer.control_tokens[int(part)], plain=True)
            elif part:
                ids += self._tokenizer.encode(part, plain=False)
        if first and self.bos_id is not None:
            ids = [self.bos_id, *_without_leading(ids, self.bos_id)] if self._wants_bos(ids) else ids
        return ids

    def _wants_bos(self, ids: list[int]) -> bool:
        return self._tokenizer.adds_bos or ids[:1] == [self.bos_id]

    def _split_end(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """An assistant turn up to its end token, and what the template writes after it."""
        if self.end_id in ids:
            cut = ids.index(self.end_id) + 1
            return ids[:cut], ids[cut:]
        assert self.end_id is not None
        return [*ids, self.end_id], []

    def _check_vocabulary(self) -> tuple[int, ...]:
        """Ids of the template's own control tokens; one that the vocabulary lacks would be spelled out in letters."""
        if self.template_name == "auto":
            return ()  # a model's own template may name tokens in branches that are never taken
        wanted = list(dict.fromkeys(re.findall(r"<\|[a-z_0-9]+\|>|<(?:start|end)_of_turn>", self.template)))
        missing = [n for n in wanted if self._tokenizer.token_id(n) is None]
        if missing:
            raise ModelError(
                f'chat template "{self.template_name}"',
                f"the vocabulary has no token {', '.join(missing)}",
                allowed=f"templates that fit: {', '.join(_fitting(self._tokenizer))}",
                do="set [base] template",
            )
        return tuple(i for n in wanted if (i := self._tokenizer.token_id(n)) is not None)

    def _find_end(self) -> int:
        """The id of the token that ends an assistant turn: named for our templates, read off a turn for others."""
        named = END_TOKENS.get(self.template_name)
        if named is not None:
            end = self._tokenizer.token_id(named)
            assert end is not None
            return end
        ask = [Message("user", "a")]
        before = self._render(ask, add_generation_prompt=True)
        after = self._render([*ask, Message("assistant", "b")], add_generation_prompt=False)
        spelled = self._control.findall(after[len(before) :])
        end_of_turn = self._tokenizer.token_id(spelled[0]) if spelled else self.eos_id
        if end_of_turn is None:
            raise ModelError(f'chat template "{self.template_name}"', "no token ends a turn", do="set [base] template")
        return end_of_turn


def _without_leading(ids: list[int], bos: int) -> list[int]:
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    return ids[start:]


def _choose_template(tokenizer: Tokenizer, name: str) -> tuple[str, str]:
    if name in TEMPLATES:
        return name, TEMPLATES[name]
    if name != "auto":
        raise ModelError("[base] template", f'"{name}"', allowed=f"auto, {', '.join(TEMPLATES)}")
    if tokenizer.chat_template:
        return "auto", tokenizer.chat_template
    raise ModelError(
        "[base] template",
        "this base model has no chat template of its own",
        allowed=f"templates that fit its vocabulary: {', '.join(_fitting(tokenizer))}",
        do='name one in the recipe, for instance template = "plain"',
    )


def _fitting(tokenizer: Tokenizer) -> list[str]:
    fits = [name for name, end in END_TOKENS.items() if tokenizer.token_id(end) is not None]
    return [*fits, "plain"] if tokenizer.eos else fits


def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ModelError("chat template", f"{len(template)} characters", allowed=f"at most {MAX_TEMPLATE_CHARS}")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.globals = {
        "raise_exception": _raise_exception, "namespace": jinja2.utils.Namespace, "range": jinja2.sandbox.safe_range
    }  # fmt: skip
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelError("chat template", f"not a valid template: {error}", do="set [base] template") from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _run_template(template: jinja2.Template, values: dict[str, Any]) -> str:
    """Render within limits of time and size; whatever a template does wrong is an error of the data, told in words."""
    chunks: list[str] = []
    size = 0
    try:
        with _time_limit(TEMPLATE_SECONDS):
            for chunk in template.generate(values):
                size += len(chunk)
                if size > MAX_RENDERED_CHARS:
                    raise DataError("chat template", "the rendered text is too long", allowed=f"{MAX_RENDERED_CHARS} characters")
                chunks.append(chunk)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError, MemoryError, RecursionError, ZeroDivisionError) as error:
        raise DataError("chat template", f"refuses the conversation: {str(error)[:200]}", do="change the row or set [base] template") from None
    return "".join(chunks)


class _TooSlow(jinja2.TemplateError):
    pass


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop a template that runs away. Signals reach the main thread only; elsewhere the size limits must do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooSlow(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def load_chat_format(tokenizer: Tokenizer, template_name: str = "auto") -> ChatFormat:
    """The renderer for a tokenizer and a template name. Raises ModelError where they do not fit."""
    return ChatFormat(tokenizer, template_name)

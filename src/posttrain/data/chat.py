"""The one renderer: a conversation becomes token ids and a mask of trained tokens. Training, rewards, rollouts,
evaluation and serving all come through here, so they cannot disagree by a token.

A template is rendered turn by turn. What an assistant turn adds to the text is what is trained, up to and including the
end-of-turn token; no markers inside the template are needed. Each piece is tokenised by itself, so the ids of a prompt
are always a prefix of the ids of the conversation. There is exactly one BOS where the model has one.

Text of a message that spells a control token ("<end_of_turn>") is tokenised as plain text: a user cannot end a turn.
Templates run boxed in (`data/template.py`). Left out: templates that rewrite earlier turns (some drop old reasoning),
since no prompt would be a prefix of its conversation; such a row is refused.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from posttrain.data.template import ChatTemplate
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
        "{% elif m.role == 'user' %}Question: {{ m.content | trim }}\n"
        "{% else %}Answer: {{ m.content | trim }}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    ),
}
# The token that ends an assistant turn, by template. Of a model's own template it is read off a rendered turn.
END_TOKENS = {"gemma": "<end_of_turn>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
# Private-use characters around a number stand for a control token that a message spells, while a template handles it.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# What in a template's source may be the name of a token: <...>, and [...] in capitals.
_TOKEN_NAME = re.compile(r"<[^<>\s{}]{1,60}>|\[/?[A-Z_]+\]")


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
        """Texts of the special tokens, which are parsed wherever they stand."""

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
        self._template = ChatTemplate(self.template)
        self._bos, self._eos = tokenizer.bos or "", tokenizer.eos or ""
        self._adds_bos = tokenizer.adds_bos
        # The opening mark itself comes first: a message that holds it must not forge a stand-in.
        self._guarded = (_OPEN, *sorted(_control_texts(tokenizer, self.template)))
        self._guarded_index = {text: index for index, text in enumerate(self._guarded)}
        self._control = re.compile(_any_of(self._guarded))
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
        for text, is_turn in self._pieces(self._guard(messages)):
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
        return self._prompt(self._guard(messages))[0]

    def encode_completion(self, prompt: Sequence[Message], completion: Message) -> list[int]:
        """Ids of the assistant's answer after `prompt`, its end token included."""
        return self.encode_completions(prompt, [completion])[1][0]

    def encode_completions(
        self, prompt: Sequence[Message], completions: Sequence[Message]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt, rendered once, and of each answer with its end token: what `encode` gives, cut in two."""
        safe = self._guard(prompt)
        ids, before = self._prompt(safe)
        found = []
        for completion in self._guard(completions):
            after = self._render([*safe, completion], generation_prompt=False)
            turn = self._added(after, before, len(prompt) + 1)
            found.append(self._split_end(self._ids(turn, first=not ids))[0])
        return ids, found

    def encode_text(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of plain text with the model's BOS and no template, as the base saw it in pretraining.

        With `control` the text may spell control tokens, as a conversation that is written by hand does.
        """
        guarded = re.compile(_OPEN) if control else self._control
        return self._ids(guarded.sub(self._stand_in, text), first=True)

    def encode_document(self, text: str) -> list[int]:
        """`encode_text`; a model without BOS gets the token that ends texts in front: the first token is predicted too."""
        ids = self.encode_text(text)
        start = self.eos_id if self.eos_id is not None else self.end_id
        return ids if ids[:1] == [self.bos_id] else [start, *ids]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids, special=special)

    def _guard(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in which spelled control tokens are replaced by stand-ins."""
        return [Message(m.role, self._control.sub(self._stand_in, m.content)) for m in messages]

    def _stand_in(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self._guarded_index[match.group()]}{_CLOSE}"

    def _prompt(self, safe: Sequence[Message]) -> tuple[list[int], str]:
        """Ids and text of a prompt."""
        ids: list[int] = []
        done = ""
        for text, is_turn in self._pieces(safe, prompt=True):
            piece = self._ids(text, first=not ids)
            ids += [i for part in self._split_end(piece) for i in part] if is_turn else piece
            done += text
        return ids, done

    def _pieces(self, safe: Sequence[Message], prompt: bool = False) -> Iterator[tuple[str, bool]]:
        """The rendered text cut where the assistant begins and ends, with whether a piece is an assistant turn."""
        done = ""
        for index, message in enumerate(safe):
            if message.role != "assistant":
                continue
            before = self._render(safe[:index], generation_prompt=True)
            yield self._added(before, done, index + 1), False
            done = self._render(safe[: index + 1], generation_prompt=False)
            yield self._added(done, before, index + 1), True
        if prompt:
            yield self._added(self._render(safe, generation_prompt=True), done, len(safe)), False

    def _added(self, text: str, before: str, turn: int) -> str:
        if not text.startswith(before):
            raise DataError("chat template", f"turn {turn} rewrites an earlier turn", do="use another template")
        return text[len(before) :]

    def _render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        return self._template.render(messages, generation_prompt=generation_prompt, bos=self._bos, eos=self._eos)

    def _ids(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = []
        for position, part in enumerate(_STAND_IN.split(text)):
            if position % 2:
                ids += self._tokenizer.encode(self._guarded[int(part)], plain=True)
            elif part:
                ids += self._tokenizer.encode(part, plain=False)
        if first and self.bos_id is not None and (self._adds_bos or ids[:1] == [self.bos_id]):
            ids = [self.bos_id, *_without_leading(ids, self.bos_id)]
        return ids

    def _split_end(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """An assistant turn up to its end token, and what the template writes after it."""
        if self.end_id in ids:
            cut = ids.index(self.end_id) + 1
            return ids[:cut], ids[cut:]
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
        answer = "an answer"
        turn = self._render([Message("user", "a question"), Message("assistant", answer)], generation_prompt=False)
        spelled = self._control.findall(turn.rpartition(answer)[2])
        end_of_turn = self._tokenizer.token_id(spelled[0]) if spelled else self.eos_id
        if end_of_turn is None:
            raise ModelError(f'chat template "{self.template_name}"', "no token ends a turn", do="set [base] template")
        return end_of_turn


def _control_texts(tokenizer: Tokenizer, template: str) -> frozenset[str]:
    """Tokens that no message may speak: the special ones, and whatever the template itself marks turns with."""
    named = [name for name in _TOKEN_NAME.findall(template) if tokenizer.token_id(name) is not None]
    ends = [token for token in (tokenizer.bos, tokenizer.eos) if token]
    return frozenset((*tokenizer.control_tokens, *named, *ends))


def _any_of(texts: Collection[str]) -> str:
    """A pattern for the longest of many texts; shared beginnings stand once, or thousands would be tried one by one."""
    ways = [
        re.escape(letter) + _any_of([text[1:] for text in group])
        for letter, group in itertools.groupby(sorted(text for text in texts if text), key=lambda text: text[0])
    ]
    return f"(?:{'|'.join(ways)}){'?' if '' in texts else ''}" if ways else ""


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


def load_chat_format(tokenizer: Tokenizer, template_name: str = "auto") -> ChatFormat:
    """The renderer for a tokenizer and a template name. Raises ModelError where they do not fit."""
    return ChatFormat(tokenizer, template_name)

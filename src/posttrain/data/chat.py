"""The one renderer: a conversation becomes token ids and a mask of trained tokens. Training, rewards, rollouts,
evaluation and serving all use it, so their tokens are always the same.

A prompt is the template's rendering with the generation prompt. The trained part of an assistant turn is what it adds to its
prompt, up to and including the end-of-turn token; the template needs no markers. The ids of a prompt are always a prefix of the
ids of the conversation (`data/pieces.py`). There is exactly one BOS if the model has one. Turns that a template rewrites later
are context and not trained (`data/turns.py`).

The rendering must contain every text of the conversation, or the conversation is refused; a template may only drop a part of
earlier answers, such as reasoning. Text in a message that looks like a control token ("<end_of_turn>") is tokenised as plain
text, so a user cannot end a turn. Templates run in a sandbox (`data/template.py`).
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from posttrain.data.pieces import Guard, PieceEncoder, Tokenizer
from posttrain.data.template import ChatTemplate
from posttrain.data.turns import Rendering, Turn, render_turns, roles_left_out, text_left_out
from posttrain.errors import DataError, ModelError
from posttrain.records import Message, Role

# Built-in templates. With `template = "auto"` the model's own template is used.
TEMPLATES = {
    # Gemma has no system role: a system message is put before the next user message, or becomes a user turn.
    "gemma": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% set text = m.content | trim %}{% if m.role == 'system' %}"
        "{% if text %}{% set ns.system = ns.system ~ ('\n\n' if ns.system else '') ~ text %}{% endif %}"
        "{% elif m.role == 'user' %}<start_of_turn>user\n"
        "{% if ns.system %}{{ ns.system }}\n\n{% set ns.system = '' %}{% endif %}{{ text }}<end_of_turn>\n"
        "{% else %}{% if ns.system %}<start_of_turn>user\n{{ ns.system }}<end_of_turn>\n{% set ns.system = '' %}{% endif %}"
        "<start_of_turn>model\n{{ text }}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if ns.system %}<start_of_turn>user\n{{ ns.system }}<end_of_turn>\n{% endif %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
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
# The token that ends an assistant turn, by template. For a model's own template it is found in a rendered turn.
END_TOKENS = {"gemma": "<end_of_turn>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
# Tokens at the end of a prompt that are decoded first to find text.
_TAIL_TOKENS = 8
_WITH_ARTICLE: dict[Role, str] = {"system": "a system", "user": "a user", "assistant": "an assistant"}


class Encoded(NamedTuple):
    """Token ids and, for each, whether it is a target of training."""

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """A tokenizer and a template, checked for compatibility. Raises ModelError if they do not fit."""

    def __init__(self, tokenizer: Tokenizer, template_name: str = "auto") -> None:
        self._tokenizer = tokenizer
        self.template_name, self.template = _choose_template(tokenizer, template_name)
        self._template = ChatTemplate(self.template)
        self._bos, self._eos = tokenizer.bos or "", tokenizer.eos or ""
        self._adds_bos = tokenizer.adds_bos
        self._guard = Guard(tokenizer, self.template)
        self._roles_left_out = functools.lru_cache(maxsize=256)(self._probe)
        self.bos_id = tokenizer.token_id(tokenizer.bos) if tokenizer.bos else None
        self.eos_id = tokenizer.token_id(tokenizer.eos) if tokenizer.eos else None
        self.template_ids = self._check_vocabulary()
        self.end_id = self._find_end()
        self.end_ids = frozenset(i for i in (self.end_id, self.eos_id) if i is not None)

    @property
    def fingerprint(self) -> str:
        """A hash of the template and of its end tokens."""
        return hashlib.sha256(json.dumps([self.template, sorted(self.end_ids), self.bos_id]).encode()).hexdigest()[:16]

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Ids of a whole conversation with its assistant turns (and their end tokens) marked as trained.

        Earlier turns that the template rewrites are not trained; `trained_turns` counts the others. Raises DataError if the
        template rejects the messages, drops a text, or the last answer does not extend its prompt.
        """
        safe = self._guard.messages(messages)
        answered = bool(safe) and safe[-1].role == "assistant"
        rendering = self._answered(safe) if answered else render_turns(self._render, safe, generation_prompt=False)
        self._check_texts(safe, rendering, generation_prompt=False)
        encoder, ids, trained = self._encoder(), list[int](), list[bool]()
        for text, is_turn in _cut(rendering):
            piece = encoder.add(text)
            if is_turn:
                piece, after = self._split_end(piece)
                ids += piece + after
                trained += [True] * len(piece) + [False] * len(after)
            else:
                ids += piece
                trained += [False] * len(piece)
        while answered and not trained[-1]:  # text of the template after the last turn never occurs in generation
            ids.pop()
            trained.pop()
        return Encoded(ids, trained)

    def trained_turns(self, encoded: Encoded) -> int:
        """The number of trained assistant turns. Each ends with one end token."""
        return sum(is_target and index == self.end_id for index, is_target in zip(*encoded, strict=True))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt with the generation prompt. Raises DataError as `encode` does."""
        return self._prompt(self._guard.messages(messages))[0]

    def encode_completions(
        self, prompt: Sequence[Message], completions: Sequence[Message]
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a prompt, rendered once, and of each answer with its end token. Together they equal the ids of `encode`."""
        safe = self._guard.messages(prompt)
        ids, rendering, encoder = self._prompt(safe)
        answers = []
        for completion in self._guard.messages(completions):
            rendered = self._answer_to(rendering, [*safe, completion])
            self._check_texts([*safe, completion], rendered, generation_prompt=False)
            answers.append(self._split_end(encoder.fork().add(rendered.text[len(rendering.text) :]))[0])
        return ids, answers

    def encode_text(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of plain text with the model's BOS and without a template, as in pretraining.

        With `control`, control tokens in the text are parsed, as in a hand-written conversation.
        """
        return self._encoder().add(self._guard.text(text, control=control))

    def encode_document(self, text: str) -> list[int]:
        """`encode_text`, or without a BOS the end token first, so that the first token of the text is predicted too."""
        ids = self.encode_text(text)
        start = self.eos_id if self.eos_id is not None else self.end_id
        return ids if ids[:1] == [self.bos_id] else [start, *ids]

    def decode(self, ids: Sequence[int], special: bool = False, *, middle: bool = True) -> str:
        """Text of token ids. With `middle`, a leading space is kept, which some tokenizers drop at the start of a text."""
        return self._tokenizer.decode(ids, special=special, middle=middle)

    def has_text(self, ids: Sequence[int]) -> bool:
        """Whether a prompt contains text besides control tokens, so that its completion continues a text."""
        return bool(self.decode(ids[-_TAIL_TOKENS:]) or self.decode(ids))

    def _encoder(self) -> PieceEncoder:
        return PieceEncoder(self._tokenizer, self._guard, bos_id=self.bos_id, adds_bos=self._adds_bos)

    def _prompt(self, safe: Sequence[Message]) -> tuple[list[int], Rendering, PieceEncoder]:
        """Ids of a prompt, its rendering, and an encoder that continues after it."""
        rendering = render_turns(self._render, safe, generation_prompt=True)
        self._check_texts(safe, rendering._replace(turns=()), generation_prompt=True)
        encoder, ids = self._encoder(), list[int]()
        for text, is_turn in _cut(rendering):
            piece = encoder.add(text)
            ids += [i for part in self._split_end(piece) for i in part] if is_turn else piece
        return ids, rendering, encoder

    def _answered(self, safe: Sequence[Message]) -> Rendering:
        """The rendering of a conversation that ends with an answer."""
        return self._answer_to(render_turns(self._render, safe[:-1], generation_prompt=True), safe)

    def _answer_to(self, prompt: Rendering, safe: Sequence[Message]) -> Rendering:
        text = self._render(safe, False)
        if not text.startswith(prompt.text):
            raise DataError("chat template", f"turn {len(safe)} rewrites an earlier turn", do="use another template")
        return Rendering(text, (*prompt.turns, Turn(len(safe) - 1, len(prompt.text), len(text))))

    def _check_texts(self, safe: Sequence[Message], rendering: Rendering, *, generation_prompt: bool) -> None:
        """Raise DataError if the rendering lacks a message. A template may drop the reasoning of untrained answers."""
        shape = tuple((message.role, bool(message.content.strip())) for message in safe)
        roles = sorted(self._roles_left_out(shape, generation_prompt))
        lost = text_left_out(safe, rendering)
        if roles or lost is not None:
            role = roles[0] if roles or lost is None else lost.role
            raise DataError(
                "chat template", f"leaves out the text of {_WITH_ARTICLE[role]} message",
                do="change the row or set [base] template",
            )  # fmt: skip

    def _probe(self, shape: tuple[tuple[Role, bool], ...], generation_prompt: bool) -> frozenset[Role]:
        try:
            return roles_left_out(self._render, shape, generation_prompt=generation_prompt)
        except DataError:  # the template accepts these roles, but not these texts
            return frozenset()

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        return self._template.render(messages, generation_prompt=generation_prompt, bos=self._bos, eos=self._eos)

    def _split_end(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split an assistant turn after its end token, which is added if missing."""
        if self.end_id in ids:
            cut = ids.index(self.end_id) + 1
            return ids[:cut], ids[cut:]
        return [*ids, self.end_id], []

    def _check_vocabulary(self) -> tuple[int, ...]:
        """Ids of the template's control tokens. Raises ModelError if the vocabulary lacks one, which would become plain
        text."""
        if self.template_name == "auto":
            return ()  # a model's own template may contain tokens in branches that never run
        control_tokens = list(dict.fromkeys(re.findall(r"<\|[a-z_0-9]+\|>|<(?:start|end)_of_turn>", self.template)))
        missing = [n for n in control_tokens if self._tokenizer.token_id(n) is None]
        if missing:
            raise ModelError(
                f'chat template "{self.template_name}"',
                f"the vocabulary has no token {', '.join(missing)}",
                allowed=f"templates that fit: {', '.join(_fitting(self._tokenizer))}",
                do="set [base] template",
            )
        return tuple(i for n in control_tokens if (i := self._tokenizer.token_id(n)) is not None)

    def _find_end(self) -> int:
        """The id of the token that ends an assistant turn: listed for built-in templates, found in a rendered turn for
        others."""
        named = END_TOKENS.get(self.template_name)
        if named is not None:
            end = self._tokenizer.token_id(named)
            assert end is not None
            return end
        answer = "an answer"
        turn = self._render([Message("user", "a question"), Message("assistant", answer)], False)
        spelled = self._guard.pattern.findall(turn.rpartition(answer)[2])
        end_of_turn = self._tokenizer.token_id(spelled[0]) if spelled else self.eos_id
        if end_of_turn is None:
            raise ModelError(f'chat template "{self.template_name}"', "no token ends a turn", do="set [base] template")
        return end_of_turn


def _cut(rendering: Rendering) -> Iterator[tuple[str, bool]]:
    """Cut the text at the borders of assistant turns. Yields each piece and whether it is an assistant turn."""
    position = 0
    for turn in rendering.turns:
        yield rendering.text[position : turn.begin], False
        yield rendering.text[turn.begin : turn.end], True
        position = turn.end
    yield rendering.text[position:], False


def _choose_template(tokenizer: Tokenizer, name: str) -> tuple[str, str]:
    if name in TEMPLATES:
        return name, TEMPLATES[name]
    if name != "auto":
        raise ModelError("[base] template", f'"{name}"', allowed=f"auto, {', '.join(TEMPLATES)}")
    if tokenizer.chat_template:
        return "auto", tokenizer.chat_template
    raise ModelError(
        "[base] template",
        "this base model has no chat template",
        allowed=f"templates that fit its vocabulary: {', '.join(_fitting(tokenizer))}",
        do='set one in the recipe, for example template = "plain"',
    )


def _fitting(tokenizer: Tokenizer) -> list[str]:
    fits = [name for name, end in END_TOKENS.items() if tokenizer.token_id(end) is not None]
    return [*fits, "plain"] if tokenizer.eos else fits


def load_chat_format(tokenizer: Tokenizer, template_name: str = "auto") -> ChatFormat:
    """The renderer for a tokenizer and a template name. Raises ModelError if they do not fit."""
    return ChatFormat(tokenizer, template_name)

"""Every text of a conversation is rendered or the conversation is refused; long ones are rendered in a time that fits them."""

import random
from collections.abc import Callable, Sequence

import pytest

from posttrain.data.chat import TEMPLATES, ChatFormat
from posttrain.data.template import ChatTemplate
from posttrain.data.turns import EXACT_TURNS, Rendering, render_turns
from posttrain.errors import DataError
from posttrain.models.tokenizer import HuggingFaceTokenizer
from posttrain.records import Message, Role
from template_styles import STYLES

SYSTEM, ASK, SAY = Message("system", "Be kind."), Message("user", "Hello there"), Message("assistant", "Good day")
AGAIN, BYE = Message("user", "And now?"), Message("assistant", "Goodbye")


@pytest.fixture(scope="module")
def formats(tokenizer: HuggingFaceTokenizer, make_tokenizer: Callable[..., HuggingFaceTokenizer]) -> dict[str, ChatFormat]:
    built_in = {name: ChatFormat(tokenizer, name) for name in TEMPLATES}
    return built_in | {name: ChatFormat(make_tokenizer(source)) for name, source in STYLES.items()}


def random_messages(rng: random.Random, number: int) -> list[Message]:
    """Roles in any order, texts that are found nowhere else; some are empty, white space or long."""
    roles: list[Role] = rng.choices(("system", "user", "assistant"), k=rng.randint(1, 6))
    if rng.random() < 0.5:  # as templates like them
        roles = ["user", "assistant"] * rng.randint(1, 3)
        for _ in range(rng.randint(0, 2)):
            roles.insert(rng.randint(0, len(roles)), "system")
    shapes = ("{}", " {}\n", "{}\n\n {}", "x" * 120 + "{}", "", " \n", "{} <|im_end|> {}", "<b>{}</b> ü漢")
    return [Message(role, rng.choice(shapes).replace("{}", f"text{number}of{i}")) for i, role in enumerate(roles)]


@pytest.mark.parametrize("name", [*TEMPLATES, *STYLES])
def test_every_text_is_rendered_or_the_messages_are_refused(formats: dict[str, ChatFormat], name: str):
    chat, rng, lost, kept = formats[name], random.Random(name), [], 0
    for number in range(80):
        messages = random_messages(rng, number)
        for encode in (chat.encode_prompt, lambda some: chat.encode(some).ids):
            try:
                ids = encode(messages)
            except DataError:
                continue
            kept += 1
            text = " ".join(chat.decode(ids, special=True).split())
            lost += [m for m in messages if " ".join(m.content.split()) not in text]
    assert lost == []
    assert kept > (120 if name in TEMPLATES else 3)


def test_the_gemma_template_has_a_place_for_every_system_message(formats: dict[str, ChatFormat]):
    chat, rule = formats["gemma"], Message("system", " Rule two. ")
    user, model = "<start_of_turn>user\n", "<start_of_turn>model\n"

    def prompt(*messages: Message) -> str:
        return chat.decode(chat.encode_prompt(messages), special=True)

    assert prompt(SYSTEM, rule, ASK) == f"<bos>{user}Be kind.\n\nRule two.\n\nHello there<end_of_turn>\n{model}"
    assert prompt(ASK, rule) == f"<bos>{user}Hello there<end_of_turn>\n{user}Rule two.<end_of_turn>\n{model}"
    assert prompt(SYSTEM) == f"<bos>{user}Be kind.<end_of_turn>\n{model}"
    assert prompt(Message("system", " "), ASK) == f"<bos>{user}Hello there<end_of_turn>\n{model}"
    whole = [ASK, rule, SAY, SYSTEM, AGAIN, BYE]
    assert chat.decode(chat.encode(whole).ids, special=True) == (
        f"<bos>{user}Hello there<end_of_turn>\n{user}Rule two.<end_of_turn>\n{model}Good day<end_of_turn>\n"
        f"{user}Be kind.\n\nAnd now?<end_of_turn>\n{model}Goodbye<end_of_turn>"
    )


@pytest.mark.parametrize(
    ("name", "messages", "role"),
    [
        ("no system role, without a word", [SYSTEM, ASK, SAY], "a system"),
        ("system first or never", [ASK, SYSTEM, SAY], "a system"),
        ("only the last system message", [SYSTEM, SYSTEM, ASK, SAY], "a system"),
        ("the first hundred letters", [Message("user", "word " * 30), SAY], "a user"),
        ("answers with reasoning", [ASK, SAY, AGAIN, Message("assistant", "<think>\nHm.</think>Yes")], None),
        ("only the last system message", [Message("system", "t"), SYSTEM, Message("user", "text"), SAY], "a system"),
    ],
)
def test_a_template_that_leaves_a_text_out_is_refused_by_name(
    formats: dict[str, ChatFormat], name: str, messages: list[Message], role: str | None
):
    found = f"leaves out the text of {role} message · change the row or set" if role else "turn 4 rewrites an earlier turn"
    with pytest.raises(DataError, match=found):
        formats[name].encode(messages)


def test_reasoning_that_every_rendering_drops_is_not_trained_without_it(make_tokenizer: Callable[..., HuggingFaceTokenizer]):
    chat = ChatFormat(
        make_tokenizer(STYLES["answers with reasoning"].replace("<think>\\n{% endif", "{% endif").replace("<think>\n", ""))
    )
    thinks = Message("assistant", "<think>Hm.</think>Yes")
    assert chat.trained_turns(chat.encode([ASK, SAY, AGAIN, BYE])) == 2
    for messages in ([ASK, thinks], [ASK, thinks, AGAIN, BYE]):
        with pytest.raises(DataError, match="leaves out the text of an assistant message"):
            chat.encode(messages)
    assert "Hm." not in chat.decode(chat.encode_prompt([ASK, thinks, AGAIN]), special=True)  # as the model was trained


def test_a_prompt_is_the_models_own_rendering_whole(formats: dict[str, ChatFormat], tokenizer: HuggingFaceTokenizer):
    chat = formats["drops reasoning"]
    said = Message("assistant", "<think>\nHm.\n</think>\n\nGood day")
    for messages in ([ASK], [ASK, said, AGAIN], [SYSTEM, ASK, said, AGAIN, said, ASK]):
        plain = [{"role": m.role, "content": m.content} for m in messages]
        theirs = tokenizer.inner.apply_chat_template(
            plain, chat_template=chat.template, add_generation_prompt=True, return_dict=False
        )
        assert chat.encode_prompt(messages) == theirs
        assert "Hm." not in chat.decode(theirs, special=True)


def test_of_turns_that_the_template_rewrites_the_last_one_is_trained(formats: dict[str, ChatFormat]):
    chat, thinks = formats["drops reasoning"], Message("assistant", "<think>\nHm.\n</think>\n\nYes")
    encoded = chat.encode([ASK, SAY, AGAIN, thinks])
    assert chat.trained_turns(encoded) == 1
    trained = [i for i, wanted in zip(*encoded, strict=True) if wanted]
    assert chat.decode(trained, special=True) == "<think>\nHm.\n</think>\n\nYes<|im_end|>"
    prompt, (answer,) = chat.encode_completions([ASK, SAY, AGAIN], [thinks])
    assert [*prompt, *answer] == encoded.ids


def test_tags_of_reasoning_are_tokens_in_an_answer_and_letters_elsewhere(
    make_tokenizer: Callable[..., HuggingFaceTokenizer],
):
    """As in models whose vocabulary has `<think>`: the template must see the tag, and a user must not write one."""
    tokenizer = make_tokenizer(STYLES["drops reasoning"])
    tokenizer.inner.add_tokens(["<think>", "</think>"])
    chat = ChatFormat(HuggingFaceTokenizer(tokenizer.inner))
    said = Message("assistant", "<think>\nHm.\n</think>\n\nGood day")
    for messages in ([ASK, said], [ASK, said, AGAIN, said]):
        plain = [{"role": m.role, "content": m.content} for m in messages]
        theirs = tokenizer.inner.apply_chat_template(plain, return_dict=False)
        ours = chat.encode(messages).ids
        assert theirs[: len(ours)] == ours
        assert ours.count(tokenizer.token_id("</think>") or tokenizer.inner.convert_tokens_to_ids("</think>")) == 1
    thinks = Message("user", "</think> <think> Hello")
    ids = chat.encode_prompt([thinks])
    assert "</think> <think> Hello" in chat.decode(ids)
    assert not {*tokenizer.inner.convert_tokens_to_ids(["<think>", "</think>"])} & {*ids}


# --- long conversations -----------------------------------------------------------------------------------------------


class Counting:
    """Renders with a template and counts the messages that it rendered."""

    def __init__(self, source: str) -> None:
        self.template, self.rendered = ChatTemplate(source), 0

    def __call__(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        self.rendered += len(messages)
        return self.template.render(messages, generation_prompt=generation_prompt, bos="<bos>", eos="<eos>")


def one_by_one(render: Counting, messages: Sequence[Message]) -> Rendering:
    """Each turn by the two renderings that end before it and behind it."""
    text, turns = render(messages, True), []
    for place, message in enumerate(messages):
        if message.role == "assistant":
            before, after = render(messages[:place], True), render(messages[: place + 1], False)
            if text.startswith(after) and after.startswith(before):
                turns.append((place, len(before), len(after)))
    return Rendering(text, tuple(turns))


@pytest.mark.parametrize("name", [*TEMPLATES, *STYLES])
def test_a_long_conversation_is_cut_where_its_renderings_one_by_one_end(name: str):
    render, rng = Counting((TEMPLATES | STYLES)[name]), random.Random(name)
    systems = name in TEMPLATES
    for turns in (EXACT_TURNS - 1, EXACT_TURNS + 1, 30):
        for system in (False, True):
            messages = [SYSTEM] if system else []
            for number in range(turns):
                messages += [Message("user", rng.choice(("a", " b\n", "c <eos>", "")) + str(number))]
                messages += [Message("system", "late")] * (systems and rng.random() < 0.2)
                messages += [Message("assistant", rng.choice(("x", "\n y ", "z\n\nz")))] * rng.choice(
                    (1, 1, 1, 2) if systems else (1,)
                )
            messages.append(ASK)
            try:
                found, exact = render_turns(render, messages, generation_prompt=True), one_by_one(render, messages)
            except DataError:
                continue
            assert found.text == exact.text
            assert found.turns in (exact.turns, ()) if name in STYLES else found.turns == exact.turns


@pytest.mark.parametrize(
    "name", ["gemma", "chatml", "llama3", "plain", "drops reasoning", "every turn has a number", "the count stands first"]
)
def test_2000_messages_take_a_time_that_grows_with_their_number_alone(name: str):
    render = Counting((TEMPLATES | STYLES)[name])
    messages = [SYSTEM, *[ASK, SAY] * 1000, AGAIN]
    found = render_turns(render, messages, generation_prompt=True)
    assert render.rendered < 15 * len(messages)
    assert len(found.turns) == (1000 if name in TEMPLATES else 0)

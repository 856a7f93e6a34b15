"""Chat: answers stream, stages are switched on one loaded base, mistakes are told and the conversation goes on."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from posttrain.artifacts import publish
from posttrain.cli import main
from posttrain.data.chat import load_chat_format
from posttrain.data.formats import read_demonstrations
from posttrain.errors import ModelError
from posttrain.generate import engine
from posttrain.generate.engine import SamplingSettings, generate, stream
from posttrain.models import base_model
from posttrain.models.adapter_files import full_state, save_full
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.target import Target, open_target
from posttrain.recipe import load_recipe, to_toml
from posttrain.records import Message
from posttrain.serve.chat import HELP, chat
from tiny_runs import TINY, finished_run

# Longer than the pieces in which prompts are kept.
LONG = "Tell me about the sea. " * 15
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0, logprobs=False)


@pytest.fixture(scope="module")
def target() -> Target:
    return open_target(str(finished_run() / "dpo"))


class Recorder(io.StringIO):
    """Output that remembers each piece it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def talk(
    target: Target, *lines: str, beside: tuple[str, ...] = (), system: str = "", settings: SamplingSettings = GREEDY
) -> str:
    out = io.StringIO()
    source = io.StringIO("".join(f"{line}\n" for line in lines))
    assert chat(target, settings, system=system, beside=beside, source=source, out=out) == 0
    return out.getvalue()


def answer(target: Target, policy: str, *turns: str, system: str = "") -> str:
    """What `generate` says to a conversation of user, assistant, user, …"""
    messages = [Message("system", system)] if system else []
    messages += [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns)]
    prompt = target.base.chat.encode_prompt(messages)
    return generate(target.base, [prompt], GREEDY, target.policies.activate(policy))[0].text


def test_a_conversation_goes_on_from_its_own_answers(target: Target):
    first = answer(target, "dpo", "Hi")
    second = answer(target, "dpo", "Hi", first, "And now?")
    text = talk(target, "Hi", "", "  ", "And now?", "/quit", "never asked")
    assert f"you> dpo> {first}\n" in text
    assert f"you> dpo> {second}\n" in text
    assert "never asked" not in text
    assert text.count("dpo> ") == 2


def test_a_system_message_is_part_of_it_and_reset_keeps_it(target: Target):
    said = answer(target, "dpo", "Hi", system="Be brief.")
    text = talk(target, "Hi", "/reset", "Hi", system="Be brief.")
    assert text.count(f"dpo> {said}\n") == 2
    assert "conversation cleared\n" in text


def test_adapter_switches_without_loading_the_base_again(target: Target, monkeypatch: pytest.MonkeyPatch):
    loads: list[str] = []
    monkeypatch.setattr(base_model.transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append("base"))
    text = talk(target, "/adapter base", "Hi", "/adapter sft", "/reset", "Hi", "/adapter dpo", "/reset", "Hi")
    for policy in ("base", "sft", "dpo"):
        assert f"now {policy}\n" in text
        assert f"{policy}> {answer(target, policy, 'Hi')}\n" in text
    assert loads == []


def test_the_new_speaker_goes_on_with_the_conversation(target: Target):
    first = answer(target, "dpo", "Hi")
    text = talk(target, "Hi", "/adapter base", "Why?")
    assert f"base> {answer(target, 'base', 'Hi', first, 'Why?')}\n" in text


def test_several_stages_answer_side_by_side_each_in_its_own_conversation(target: Target):
    text = talk(target, "Hi", "Why?", beside=("base", "sft", "dpo"))
    for policy in ("base", "sft", "dpo"):
        first = answer(target, policy, "Hi")
        assert f"{policy}> {first}\n" in text
        assert f"{policy}> {answer(target, policy, 'Hi', first, 'Why?')}\n" in text


@pytest.mark.parametrize("line", ["/adapter nope", "/adapter", "/adapter ../sft"])
def test_an_unknown_stage_is_told_and_the_chat_goes_on(target: Target, line: str):
    text = talk(target, line, "Hi")
    name = line.partition(" ")[2]
    assert f'error: chat · no stage "{name}" · there is: base, sft, dpo, ppo\n' in text
    assert f"dpo> {answer(target, 'dpo', 'Hi')}\n" in text


def test_an_unknown_stage_to_compare_is_refused_at_once(target: Target):
    with pytest.raises(ModelError, match='no stage "nope"'):
        talk(target, "Hi", beside=("base", "nope"))


# --- what is asked of the chat itself ---------------------------------------------------------------------------------


def test_the_system_message_is_shown_set_and_stands_above_what_was_said(target: Target):
    first = answer(target, "dpo", "Hi")
    text = talk(target, "/system", "Hi", "/system Be brief.", "/system", "And now?", "/reset", "Hi")
    assert text.count("system: none\n") == 1
    assert text.count("system: Be brief.\n") == 2
    assert f"dpo> {first}\n" in text
    assert f"dpo> {answer(target, 'dpo', 'Hi', first, 'And now?', system='Be brief.')}\n" in text
    assert text.endswith(f"conversation cleared\nyou> dpo> {answer(target, 'dpo', 'Hi', system='Be brief.')}\nyou> \n")


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
IGNORES = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", [REFUSES + IGNORES, IGNORES], ids=["refuses", "ignores"])
def test_a_template_without_a_system_message_says_so(target: Target, template: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target.base.tokenizer.inner, "chat_template", template)
    monkeypatch.setattr(target.base, "chat", load_chat_format(target.base.tokenizer))
    text = talk(target, "/system Be brief.", "/system", "Hi")
    assert (
        "error: chat · the chat template of this model does not support a system message · put it in your first line\n" in text
    )
    assert "system: none\n" in text
    assert f"dpo> {answer(target, 'dpo', 'Hi')}\n" in text
    with pytest.raises(ModelError, match="does not support a system message"):
        talk(target, "Hi", system="Be brief.")


def test_undo_forgets_one_exchange_after_another(target: Target):
    first = answer(target, "dpo", "Hi")
    text = talk(target, "Hi", "Why?", "/undo", "And now?", "/undo", "/undo", "/undo", "Hi")
    assert f"dpo> {answer(target, 'dpo', 'Hi', first, 'And now?')}\n" in text
    removed = [
        line.removeprefix("you> ") for line in text.splitlines() if ("removed" in line or "empty" in line) and HELP not in line
    ]
    assert removed == ["removed: Why?", "removed: And now?", "removed: Hi", "error: chat · the conversation is empty"]
    assert text.count(f"dpo> {first}\n") == 2


def test_undo_forgets_what_the_last_line_left_and_no_more(target: Target, monkeypatch: pytest.MonkeyPatch):
    real, answers = stream, []

    def given(*arguments: object) -> Generator[int]:
        answers.append(1)  # the fourth answer, that of "base" to the second line, has no word in it
        yield from ([] if len(answers) == 4 else real(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr("posttrain.serve.chat.stream", given)
    text = talk(target, "Hi", "Why?", "/undo", "And now?", beside=("dpo", "base"))
    for policy in ("dpo", "base"):
        assert f"{policy}> {answer(target, policy, 'Hi', answer(target, policy, 'Hi'), 'And now?')}\n" in text


def test_a_saved_conversation_is_a_demonstration(target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "my talk.jsonl"
    first = answer(target, "dpo", "Grüße", system="Be brief.")
    second = answer(target, "dpo", "Grüße", first, "Why?", system="Be brief.")
    text = talk(target, "Grüße", "Why?", f"/save {path}", f"/save {path}", "Hi", system="Be brief.")
    assert f"saved: {path}\n" in text
    assert f"error: {path} · exists already · name a file that does not exist yet\n" in text
    spoken = [("system", "Be brief."), ("user", "Grüße"), ("assistant", first), ("user", "Why?"), ("assistant", second)]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"messages": [{"role": role, "content": text} for role, text in spoken]}]
    (read,) = read_demonstrations(str(path), seed=0).records
    assert [(m.role, m.content) for m in read.messages] == spoken
    assert main(["data", "check", str(path), "--template", "gemma"]) == 0
    assert "1 " in capsys.readouterr().out


def test_stages_side_by_side_are_saved_a_row_each(target: Target, tmp_path: Path):
    talk(target, "Hi", f"/save {tmp_path / 'both.jsonl'}", beside=("base", "dpo"))
    rows = [json.loads(line)["messages"] for line in (tmp_path / "both.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row[1]["content"] for row in rows] == [answer(target, policy, "Hi") for policy in ("base", "dpo")]


def test_what_cannot_be_saved_is_told_and_the_chat_goes_on(target: Target, tmp_path: Path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    names = ["none/x.jsonl", "link.jsonl", "nul\0.jsonl"]
    text = talk(target, f"/save {tmp_path / 'x'}", "Hi", "/save", *[f"/save {tmp_path / name}" for name in names], "Hi")
    errors = [line.removeprefix("you> ") for line in text.splitlines() if "error: " in line]
    assert errors == [
        "error: chat · the conversation is empty · /save FILE after an answer",
        "error: chat · /save without a file name · /save FILE after an answer",
        f"error: {tmp_path / 'none/x.jsonl'} · No such file or directory · name another file",
        f"error: {tmp_path / 'link.jsonl'} · exists already · name a file that does not exist yet",
        f"error: {tmp_path}/nul\\u0000.jsonl · not a file name · name another file",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl"]
    assert text.count("dpo> ") == 2


def test_one_engine_answers_the_whole_chat(target: Target, monkeypatch: pytest.MonkeyPatch):
    made: list[engine.Engine] = []
    begin = engine.Engine.__init__

    def counted(self: engine.Engine, base: BaseModel, *, serving: bool) -> None:
        made.append(self)
        begin(self, base, serving=serving)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "__init__", counted)
        text = talk(target, LONG, "Why?", "/adapter base", "/undo", "Why?")
    first = answer(target, "dpo", LONG)
    for policy in ("dpo", "base"):
        assert f"{policy}> {answer(target, policy, LONG, first, 'Why?')}\n" in text
    assert len(made) == 1
    assert not made[0].live
    assert made[0].prefixes.hits >= 256  # of the first turn, when the second came


def test_full_weights_that_take_the_place_of_others_answer_by_themselves(tmp_path: Path):
    base = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in full_state(base).values():
            parameter.add_(torch.empty(parameter.shape).normal_(std=0.1, generator=generator))
    (tmp_path / "partial").mkdir()
    recipe = load_recipe(TINY, ('adapter.kind="full"', 'base.dtype="float32"'))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    save_full(tmp_path / "partial", base)
    publish(tmp_path / "partial", tmp_path / "sft", {"kind": "weights", "fingerprint": "made"})
    full = open_target(str(tmp_path / "sft"))
    answers = {policy: answer(full, policy, LONG) for policy in ("base", "sft")}
    assert answers["base"] != answers["sft"]
    text = talk(full, LONG, "/adapter base", "/undo", LONG, "/adapter sft", "/undo", LONG)
    for policy, times in (("sft", 2), ("base", 1)):
        assert text.count(f"{policy}> {answers[policy]}\n") == times


def test_other_words_after_a_slash_show_the_help(target: Target):
    assert talk(target, "/help", "/nonsense").count(HELP + "\n") == 3  # once at the start


def test_the_end_of_input_ends_it(target: Target):
    assert talk(target).endswith("you> \n")
    out = io.StringIO()
    assert chat(target, GREEDY, source=io.StringIO("Hi"), out=out) == 0  # a last line without its end is a line
    assert "dpo> " in out.getvalue()


def test_a_conversation_beyond_the_context_is_told_and_the_chat_goes_on(target: Target):
    text = talk(target, "x" * 3000, "Hi")
    assert "error: chat · the conversation has 30" in text
    assert "together at most 2048" in text
    assert "/reset" in text.split("error: ")[1].split("\n")[0]
    # the line that was too long is not part of the conversation
    assert f"dpo> {answer(target, 'dpo', 'Hi')}\n" in text


def test_ctrl_c_ends_an_answer_and_then_the_chat(target: Target, monkeypatch: pytest.MonkeyPatch):
    real, calls = engine.Engine.step, []

    def interrupted(self: engine.Engine) -> list[engine.Event]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self)

    class Source(io.StringIO):
        def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(engine.Engine, "step", interrupted)
    out = io.StringIO()
    assert chat(target, GREEDY, source=Source("Hi\nHi\n"), out=out) == 0
    # the answer that was cut short is forgotten: the second is the first one's whole
    assert f"dpo> {answer(target, 'dpo', 'Hi')}\n" in out.getvalue()
    assert out.getvalue().endswith("you> \n")


def speak(target: Target, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[str]:
    """The pieces in which an answer of these tokens is shown."""

    def given(*arguments: object) -> Generator[int]:
        yield from ids

    monkeypatch.setattr("posttrain.serve.chat.stream", given)
    out = Recorder()
    assert chat(target, GREEDY, source=io.StringIO("Hi\n"), out=out) == 0
    start, end = out.pieces.index("dpo> ") + 1, len(out.pieces) - 3
    return out.pieces[start:end]


def test_it_streams_and_a_character_of_several_tokens_is_shown_once_it_is_whole(
    target: Target, monkeypatch: pytest.MonkeyPatch
):
    text = "aé日🙂z\u200d!"  # 1, 2, 3, 4, 1, 3 and 1 bytes: a token each
    ids = target.base.tokenizer.encode(text, plain=True)
    assert len(ids) == 15
    assert speak(target, monkeypatch, ids) == ["a", "é", "日", "🙂", "z", "\u200d", "!"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(target: Target, monkeypatch: pytest.MonkeyPatch):
    broken = target.base.tokenizer.encode("a🙂", plain=True)[:3]
    assert "".join(speak(target, monkeypatch, broken)) == target.base.chat.decode(broken)
    wrong_then_right = [*target.base.tokenizer.encode("🙂", plain=True)[:2], *target.base.tokenizer.encode("bcd", plain=True)]
    assert "".join(speak(target, monkeypatch, wrong_then_right)) == target.base.chat.decode(wrong_then_right)


def test_control_characters_of_an_answer_do_not_reach_the_terminal(target: Target, monkeypatch: pytest.MonkeyPatch):
    ids = target.base.tokenizer.encode("a\x1b[2Jb\x07\tc\nd", plain=True)
    assert "".join(speak(target, monkeypatch, ids)) == "a\\u001b[2Jb\\u0007\tc\nd"


def test_a_long_answer_is_decoded_in_pieces_that_add_up(target: Target, monkeypatch: pytest.MonkeyPatch):
    text = "naïve 日本語 🙂 " * 40
    assert "".join(speak(target, monkeypatch, target.base.tokenizer.encode(text, plain=True))) == text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_command_with_piped_input_of_any_bytes(encoding: str):
    command = [
        sys.executable,
        "-m",
        "posttrain.cli",
        "chat",
        str(finished_run()),
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
    ]
    lines = "Grüße\n/adapter base\nHi\n".encode() + b"\xff\xfe\n"
    done = subprocess.run(command, input=lines, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode(encoding)
    assert text.startswith("random:tiny ")
    assert text.count("you> ") == 5
    assert "now base\n" in text
    assert done.stderr == b""


def test_comparing_a_stage_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]):
    assert main(["chat", str(finished_run()), "--compare", "base,rm"]) == 2
    assert capsys.readouterr().err == 'error: chat · no stage "rm" · there is: base, sft, dpo, ppo\n'

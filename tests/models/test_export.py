"""`posttrain export`: other tools load the folder and answer as the policy does."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from go_templates import read_modelfile, render
from logits_of import our_logits, plain_logits

from posttrain.cli import build_parser, main
from posttrain.data.chat import TEMPLATES, ChatFormat, load_chat_format
from posttrain.errors import ArtifactError, ModelError
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.adapter_files import full_state
from posttrain.models.base_model import BaseModel, load_base, load_tokenizer
from posttrain.models.export import FORMATS, GO_TEMPLATES, export_target, go_template
from posttrain.models.target import Target, open_target
from posttrain.models.tokenizer import HuggingFaceTokenizer
from posttrain.records import Message, Role

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = [1, 30, 99, 3, 77, 140, 12, 4, 200, 11]
END_OF_TURN = 4


@pytest.fixture
def stage(tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path) -> Path:
    """A finished stage whose policy likes to end its turns: its row of <end_of_turn> is a large one."""
    return run_of(tmp_path / "run", tiny, lively(tiny, "sft", token_ids=(END_OF_TURN,)))


def exported(stage: Path, to: str) -> Path:
    return export_target(open_target(str(stage)), to, stage.parent.parent / to)


# --- hf ---------------------------------------------------------------------------------------------------------------


def test_transformers_answers_token_for_token_as_we_do_and_stops_at_the_end_of_the_turn(tiny: BaseModel, stage: Path):
    folder = exported(stage, "hf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lengths = []
    for question in ("Hello", "What is 2 + 3?", "Name a colour.", "Why?", "Grüße", "Say a word", "and now", "Good day to you"):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt["input_ids"][0].tolist() == tiny.chat.encode_prompt([Message("user", question)])
        out = plain.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        (ours,) = generate(tiny, [prompt["input_ids"][0].tolist()], SamplingSettings(24), "sft")
        assert out == list(ours.completion_ids)
        assert ours.ended == (out[-1] == END_OF_TURN)
        lengths.append(len(out))
    assert any(1 < length < 24 for length in lengths), f"no answer that ends by itself: {lengths}"


# --- peft -------------------------------------------------------------------------------------------------------------


def test_peft_loads_the_folder_and_gives_the_same_logits(tiny: BaseModel, stage: Path):
    folder = exported(stage, "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (stage / name).read_bytes()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny.source.folder, dtype=torch.float32)
    without = plain_logits(plain, IDS)
    loaded = peft.PeftModel.from_pretrained(plain, folder).eval()
    ours = our_logits(tiny, IDS, "sft")
    assert torch.allclose(plain_logits(loaded, IDS), ours, rtol=0, atol=1e-5)
    assert (ours - without).abs().max() > 0.1  # the adapter says something


def test_the_readme_of_an_adapter_names_its_base_and_its_code_runs(
    tiny: BaseModel, stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = exported(stage, "peft")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "`random:tiny`" in text
    assert tiny.source.weights_hash in text
    assert f"`models/{tiny.source.folder.name}` is what posttrain made of it" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    code = code.replace(f"models/{tiny.source.folder.name}", str(tiny.source.folder))
    exec(compile(code, "README.md", "exec"), {})
    (ours,) = generate(tiny, [tiny.chat.encode_prompt([Message("user", "Hello")])], SamplingSettings(64), "sft")
    assert capsys.readouterr().out == ours.text + "\n"


def test_the_readme_takes_a_hub_id_or_a_folder_as_it_is(tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path):
    base = load_base(str(tiny.source.folder), template="gemma", dtype="float32", device="cpu")
    folder = exported(run_of(tmp_path / "run", base, lively(base, "sft")), "peft")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f'from_pretrained("{tiny.source.folder}", dtype' in text
    assert "is what posttrain made of it" not in text


# --- ollama -----------------------------------------------------------------------------------------------------------


def test_the_modelfile_renders_as_we_do_and_stops_where_we_do(tiny: BaseModel, stage: Path):
    folder = exported(stage, "ollama")
    instructions = read_modelfile((folder / "Modelfile").read_text(encoding="utf-8"))
    assert instructions[0] == ("FROM", ".")
    assert [name for name, _ in instructions] == ["FROM", "TEMPLATE", "PARAMETER stop", "PARAMETER stop"]
    stops = [value for name, value in instructions if name == "PARAMETER stop"]
    assert {tiny.tokenizer.token_id(text) for text in stops} == tiny.chat.end_ids
    template = dict(instructions)["TEMPLATE"]
    for messages in conversations():
        assert render(template, messages) == tiny.chat.decode(tiny.chat.encode_prompt(messages), special=True)
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is False
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(plain_logits(plain, IDS), our_logits(tiny, IDS, "sft"), rtol=0, atol=1e-5)


def conversations() -> list[list[Message]]:
    """One question, several turns, and several turns under system messages wherever they stand."""
    turns: list[tuple[Role, str]] = [
        ("user", "Hello <b>there</b>"), ("assistant", "Good day.\n\nHow are you?"), ("user", "{{ .Role }} \"\"\" 'x' 日本 🙂"),
        ("assistant", "Fine"), ("user", "And now?"),
    ]  # fmt: skip
    talk = [Message(role, text) for role, text in turns]
    brief, late = Message("system", "Be brief."), Message("system", "In French.")
    return [
        talk[:1], talk[:3], talk, [brief, *talk], [brief, talk[0]], [brief, late, talk[0]], [talk[0], brief], [brief],
        [talk[0], late, *talk[1:], brief, late], [*talk[:2], brief, *talk[2:]],
    ]  # fmt: skip


class Prompted(NamedTuple):
    """As much of a base as a template needs."""

    chat: ChatFormat
    tokenizer: HuggingFaceTokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["BOS is ours to write", "the tokenizer adds BOS"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """One token a byte, with the control tokens of every template of ours."""
    import tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    found = transformers.AutoTokenizer.from_pretrained(load_base("random:tiny", template="gemma").source.folder)
    found.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]})
    if request.param:
        found.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    found.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_of_ours_is_the_same_in_go(tokenizer: HuggingFaceTokenizer, name: str):
    chat = load_chat_format(tokenizer, name)
    template = go_template(Prompted(chat, tokenizer))  # type: ignore[arg-type]
    added = "<bos>" if tokenizer.adds_bos else ""
    for messages in conversations():
        assert added + render(template, messages) == chat.decode(chat.encode_prompt(messages), special=True)
    assert template.startswith("<bos>") == (not tokenizer.adds_bos and name != "chatml")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_models_own_template_that_renders_like_one_of_ours_is_found(tokenizer: HuggingFaceTokenizer, name: str):
    tokenizer.inner.chat_template = TEMPLATES[name].replace("for m in messages", "for  m  in  messages")
    auto = Prompted(load_chat_format(tokenizer), tokenizer)
    assert auto.chat.template_name == "auto"
    assert go_template(auto) == go_template(Prompted(load_chat_format(tokenizer, name), tokenizer))  # type: ignore[arg-type]


def test_a_models_own_template_like_none_of_ours_is_refused(tokenizer: HuggingFaceTokenizer):
    tokenizer.inner.chat_template = TEMPLATES["chatml"].replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(ModelError, match=r"own chat template is Jinja.*gemma, chatml, llama3, plain.*--to hf"):
        go_template(Prompted(load_chat_format(tokenizer), tokenizer))  # type: ignore[arg-type]


def test_go_has_every_template_and_the_command_every_format():
    assert GO_TEMPLATES.keys() == TEMPLATES.keys()
    parse = build_parser().parse_args
    assert [parse(["export", "run/sft", "--to", to, "--out", "x"]).to for to in FORMATS] == list(FORMATS)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def full(run_of: Callable, tmp_path: Path) -> Target:
    """A stage with full weights."""
    base = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    with torch.no_grad():
        for parameter in full_state(base).values():
            parameter.add_(0.01)
    return open_target(str(run_of(tmp_path / "run", base, None)))


def test_full_weights_are_no_adapter_but_a_model(full: Target, tmp_path: Path):
    with pytest.raises(ArtifactError, match="weights of its own, not an adapter · --to hf or --to ollama · train with"):
        export_target(full, "peft", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    folder = export_target(full, "hf", tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(plain_logits(plain, IDS), our_logits(full.base, IDS, "base"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", FORMATS)
def test_an_existing_folder_and_the_base_itself_are_refused(stage: Path, to: str, capsys: pytest.CaptureFixture[str]):
    there = stage.parent.parent / "there"
    there.mkdir()
    assert main(["export", str(stage), "--to", to, "--out", str(there)]) == 2
    assert "exists already · name a folder that does not exist yet" in capsys.readouterr().err
    assert list(there.iterdir()) == []
    assert main(["export", str(stage.parent / "base"), "--to", to, "--out", str(there / "new")]) == 2
    assert "the base itself has nothing to export" in capsys.readouterr().err
    assert list(there.iterdir()) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_refuses_leaves_nothing_and_is_a_clear_error(stage: Path, to: str):
    target = open_target(str(stage))
    target.policies.activate("sft")
    with largest_file(1000), pytest.raises(ArtifactError, match="choose another folder with --out"):
        export_target(target, to, stage.parent.parent / "out")
    assert sorted(path.name for path in stage.parent.parent.iterdir()) == ["run"]

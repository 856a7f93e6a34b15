"""`posttrain merge`: the folder is the policy, for any tool."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from logits_of import our_logits, plain_logits
from safetensors.torch import load_file, save_file

from posttrain.cli import main
from posttrain.errors import AdapterError, ArtifactError
from posttrain.models.adapter_files import full_state
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.merge import merge_target
from posttrain.models.obtain import _new_folder
from posttrain.models.target import open_target
from posttrain.records import Message

IDS = [1, 30, 99, 3, 77, 140, 12, 4, 200, 11]


@pytest.mark.parametrize(("token_ids", "scaling"), [((), "standard"), ((), "rslora"), ((3, 4), "standard")])
def test_merged_logits_are_the_unmerged_ones_within_1e_5(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path, token_ids: tuple[int, ...], scaling: str
) -> None:
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a", token_ids=token_ids, scaling=scaling))
    unmerged = our_logits(tiny, IDS, "a")
    assert (unmerged - our_logits(tiny, IDS, "base")).abs().max() > 0.1  # the adapter says something
    merged = merge_target(open_target(str(stage)), tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert torch.allclose(plain_logits(plain, IDS), unmerged, rtol=0, atol=1e-5)
    ours = load_base(str(merged), dtype="float32", device="cpu")  # template "auto": the folder brings its own
    assert torch.allclose(our_logits(ours, IDS, "base"), unmerged, rtol=0, atol=1e-5)


def test_the_merged_folder_speaks_and_stops_as_the_policy_does(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path
) -> None:
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
    assert main(["merge", str(stage), "--out", str(tmp_path / "merged")]) == 0
    ours = load_base(str(tmp_path / "merged"), dtype="float32", device="cpu")
    talk = [Message("user", "Hello"), Message("assistant", "Hi."), Message("user", "And <eos> now?")]
    assert ours.chat.encode_prompt(talk) == tiny.chat.encode_prompt(talk)
    assert ours.chat.end_ids == tiny.chat.end_ids
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "merged")
    end_of_turn = tiny.tokenizer.token_id("<end_of_turn>")
    assert end_of_turn in generation.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert "posttrain" not in (tmp_path / "merged" / "config.json").read_text()


def test_transformers_stops_the_merged_model_at_the_end_of_its_turn(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path
) -> None:
    adapter = lively(tiny, "a", token_ids=(4,))  # 4: <end_of_turn>
    hidden = our_last_hidden(tiny, IDS)
    with torch.no_grad():  # the head is tied: this row makes <end_of_turn> by far the likeliest next token
        adapter.tokens.rows[0] = 100 * hidden
    merged = merge_target(open_target(str(run_of(tmp_path / "run", tiny, adapter))), tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    out = plain.generate(torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS)), max_new_tokens=20, do_sample=False)
    assert out[0, len(IDS) :].tolist() == [4]


def our_last_hidden(base: BaseModel, ids: list[int]) -> torch.Tensor:
    from posttrain.models.segments import Segments, Span

    with torch.no_grad():
        return base.hidden(torch.tensor(ids), torch.arange(len(ids)), Segments((Span(0, len(ids)),)), "a")[-1]


def test_full_weights_are_copied(tmp_path: Path, run_of: Callable) -> None:
    base = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    with torch.no_grad():
        for parameter in full_state(base).values():
            parameter.add_(0.01)
    stage = run_of(tmp_path / "run", base, None)
    merged = merge_target(open_target(str(stage)), tmp_path / "merged")
    stored, copied = load_file(stage / "model.safetensors"), load_file(merged / "model.safetensors")
    assert stored.keys() == copied.keys()
    assert all(torch.equal(stored[name], copied[name]) for name in stored)
    assert load_base(str(merged)).chat.end_ids == base.chat.end_ids


def test_an_existing_folder_is_left_alone(tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path) -> None:
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        merge_target(open_target(str(stage)), tmp_path / "there")
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["mine.txt"]


def test_the_base_itself_is_refused(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
    assert main(["merge", str(stage.parent / "base"), "--out", str(tmp_path / "merged")]) == 2
    assert "nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused(tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path) -> None:
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
    other = shutil.copytree(tiny.source.folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    recipe = stage.parent / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("random:tiny", str(other)))
    with pytest.raises(AdapterError, match="was trained on base"):
        merge_target(open_target(str(stage)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_cannot_be_written_leaves_nothing(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path
) -> None:
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError):
        merge_target(open_target(str(stage)), tmp_path / "file" / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_are_readable_for_whom_the_umask_says(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
        merged = merge_target(open_target(str(stage)), tmp_path / "merged")
        with _new_folder(tmp_path / "cache" / "base") as converted:
            transformers.AutoModelForCausalLM.from_pretrained(tiny.source.folder).save_pretrained(converted)
    finally:
        os.umask(before)
    for folder in (stage, merged, tmp_path / "cache" / "base"):
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {p.name: mode for p in folder.iterdir()}

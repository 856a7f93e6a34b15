"""Training that cannot go on, through the whole command: exit code 2, one line, and what was there stays whole."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from kill_runs import COMMON, ON_ROWS, Watched
from safetensors.torch import load_file, save_file
from tiny_stages import demonstrations, hashes, write_rows

from posttrain.cli import main
from posttrain.models.base_model import BaseModel
from posttrain.train.checkpoint import load_newest

RECIPE = COMMON + ON_ROWS
POISON = "§"  # its bytes stand in no evaluation item of the first of each task


def untied(base: BaseModel, target: Path) -> Path:
    """A copy of the tiny base whose embedding of one byte is NaN, the head apart so that only rows with it are hit."""
    shutil.copytree(base.source.folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(target / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    embedding[base.chat.encode_text(POISON)] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_planted_nan_stops_before_the_step_and_names_the_rows(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [json.loads(line) for line in demonstrations(tmp_path / "d.jsonl", 30).read_text(encoding="utf-8").splitlines()]
    rows[17]["messages"][0]["content"] += POISON
    data = write_rows(tmp_path / "d.jsonl", rows)
    recipe = tmp_path / "recipe.toml"
    model = untied(base, tmp_path / "model")
    text = (
        RECIPE.format(kind="sft", data=data, size=1)
        .replace("random:tiny", str(model))
        .replace("validation = 0.2", "validation = 0")
    )
    recipe.write_text(text, encoding="utf-8")
    run = tmp_path / "run"
    assert main(["run", str(recipe), "--out", str(run)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    partial = run / ".sft.partial"
    dumped = json.loads((partial / "nonfinite.json").read_text(encoding="utf-8"))
    assert dumped["what"] == "the loss"
    assert "row-17" in dumped["rows"]
    assert len(dumped["rows"]) <= 2  # those of one micro-batch
    assert said.startswith(
        f"error: step {dumped['step']} · the loss is not finite; the step was not taken · rows of this batch:"
    )
    saved = load_newest(partial / "checkpoints")
    assert (int(saved.state["step"]) if saved else 0) == dumped["step"] - 1
    assert not (run / "sft").exists()
    assert main(["run", str(recipe), "--out", str(run)]) == 2  # the same end, from the checkpoint
    if saved is not None:
        again = load_newest(partial / "checkpoints")
        assert again is not None
        assert hashes(again.tensors) == hashes(saved.tensors)


def test_a_full_disk_ends_with_2_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The largest file of this run is the state of a checkpoint: with room for everything else, saving is what fails."""
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(kind="sft", data=demonstrations(tmp_path / "d.jsonl"), size=1), encoding="utf-8")
    assert main(["run", str(recipe), "--out", str(tmp_path / "room")]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        code = main(["run", str(recipe), "--out", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert said.startswith("error: ")
    assert "step-00000001 · the file is too large for this disk · make room" in said
    assert Watched(run, "sft").saved() == 0
    assert main(["run", str(recipe), "--out", str(run)]) == 0
    weights = [hashes(load_file(folder / "sft" / "adapter_model.safetensors")) for folder in (run, tmp_path / "room")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("choice", ['keep = "best"', "patience = 2"])
def test_choosing_by_validation_without_a_held_out_row_is_said(choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    text = RECIPE.format(kind="sft", data=demonstrations(tmp_path / "d.jsonl"), size=0.2).replace('keep = "best"', choice)
    recipe.write_text(text.replace("validation = 0.2", "validation = 0"), encoding="utf-8")
    assert main(["run", str(recipe), "--out", str(run)]) == 0
    assert "warning: no row is held out for validation" in capsys.readouterr().err
    manifest = json.loads((run / "sft" / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["warnings"]) == 1

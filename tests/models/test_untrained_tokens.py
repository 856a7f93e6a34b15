"""Untrained template tokens are found, and their rows can be trained beside an adapter, from recipe to merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from logits_of import our_logits, plain_logits
from safetensors.torch import load_file, save_file

from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.target import open_target
from posttrain.models.untrained_tokens import token_ids, untrained_similarity, untrained_tokens, unused_ids, unused_probability

UNUSED = 16


@pytest.fixture
def neglected(tiny: BaseModel, tmp_path: Path) -> BaseModel:
    """random:tiny with 16 unused tokens, whose common direction <end_of_turn> has too; 4 rows lie beyond the vocabulary."""
    folder = tmp_path / "neglected"
    shutil.copytree(tiny.source.folder, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(UNUSED)])
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    common = 0.02 * torch.randn(64, generator=generator)
    fresh = common + 0.001 * torch.randn(UNUSED + 4, 64, generator=generator)
    rows[4] = common + 0.001 * torch.randn(64, generator=generator)
    tensors["model.embed_tokens.weight"] = torch.cat([rows, fresh])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(rows) + UNUSED + 4}))
    return load_base(str(folder), template="gemma", dtype="float32", device="cpu")


def test_unused_tokens_are_known_by_name_and_by_place(neglected: BaseModel, tiny: BaseModel) -> None:
    assert unused_ids(neglected) == list(range(263, 263 + UNUSED + 4))
    assert unused_ids(tiny) == []


def test_a_template_token_among_the_unused_ones_is_warned_of(neglected: BaseModel) -> None:
    cosines = untrained_similarity(neglected, unused_ids(neglected))
    assert cosines["<end_of_turn>"] > 0.95
    assert abs(cosines["<start_of_turn>"]) < 0.5
    (warning,) = untrained_tokens(neglected)
    assert 'train_tokens = ["<end_of_turn>"]' in warning
    assert "<start_of_turn>" not in warning
    assert untrained_tokens(neglected, ("<end_of_turn>",)) == []


def test_a_base_without_unused_tokens_has_nothing_to_warn_of(tiny: BaseModel) -> None:
    assert untrained_tokens(tiny) == []


def test_leak_is_the_share_of_unused_tokens(neglected: BaseModel) -> None:
    """With a head of zeros every token has the same probability."""
    unused = unused_ids(neglected)
    leak = unused_probability(neglected, unused)
    assert 0 < leak < 0.2
    with torch.no_grad():
        neglected.head_VD.zero_()
    assert unused_probability(neglected, unused) == pytest.approx(len(unused) / (263 + UNUSED + 4))


def test_token_names_become_ids(tiny: BaseModel) -> None:
    assert token_ids(tiny, ("<end_of_turn>", "<start_of_turn>")) == (4, 3)
    with pytest.raises(RecipeError, match="no token '<end_of_turm>'"):
        token_ids(tiny, ("<eos>", "<end_of_turm>"))


RECIPE = """
name = "rows"
[base]
model = "{model}"
template = "gemma"
dtype = "float32"
[adapter]
{adapter}
[[stage]]
kind = "sft"
name = "sft"
data = "{data}/demonstrations.jsonl"
validation = 0
batch = 4
learning_rate = 0.01
[[stage]]
kind = "dpo"
name = "dpo"
init = "sft"
data = "{data}/preferences.jsonl"
validation = 0
batch = 4
learning_rate = 0.01
[evaluation]
suites = ["starter"]
limit = 1
max_new_tokens = 2
sample_tokens = 2
samples = ["Hello"]
"""


def write_recipe(folder: Path, adapter: str, model: str = "random:tiny") -> Path:
    """A recipe of two stages with eight rows each."""
    talks = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n)}]} for n in range(8)
    ]
    pairs = [{"prompt": f"Say {n}.", "chosen": str(n), "rejected": f"No {n}!"} for n in range(8)]
    for name, rows in (("demonstrations", talks), ("preferences", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(adapter=adapter, data=folder, model=model))
    return path


IDS = [1, 3, 40, 50, 4, 60, 99, 4]


def test_a_recipe_trains_rows_through_every_stage_into_the_merged_model(tmp_path: Path, tiny: BaseModel) -> None:
    recipe = write_recipe(tmp_path, 'rank = 2\ntrain_tokens = ["<end_of_turn>", "<start_of_turn>"]')
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    rows = {}
    for stage in ("sft", "dpo"):
        config = json.loads((tmp_path / "run" / stage / "adapter_config.json").read_text())
        assert config["trainable_token_indices"] == {"embed_tokens": [4, 3]}
        tensors = load_file(tmp_path / "run" / stage / "adapter_model.safetensors")
        rows[stage] = tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    base_rows = tiny.head_VD[[4, 3]]
    assert ((rows["sft"] - base_rows).abs().amax(1) > 1e-4).all()  # both rows have moved, in every stage
    assert ((rows["dpo"] - rows["sft"]).abs().amax(1) > 1e-4).all()
    assert main(["merge", str(tmp_path / "run" / "dpo"), "--out", str(tmp_path / "merged")]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    target = open_target(str(tmp_path / "run" / "dpo"))
    ours = our_logits(target.base, IDS, target.policies.activate("dpo"))
    assert torch.allclose(plain_logits(plain, IDS), ours, atol=1e-5)
    assert torch.equal(plain.get_input_embeddings().weight[[4, 3]], rows["dpo"])


def test_an_unknown_train_token_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, 'train_tokens = ["<end_of_turm>"]')
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "<end_of_turm>" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*/manifest.json"))


def test_a_run_begins_with_the_warning(tmp_path: Path, neglected: BaseModel, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, "rank = 2", model=str(neglected.source.folder))
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--until", "sft"]) == 0
    said = capsys.readouterr().err
    assert said.index("warning: the template's tokens <end_of_turn>") < said.index("\nsft: ")


def test_full_fine_tuning_trains_every_weight_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, 'kind = "full"')
    out = str(tmp_path / "run")
    assert main(["run", str(recipe), "--out", out, "--set", "sft.learning_rate=0.001", "--set", "dpo.learning_rate=0.001"]) == 0
    weights = {stage: load_file(tmp_path / "run" / stage / "model.safetensors") for stage in ("sft", "dpo")}
    original = load_file(load_base("random:tiny", template="gemma").source.folder / "model.safetensors")
    assert weights["sft"].keys() == original.keys()
    assert all(not torch.equal(weights["sft"][name], original[name]) for name in original)
    assert all(not torch.equal(weights["dpo"][name], weights["sft"][name]) for name in original)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "dpo", dtype=torch.float32)
    target = open_target(f"{out}/dpo")
    assert torch.allclose(plain_logits(plain, IDS), our_logits(target.base, IDS, target.policies.activate("dpo")), atol=1e-5)
    capsys.readouterr()
    assert main(["evaluate", f"{out}/sft", "--suite", "starter", "--limit", "1", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]
    assert main(["run", str(recipe), "--out", out, "--set", "sft.learning_rate=0.001", "--set", "dpo.learning_rate=0.001"]) == 0
    assert "nothing to do" in capsys.readouterr().out

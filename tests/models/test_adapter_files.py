"""Adapters on disk: a wrong base and a damaged file are refused by name."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.errors import AdapterError, PosttrainError
from posttrain.models.adapter_files import Policies, full_state, load_adapter, load_full, reload_base, save_adapter, save_full
from posttrain.models.base_model import BaseModel, load_base


@pytest.fixture
def saved(tiny: BaseModel, lively: Callable, tmp_path: Path) -> Path:
    """A whole adapter on disk."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, lively(tiny, "a", token_ids=(3, 4)), tiny)
    return folder


def wrong_base(tiny: BaseModel, folder: Path, number: int) -> BaseModel:
    """The same architecture with one weight of one tensor moved by its smallest step."""
    shutil.copytree(tiny.source.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors[sorted(tensors)[number]].flatten()
    tensor[number] = torch.nextafter(tensor[number], torch.tensor(10.0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_base(str(folder), template="gemma", dtype="float32", device="cpu")


def test_0_of_20_wrong_bases_are_accepted(tiny: BaseModel, saved: Path, tmp_path: Path) -> None:
    accepted = 0
    for number in range(20):
        base = wrong_base(tiny, tmp_path / f"base{number}", number)
        with pytest.raises(AdapterError, match="was trained on base"):
            load_adapter(saved, "a", base)
        with pytest.raises(AdapterError, match="was trained on base"):  # nor where a hash is not asked for
            load_adapter(saved, "a", base, require_hash=False)
        accepted += len(base.adapters.names())
    assert accepted == 0, f"{accepted} of 20 wrong bases accepted"


def test_full_weights_of_another_base_are_refused(tiny: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    save_full(tmp_path / "full", tiny)
    other = wrong_base(tiny, tmp_path / "base", 0)
    before = {name: p.clone() for name, p in full_state(other).items()}
    with pytest.raises(AdapterError, match="was trained on base"):
        load_full(tmp_path / "full" / "model.safetensors", other)
    assert all(torch.equal(before[name], p) for name, p in full_state(other).items())


def test_an_adapter_names_its_base_its_tokenizer_and_its_template(tiny: BaseModel, saved: Path) -> None:
    with safe_open(str(saved / "adapter_model.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    identity = tiny.identity()
    assert metadata["base_weights_hash"] == identity["weights_hash"] == tiny.source.weights_hash
    assert metadata["tokenizer_hash"] == identity["tokenizer_hash"]
    assert metadata["template_hash"] == identity["template_hash"]


def test_an_adapter_that_names_no_base_is_refused_unless_asked_for(tiny: BaseModel, saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(AdapterError, match="does not say which base"):
        load_adapter(saved, "b", tiny)
    assert load_adapter(saved, "b", tiny, require_hash=False).name == "b"


def test_0_of_40_truncated_files_are_accepted(tiny: BaseModel, saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for cut in range(40):
        weights.write_bytes(whole[: len(whole) * cut // 40])
        with pytest.raises(AdapterError, match="is damaged"):
            load_adapter(saved, "b", tiny)
    assert "b" not in tiny.adapters


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an adapter and keep its metadata."""
    weights = folder / "adapter_model.safetensors"
    with safe_open(str(weights), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata=metadata)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lora_B.weight is missing"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)}), r"has shape \(4, 63\)"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(8, 64)}), r"has shape \(8, 64\)"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}), "unknown tensor"),
        (lambda t: t.pop(ROWS), "embedding rows are missing"),
        (lambda t: t.update({ROWS: torch.zeros(3, 64)}), r"embedding rows have shape \(3, 64\)"),
    ],
)
def test_wrong_tensors_are_refused(tiny: BaseModel, saved: Path, change: Callable, words: str) -> None:
    edit(saved, change)
    with pytest.raises(AdapterError, match=words):
        load_adapter(saved, "b", tiny)
    assert "b" not in tiny.adapters


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"}, {"peft_type": None}, {"use_dora": True}, {"rank_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]}, {"alora_invocation_tokens": [1, 2]}, {"layers_to_transform": [0]},
        {"target_modules": "all-linear"}, {"target_modules": []}, {"target_modules": ["w_pack"]}, {"target_modules": None},
        {"r": "four"}, {"r": 0}, {"r": None}, {"lora_alpha": None}, {"lora_alpha": "x"},
        {"trainable_token_indices": {"embed_tokens": [999999, 3]}}, {"trainable_token_indices": [3, "4"]},
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3]}}, {"trainable_token_indices": {"wte": [3, 4]}},
        {"trainable_token_indices": None},
    ],
    ids=str,
)  # fmt: skip
def test_other_kinds_of_adapters_are_refused(tiny: BaseModel, saved: Path, change: dict[str, object]) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(PosttrainError, match=" · "):
        load_adapter(saved, "b", tiny)
    assert "b" not in tiny.adapters


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"LORA"', "[" * 100_000, "\xff\xfe"], ids=range(7))
def test_a_config_that_is_none_is_refused(tiny: BaseModel, saved: Path, text: str) -> None:
    (saved / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError):
        load_adapter(saved, "b", tiny)


def test_missing_files_are_refused(tiny: BaseModel, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path / "nowhere", "b", tiny)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        load_adapter(saved, "b", tiny)


class _Opened:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return (Path(self.path).write_text, ("ran",))


def test_a_pickle_is_never_opened(tiny: BaseModel, saved: Path, tmp_path: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(_Opened(tmp_path / "proof")))
    with pytest.raises(AdapterError, match="only a pickle file"):
        load_adapter(saved, "b", tiny)
    assert not (tmp_path / "proof").exists()


def test_full_weights_take_the_place_of_the_base_and_give_it_back(tmp_path: Path) -> None:
    base = load_base("random:tiny", template="gemma", dtype="float32", device="cpu", full=True)
    original = {name: p.clone() for name, p in full_state(base).items()}
    (tmp_path / "sft").mkdir()
    with torch.no_grad():
        for parameter in full_state(base).values():
            parameter.mul_(1.5)
    save_full(tmp_path / "sft", base)
    reload_base(base)
    assert all(torch.equal(p, original[name]) for name, p in full_state(base).items())
    policies = Policies(base, tmp_path)
    assert policies.activate("sft") == "base"
    assert all(torch.equal(p, original[name] * 1.5) for name, p in full_state(base).items())
    assert policies.activate("base") == "base"
    assert all(torch.equal(p, original[name]) for name, p in full_state(base).items())

"""The settings of PEFT: what changes the answer is followed or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from logits_of import our_logits, plain_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.errors import AdapterError
from posttrain.models.adapter_files import load_adapter, save_adapter
from posttrain.models.base_model import BaseModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

IDS = [1, 30, 99, 3, 77, 140, 12, 4, 200, 11]


def made_by_peft(base: BaseModel, folder: Path, **settings: object) -> torch.Tensor:
    """An adapter that PEFT made, moved a little and saved; returns what PEFT answers with it."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.float32)
    shape = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = peft.get_peft_model(plain, peft.LoraConfig(**(shape | settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    model.save_pretrained(folder)
    return plain_logits(model, IDS)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "PiSSA"])
def test_an_adapter_that_took_a_part_out_of_its_base_is_refused(tiny: BaseModel, tmp_path: Path, start: str) -> None:
    theirs = made_by_peft(tiny, tmp_path, init_lora_weights=start.lower())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match=rf'uses init_lora_weights = "{start}" · plain LoRA'):
        load_adapter(tmp_path, "a", tiny, require_hash=False)
    config["init_lora_weights"] = True  # as if the setting were ignored: the answers are others by far
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(tmp_path, "a", tiny, require_hash=False)
    assert (our_logits(tiny, IDS, "a") - theirs).abs().max() > 0.05


@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"use_rslora": True}, {"lora_dropout": 0.3}],
    ids=str,
)
def test_what_is_accepted_answers_as_in_peft(tiny: BaseModel, tmp_path: Path, settings: dict[str, object]) -> None:
    theirs = made_by_peft(tiny, tmp_path, **settings)
    load_adapter(tmp_path, "a", tiny, require_hash=False)
    assert torch.allclose(our_logits(tiny, IDS, "a"), theirs, atol=1e-4)
    assert (theirs - our_logits(tiny, IDS, "base")).abs().max() > 1e-2


@pytest.fixture
def saved(tiny: BaseModel, lively: Callable, tmp_path: Path) -> Path:
    """A whole adapter on disk."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder, lively(tiny, "a"), tiny)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "new"), ("init_lora_weights", [True]), ("use_dora", True), ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 1}), ("layers_to_transform", 0), ("layers_to_transform", [0, 1]), ("bias", "all"),
        ("bias", "lora_only"), ("lora_bias", True), ("fan_in_fan_out", True), ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]), ("alora_invocation_tokens", [1]), ("exclude_modules", ["q_proj"]),
        ("layer_replication", [[0, 1]]), ("use_qalora", True), ("use_rslora", "false"), ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}), ("arrow_config", {"top_k": 1}), ("megatron_config", {"x": 1}), ("a_setting_to_come", 0),
    ],
)  # fmt: skip
def test_every_setting_that_changes_the_answer_is_refused_by_name(
    tiny: BaseModel, saved: Path, name: str, value: object
) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(AdapterError, match=f"uses {name} = "):
        load_adapter(saved, "b", tiny)
    assert "b" not in tiny.adapters


def test_every_setting_of_peft_at_its_default_is_accepted(tiny: BaseModel, saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    defaults = {name: value for name, value in peft.LoraConfig().to_dict().items() if name not in config}
    assert len(defaults) > 20
    (saved / "adapter_config.json").write_text(json.dumps(config | defaults | {"a_setting_to_come": None}, default=str))
    load_adapter(saved, "b", tiny)
    assert torch.equal(our_logits(tiny, IDS, "b"), our_logits(tiny, IDS, "a"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.int64])
def test_numbers_that_are_no_weights_are_refused(tiny: BaseModel, saved: Path, dtype: torch.dtype) -> None:
    weights = saved / "adapter_model.safetensors"
    with safe_open(str(weights), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, weights, metadata=metadata)
    with pytest.raises(AdapterError, match=f"is of type {str(dtype).removeprefix('torch.')} · float32, bfloat16"):
        load_adapter(saved, "b", tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types_are_read(tiny: BaseModel, saved: Path, dtype: torch.dtype) -> None:
    weights = saved / "adapter_model.safetensors"
    with safe_open(str(weights), framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights, metadata=metadata)
    load_adapter(saved, "b", tiny)
    assert torch.allclose(our_logits(tiny, IDS, "b"), our_logits(tiny, IDS, "a"), atol=0.1)

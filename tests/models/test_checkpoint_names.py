"""Bases whose files hold something else than the parameters in memory: other names, fused experts, persistent buffers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from logits_of import our_logits, plain_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bases import SHAPE
from posttrain.cli import main
from posttrain.errors import ArtifactError, ModelError
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.adapter_files import Policies, full_state, reload_base, save_full, whole_state
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.export import export_target
from posttrain.models.merge import merge_target
from posttrain.models.source import locate_base
from posttrain.models.target import open_target

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = [1, 30, 99, 3, 77, 140, 12, 4, 200, 11]
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "glm4_moe": {
        "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
WITH_BIAS = ("minimax_m2", "glm4_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny base, made once: an architecture of EXPERTS, or `headless`, whose tensors lack "model."."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            _write(name, made[name])
        return made[name]

    return folder_of


def _write(name: str, folder: Path) -> None:
    tiny = locate_base("random:tiny").folder
    if name == "headless":  # what AutoModel writes
        transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).model.save_pretrained(folder)
        shutil.copy(tiny / "config.json", folder)
    else:
        config = transformers.AutoConfig.for_model(name, **(SHAPE | {"num_hidden_layers": 2} | EXPERTS[name]))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.12)
        for buffer_name, buffer in model.named_buffers():
            if "correction" in buffer_name:
                buffer.copy_(torch.tensor([5.0, -5.0, 3.0, -2.0]))
        model.save_pretrained(folder)
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)


def load(folder: Path, *, full: bool = False) -> BaseModel:
    return load_base(str(folder), template="gemma", dtype="float32", device="cpu", full=full)


def names_in(folder: Path) -> set[str]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return set(file.keys())


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", EXPERTS)
def test_a_merged_base_with_experts_has_all_its_tensors_and_answers_as_the_policy(
    folders: Callable[[str], Path], lively: Callable, run_of: Callable, tmp_path: Path, name: str
) -> None:
    base = load(folders(name))
    stage = run_of(tmp_path / "run", base, lively(base, "a", targets="attention"))
    merged = merge_target(open_target(str(stage)), tmp_path / "merged")
    assert names_in(merged) == names_in(folders(name))
    assert any("correction" in tensor for tensor in names_in(merged)) == (name in WITH_BIAS)
    unmerged = our_logits(base, IDS, "a")
    assert (unmerged - our_logits(base, IDS, "base")).abs().max() > 0.1
    assert torch.allclose(plain_logits(plain(merged), IDS), unmerged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*EXPERTS, "headless"])
def test_full_weights_of_such_a_base_come_and_go(folders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base = load(folders(name), full=True)
    original = {name: tensor.clone() for name, tensor in whole_state(base).items()}
    assert any("correction" in tensor for tensor in original) == (name in WITH_BIAS)
    with torch.no_grad():
        for parameter in full_state(base).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.02)
    (tmp_path / "sft").mkdir()
    save_full(tmp_path / "sft", base)
    trained, wanted = {n: t.clone() for n, t in whole_state(base).items()}, our_logits(base, IDS, "base")
    assert torch.allclose(plain_logits(plain(tmp_path / "sft"), IDS), wanted, rtol=0, atol=1e-4)
    if name != "headless":
        assert names_in(tmp_path / "sft") == names_in(folders(name))
    reload_base(base)
    assert all(torch.equal(tensor, original[n]) for n, tensor in whole_state(base).items())
    Policies(base, tmp_path).activate("sft")
    assert all(torch.equal(tensor, trained[n]) for n, tensor in whole_state(base).items())


def test_two_full_stages_from_the_base_run_to_their_end(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "Name a colour.", "completion": "Blue."}\n')
    (tmp_path / "t.jsonl").write_text('{"id": "a", "text": "One two three."}\n')
    (tmp_path / "s.toml").write_text('name = "s"\n[[task]]\nname = "p"\nanswer = "perplexity"\nitems = "t.jsonl"\n')
    stage = 'kind = "sft"\ndata = "{data}"\nbatch = 1\nvalidation = 0\nlearning_rate = 1e-5\n'
    stages = "".join(f'[[stage]]\nname = "{name}"\n{stage.format(data=tmp_path / "d.jsonl")}' for name in ("one", "two"))
    (tmp_path / "r.toml").write_text(
        f'name = "r"\n[base]\nmodel = "{folders("minimax_m2")}"\ntemplate = "gemma"\ndtype = "float32"\ndevice = "cpu"\n'
        f'[adapter]\nkind = "full"\n{stages}'
        f'[evaluation]\nsuites = ["{tmp_path / "s.toml"}"]\nsamples = ["Hi"]\nsample_tokens = 2\n'
    )
    assert main(["run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/one/model.safetensors").read_bytes() == (tmp_path / "run/two/model.safetensors").read_bytes()


def test_a_base_without_its_buffers_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("minimax_m2"), tmp_path / "base")
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "correction" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the weights lack .*e_score_correction_bias \(2 tensors\)"):
        load(folder)


def test_an_expert_that_all_tokens_share_has_its_adapter_in_generation(
    folders: Callable[[str], Path], lively: Callable
) -> None:
    base = load(folders("qwen2_moe"))
    adapters = [lively(base, name, seed=seed) for seed, name in enumerate("ab")]
    assert any("shared_expert.up_proj" in layer for layer in adapters[0].weights)
    prompts = [[1, 30, 99], [1, 5, 77, 80, 12]]
    for name in ("a", "b", "base"):
        for rollout, prompt in zip(generate(base, prompts, SamplingSettings(12), name), prompts, strict=True):
            ids = list(prompt)
            for token in rollout.completion_ids:
                logits = our_logits(base, ids, name)[-1]
                assert logits[token] >= logits.max() - 1e-4
                ids.append(token)


@pytest.mark.parametrize("to", ["merge", "hf"])
def test_a_merged_model_that_answers_otherwise_is_not_left_behind(
    tiny: BaseModel, lively: Callable, run_of: Callable, tmp_path: Path, to: str
) -> None:
    """The base in memory is moved after it was loaded, so that its file gives something else."""
    stage = run_of(tmp_path / "run", tiny, lively(tiny, "a"))
    target = open_target(str(stage))
    target.policies.activate("sft")
    with torch.no_grad():
        target.base.model.get_submodule("model.layers.0.self_attn.q_proj").base.weight.mul_(1.5)
    with pytest.raises(ArtifactError, match=r"the merged weights give a probe text other log-probabilities \([\d.e-]+ nats\)"):
        merge_target(target, tmp_path / "out") if to == "merge" else export_target(target, to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["glm4_moe", "qwen2_moe", "headless"])
def test_peft_reads_an_exported_adapter_as_we_do_or_it_is_refused(
    folders: Callable[[str], Path], lively: Callable, run_of: Callable, tmp_path: Path, name: str
) -> None:
    base = load(folders(name))
    stage = run_of(tmp_path / "all", base, lively(base, "a"))
    if name != "headless":
        with pytest.raises(ArtifactError, match="PEFT takes down_proj, gate_proj, up_proj for the experts"):
            export_target(open_target(str(stage)), "peft", tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        stage = run_of(tmp_path / "attention", base, lively(base, "a", targets="attention"))
    folder = export_target(open_target(str(stage)), "peft", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain(folders(name)), folder).eval()
    assert torch.allclose(plain_logits(theirs, IDS), our_logits(base, IDS, "a"), rtol=0, atol=1e-4)

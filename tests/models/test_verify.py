"""A base that does not compute here what it computes by itself is refused by name, before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bases import SHAPE, make_base
from posttrain.cli import main
from posttrain.errors import ModelError
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.source import locate_base
from posttrain.models.verify import DifferentError, Probe, compare, keep_proof, make_probe, own_logprobs, proof_path

HYBRID = {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
# An architecture, its changes to a tiny shape, and what the refusal says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "two attentions a layer": ("diffllama", {}, "more than once"),
    "linear attention": ("qwen3_5_text", HYBRID, "layers of type linear_attention"),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "state space": ("mamba", {}, "a convolution"),
    "no arguments handed on": ("stablelm", {}, "keyword arguments"),
    "positions of its own": (
        "bart",
        {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
        "differ",
    ),
    "attention of its own": ("bloom", {"n_layer": 2, "n_head": 4}, "not called through"),
    "attention that cannot be replaced": ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "replaced"),
}


def tiny_folder(kind: str, changes: dict[str, Any], folder: Path) -> Path:
    """A tiny model of an architecture with random weights, and the tokenizer of random:tiny."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **(SHAPE | {"num_hidden_layers": 2} | changes))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.12) if parameter.dim() > 1 else nn.init.normal_(parameter, mean=1, std=0.3)
    model.save_pretrained(folder)
    for path in locate_base("random:tiny").folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_would_be_wrong_is_refused_by_name(name: str, tmp_path: Path, own_cache: None) -> None:
    kind, changes, said = REFUSED[name]
    folder = tiny_folder(kind, changes, tmp_path)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(ModelError) as caught:
        load_base(str(folder), template="gemma", dtype="float32", device="cpu")
    assert architecture in caught.value.found
    assert said in caught.value.found
    assert caught.value.allowed
    assert caught.value.do


def test_a_run_on_a_refused_base_ends_with_code_2_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: None
) -> None:
    (tmp_path / "base").mkdir()
    tiny_folder("diffllama", {}, tmp_path / "base")
    (tmp_path / "recipe.toml").write_text(
        f'name = "r"\n[base]\nmodel = "{tmp_path / "base"}"\ntemplate = "gemma"\n[[stage]]\nkind = "sft"\nname = "sft"\n'
        'data = "starter/demonstrations.jsonl"\nepochs = 1\n'
    )
    assert main(["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    assert "DiffLlamaForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "run" / "sft").exists()


def own_of(base: BaseModel) -> tuple[Probe, list[torch.Tensor]]:
    """A probe for a base, and its log-probabilities by transformers alone."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        base.source.folder, dtype=base.dtype, attn_implementation="eager"
    )
    probe = make_probe(base.chat.encode_document, base.vocabulary, base.settings)
    return probe, own_logprobs(reference, probe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["cohere, scaled logits", "phi, bias of the head", "gpt_oss, sliding, sinks"])
def test_what_is_left_out_of_head_or_attention_is_seen(name: str, dtype: str, tmp_path: Path, own_cache: None) -> None:
    base = make_base(name, tmp_path, dtype)  # right as it is, or it would not load
    probe, own = own_of(base)
    compare(base, probe, own)
    with torch.no_grad():
        if name.startswith("cohere"):
            base.head_scale *= 1.5
        elif name.startswith("phi"):
            base.model.lm_head.bias += torch.linspace(-1, 1, base.vocabulary)
        else:
            for layer in base.model.model.layers:
                layer.self_attn.sinks.fill_(-100.0)
    with pytest.raises(DifferentError, match="packed batch"):
        compare(base, probe, own)


def test_a_wrong_cache_is_seen_while_decoding(tmp_path: Path, own_cache: None) -> None:
    base = make_base("mistral, sliding", tmp_path)
    probe, own = own_of(base)
    compare(base, probe, own)
    for layer in base.model.model.layers:  # all write where the first one reads
        layer.self_attn.layer_idx = 0
    with pytest.raises((DifferentError, NotImplementedError)):
        compare(base, probe, own)


@pytest.mark.parametrize("outlier", [False, True])
def test_one_token_that_a_tie_moved_does_not_count(outlier: bool, tiny: BaseModel) -> None:
    probe, own = own_of(tiny)
    moved = [row.clone() for row in own]
    moved[0][:4] += 3.0 if outlier else 0.0
    compare(tiny, probe, moved)
    moved[1] += torch.linspace(-0.5, 0.5, len(moved[1]))
    with pytest.raises(DifferentError):
        compare(tiny, probe, moved)


def test_a_base_is_compared_once_and_again_where_the_cache_forgot(tmp_path: Path, own_cache: None) -> None:
    """A proof by hand lets a wrong architecture pass, so with a proof nothing is compared."""
    folder = tiny_folder("lfm2", {"layer_types": ["conv", "full_attention"]}, tmp_path)
    proof = proof_path(locate_base(str(folder)).weights_hash, torch.float32, torch.device("cpu"), full=False)
    keep_proof(proof, "by hand", torch.float32)
    load_base(str(folder), template="gemma", dtype="float32", device="cpu")
    proof.unlink()
    with pytest.raises(ModelError, match="conv"):
        load_base(str(folder), template="gemma", dtype="float32", device="cpu")
    right = proof_path(locate_base("random:tiny").weights_hash, torch.float32, torch.device("cpu"), full=False)
    right.unlink(missing_ok=True)
    load_base("random:tiny", template="gemma", dtype="float32", device="cpu")
    assert json.loads(right.read_text())["architecture"] == "LlamaForCausalLM"


def test_other_weights_types_and_devices_need_a_proof_of_their_own() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    paths = {
        proof_path(weights, dtype, device, full=full)
        for weights in ("a", "b") for dtype in (torch.float32, torch.bfloat16)
        for device in (cpu, cuda) for full in (False, True)
    }  # fmt: skip
    assert len(paths) == 16


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep_proof(tmp_path / "file" / "verified" / "proof", "Any", torch.float32)


def test_a_probe_of_ids_stands_in_where_the_tokenizer_makes_too_little(tiny: BaseModel) -> None:
    texts = make_probe(tiny.chat.encode_document, tiny.vocabulary, tiny.settings)
    assert texts.first[: texts.shared] == texts.second[: texts.shared]
    assert texts.first != texts.second
    encoders: tuple[Callable[[str], list[int]], ...] = (lambda text: [5], lambda text: [10**6] * len(text))
    for encode in encoders:
        drawn = make_probe(encode, 50, tiny.settings)
        assert max(*drawn.other, *drawn.first, *drawn.second) < 50
        assert len(set(drawn.first)) > 20
    assert len(make_probe(tiny.chat.encode_document, tiny.vocabulary, tiny.settings | {"sliding_window": 8}).first) == 48

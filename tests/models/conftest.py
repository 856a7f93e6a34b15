"""What the model tests share: adapters that do something, and run folders made by hand."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from posttrain.artifacts import publish
from posttrain.models.adapter_files import save_adapter, save_full
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter, LoraSettings

RECIPE = """
name = "made"
[base]
model = "{model}"
template = "{template}"
dtype = "float32"
[adapter]
kind = "{kind}"
[[stage]]
kind = "sft"
name = "sft"
data = "starter/demonstrations.jsonl"
"""


@pytest.fixture
def tiny(tiny: BaseModel) -> Iterator[BaseModel]:
    """The shared tiny base; adapters of a test are forgotten after it."""
    yield tiny
    for name in tiny.adapters.names():
        tiny.adapters.remove(name)


@pytest.fixture(scope="session")
def lively() -> Callable[..., LoraAdapter]:
    """Makes an adapter whose B is not zero, so that it changes what the base says."""

    def make(base: BaseModel, name: str, *, seed: int = 0, token_ids: tuple[int, ...] = (), **settings: object) -> LoraAdapter:
        shape: dict[str, object] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all", "scaling": "standard"}
        adapter = base.adapters.create(name, LoraSettings(**(shape | settings)), seed=seed, token_ids=token_ids)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.copy_(torch.empty(b.shape).normal_(std=0.1, generator=generator))
            if adapter.tokens is not None:
                adapter.tokens.rows.copy_(torch.empty(adapter.tokens.rows.shape).normal_(std=0.3, generator=generator))
        return adapter

    return make


@pytest.fixture(scope="session")
def run_of() -> Callable[..., Path]:
    """Makes the run folder of one finished stage `sft` that holds an adapter, or the base's weights as full weights."""

    def make(folder: Path, base: BaseModel, adapter: LoraAdapter | None) -> Path:
        (folder / "partial").mkdir(parents=True)
        kind = "lora" if adapter else "full"
        text = RECIPE.format(model=base.source.model, template=base.chat.template_name, kind=kind)
        (folder / "recipe.toml").write_text(text, encoding="utf-8")
        if adapter is not None:
            save_adapter(folder / "partial", adapter, base)
        else:
            save_full(folder / "partial", base)
        publish(folder / "partial", folder / "sft", {"kind": kind, "fingerprint": "made"})
        return folder / "sft"

    return make

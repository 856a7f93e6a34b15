"""Scores of completions: the same however they are packed, and the same in PEFT."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from bases import CONFIGS, make_base
from posttrain.data.prepare import PairRow
from posttrain.data.rankings import RankedPrompt, rank_prompts
from posttrain.errors import AdapterError
from posttrain.models.adapter_files import load_adapter, save_adapter
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import pack_trees, row_scores
from posttrain.models.heads import new_head
from posttrain.models.lora import LoraAdapter


def prompts(count: int = 7) -> list[RankedPrompt]:
    """Prompts with two to four completions, one of a single token."""
    chance = random.Random(1)

    def ids(low: int, high: int) -> list[int]:
        return [chance.randrange(7, 260) for _ in range(chance.randint(low, high))]

    rows = []
    for i in range(count):
        prompt, answers = ids(2, 30), [ids(1, 1) if i == 3 else ids(1, 30) for _ in range(2 + i % 3)]
        rows += [PairRow(f"{i}-{k}", prompt, answers[k - 1], answers[k]) for k in range(1, len(answers))]
    return rank_prompts(rows)


def with_head(base: BaseModel, lively: Callable, shift: float = 0.0) -> LoraAdapter:
    adapter = lively(base, "rm")
    adapter.head = new_head(64, seed=3, device=base.device)._replace(shift=shift)
    return adapter


def scores_of(base: BaseModel, wanted: list[RankedPrompt]) -> torch.Tensor:
    with torch.no_grad():
        return row_scores(base, pack_trees((prompt.tree for prompt in wanted), base.device), "rm")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_score_depends_on_its_completion_alone(name: str, lively: Callable, tmp_path: Path, own_cache: None) -> None:
    """Packed with six other prompts below one prompt, or as a whole row of its own: the same score."""
    base = make_base(name, tmp_path)
    with_head(base, lively)
    found = scores_of(base, prompts())
    alone = []
    for prompt in prompts():
        for completion in prompt.completions:
            whole = prompt.prompt_ids + completion
            flat = RankedPrompt("", whole[:1], [whole[1:]], [])
            alone.append(scores_of(base, [flat]))
    assert torch.allclose(found, torch.cat(alone), atol=2e-5)
    assert found.std() > 1e-3, "they are not all the same number"


def test_pairs_of_a_prompt_share_their_completions() -> None:
    rows = [
        PairRow("a", [1, 2], [3], [4]), PairRow("b", [9], [3], [4]),
        PairRow("c", [1, 2], [4], [5]), PairRow("d", [1, 2], [3], [5]),
    ]  # fmt: skip
    first, second = rank_prompts(rows)
    assert first.completions == [[3], [4], [5]]
    assert [(p.id, p.chosen, p.rejected) for p in first.pairs] == [("a", 0, 1), ("c", 1, 2), ("d", 0, 2)]
    assert second.pairs[0].id == "b"
    assert first.tokens == 5, "the prompt and each completion once"


def test_a_reward_model_comes_back_from_disk(tiny: BaseModel, lively: Callable, tmp_path: Path) -> None:
    save_adapter(tmp_path, with_head(tiny, lively, shift=0.75), tiny)
    wanted = scores_of(tiny, prompts())
    tiny.adapters.remove("rm")
    loaded = load_adapter(tmp_path, "rm", tiny)
    assert loaded.head is not None
    assert loaded.head.shift == 0.75
    assert torch.equal(scores_of(tiny, prompts()), wanted)


@pytest.mark.parametrize("spoil", ["missing", "two labels", "shift"])
def test_a_damaged_head_is_refused(spoil: str, tiny: BaseModel, lively: Callable, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_adapter(tmp_path, with_head(tiny, lively), tiny)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    name = "base_model.model.score.weight"
    if spoil == "missing":
        del tensors[name]
    elif spoil == "two labels":
        tensors[name] = tensors[name].repeat(2, 1)
    else:
        metadata["score_shift"] = "much"
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(AdapterError, match="score"):
        load_adapter(tmp_path, "rm", tiny)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_gives_the_same_scores(tiny: BaseModel, lively: Callable, tmp_path: Path) -> None:
    """As a sequence classifier with one label; it knows no shift."""
    import peft

    save_adapter(tmp_path, with_head(tiny, lively, shift=0.5), tiny)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny.source.folder, num_labels=1, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(classifier, str(tmp_path)).eval()
    found = scores_of(tiny, prompts()).tolist()
    for prompt in prompts():
        for completion in prompt.completions:
            with torch.no_grad():
                score = theirs(input_ids=torch.tensor([prompt.prompt_ids + completion])).logits[0, 0].item()
            assert score - 0.5 == pytest.approx(found.pop(0), abs=2e-5)

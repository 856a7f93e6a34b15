"""Many policies behind one server: each answers as it does alone, they come and go while it runs, a run brings its own."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from adapter_folders import write_adapter
from listening import BASE, Listening, alone, chat, listening

from posttrain.artifacts import hash_file
from posttrain.cli import main
from posttrain.errors import ArtifactError, RecipeError
from posttrain.models.adapter_files import load_adapter
from posttrain.models.base_model import BaseModel, load_base, load_chat
from posttrain.models.source import locate_base
from posttrain.models.target import open_target
from posttrain.records import Message
from posttrain.serve.app import build_app
from posttrain.serve.limits import Limits
from posttrain.serve.run import LOOPBACK, open_service, read_scores
from tiny_runs import command, copied_run, finished_run

CHAT = "/v1/chat/completions"
NAMES = [f"style-{number}" for number in range(8)]
TEXTS = ["Hi", "What now?", "Count to three.", "x", "One two three four five six seven eight nine ten"]


def words(server: Listening, text: str, model: str, tokens: int = 8) -> str:
    response = server.post(CHAT, chat(text, model=model, tokens=tokens))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def folders(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("styles")
    return {name: write_adapter(root / name, tiny, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def expected(tiny: BaseModel, folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What each policy says to each text, alone."""
    answers = {(BASE, text): alone(tiny, text, 8) for text in TEXTS}
    for name, folder in folders.items():
        load_adapter(folder, f"alone {name}", tiny)
        answers |= {(name, text): alone(tiny, text, 8, f"alone {name}") for text in TEXTS}
        tiny.adapters.remove(f"alone {name}")
    assert len(set(answers.values())) > len(answers) / 2, "adapters that say the same would be no test"
    return answers


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_interleaved_requests_get_what_their_policy_says_alone(
    tiny: BaseModel, folders: dict[str, Path], expected: dict[tuple[str, str], str], count: int
):
    asked = [random.Random(number).choice(list(expected)) for number in range(count)]

    async def work(url: str) -> list[str]:
        places = asyncio.Semaphore(64)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:

            async def one(model: str, text: str) -> str:
                async with places:
                    response = await client.post(CHAT, json=chat(text, model=model))
                assert response.status_code == 200, response.text
                assert response.json()["model"] == model
                return str(response.json()["choices"][0]["message"]["content"])

            return await asyncio.gather(*(one(*pair) for pair in asked))

    with listening(tiny, adapters=folders) as server:
        found = asyncio.run(work(server.url))
    assert [pair for pair, text in zip(asked, found, strict=True) if expected[pair] != text] == []


def test_adapters_come_and_go_while_it_runs(tiny: BaseModel, folders: dict[str, Path], expected: dict[tuple[str, str], str]):
    one, two = folders["style-1"], folders["style-2"]
    with listening(tiny, folder=one.parent) as server:
        assert server.post(CHAT, chat("Hi", model="own")).status_code == 404
        loaded = server.post("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": one.name})
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'own' added successfully.")
        assert words(server, "Hi", "own") == expected["style-1", "Hi"]
        before = server.get("/v1/models/own").json()["fingerprint"]
        refused = server.post("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": two.name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter")
        assert words(server, "Hi", "own") == expected["style-1", "Hi"]
        swap = {"lora_name": "own", "lora_path": two.name, "load_inplace": True}
        assert server.post("/v1/load_lora_adapter", swap).status_code == 200
        assert words(server, "Hi", "own") == expected["style-2", "Hi"]
        assert server.get("/v1/models/own").json()["fingerprint"] != before
        assert 'model="own"' in server.get("/metrics").text
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "own"}).status_code == 200
        assert server.post(CHAT, chat("Hi", model="own")).status_code == 404
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "own"}).status_code == 404
        assert 'model="own"' not in server.get("/metrics").text


def test_what_an_adapter_still_answers_when_it_is_unloaded_is_counted_to_its_end(tiny: BaseModel, folders: dict[str, Path]):
    """Its series leave with its last answer, and none comes back."""
    endless = {"tokens": 400, "min_tokens": 400, "stream": True}
    with listening(tiny, adapters={"own": folders["style-1"]}) as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", CHAT, json=chat("Hi", model="own", **endless)) as response:
            pieces = response.iter_raw()
            next(pieces)
            assert server.post("/v1/unload_lora_adapter", {"lora_name": "own"}).status_code == 200
            text = server.get("/metrics").text
            assert 'posttrain_completions_open{model="own"} 1.0\n' in text
            assert b"[DONE]" in b"".join(pieces)
        server.settle()
        assert 'model="own"' not in server.get("/metrics").text


@pytest.mark.parametrize("path", ["../style-1", "/etc", "style-1/../../x", "nothing", "style-1\x00", "%2e%2e/style-1", "."])
def test_nothing_outside_of_the_folder_is_loaded(tiny: BaseModel, folders: dict[str, Path], path: str, tmp_path: Path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(folders["style-1"])
    with listening(tiny, folder=tmp_path / "inside") as server:
        for tried in (path, "link"):
            response = server.post("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": tried})
            assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter")
        assert len(server.get("/v1/models").json()["data"]) == 1


def test_without_a_folder_nothing_is_loaded(tiny: BaseModel, folders: dict[str, Path]):
    with listening(tiny) as server:
        response = server.post("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": str(folders["style-1"])})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter")


def test_what_the_cache_of_prompts_spares_can_be_watched(tiny: BaseModel):
    """The second time all full blocks of 64 tokens are found but the one that holds the last token."""
    told = []
    with listening(tiny) as server:
        for _ in range(2):
            answer = server.post("/v1/completions", {"model": BASE, "prompt": list(range(7, 207)), "max_tokens": 1, "n": 2})
            assert answer.status_code == 200
            told.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        text = server.get("/metrics").text
    assert told == [0, 192]  # a prompt of two completions counts once
    assert f'posttrain_cached_prompt_tokens_total{{model="{BASE}"}} 192.0\n' in text
    assert "posttrain_prefix_tokens_asked 800.0" in text  # by completion
    assert "posttrain_prefix_tokens_found 384.0" in text
    assert float(text.partition("\nposttrain_prefix_bytes ")[2].split()[0]) > 0


def test_invented_names_make_no_series_of_metrics(tiny: BaseModel):
    with listening(tiny) as server:
        for number in range(20):
            assert server.post(CHAT, chat("Hi", model=f"invented-{number}")).status_code == 404
        server.post(CHAT, chat("Hi", tokens=3, n=2))
        text = server.get("/metrics").text
    assert "invented" not in text
    assert 'posttrain_requests_total{model="unknown",status="404"} 20.0\n' in text
    assert f'posttrain_requests_total{{model="{BASE}",status="200"}} 1.0\n' in text
    assert f'posttrain_completion_tokens_total{{model="{BASE}"}} 6.0\n' in text
    prompt = len(tiny.chat.encode_prompt([Message("user", "Hi")]))
    assert f'posttrain_prompt_tokens_total{{model="{BASE}"}} {prompt}.0\n' in text
    assert f'posttrain_time_to_first_token_seconds_count{{model="{BASE}"}} 2.0\n' in text
    assert f'posttrain_time_per_output_token_seconds_count{{model="{BASE}"}} 2.0\n' in text


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_server() -> Iterator[Listening]:
    service = open_service(str(finished_run()), budget_bytes=2**30, limits=Limits())
    running = Listening(service, build_app(service, keys=None, hosts=LOOPBACK))
    yield running
    running.end()


def test_a_run_offers_its_finished_policies_with_their_scores(run_server: Listening):
    cards = {card["id"]: card for card in run_server.get("/v1/models").json()["data"]}
    assert list(cards) == [BASE, "dpo", "ppo", "sft"]  # the reward model writes nothing
    scorecard = json.loads((finished_run() / "scorecard.json").read_text())
    measured = {stage["name"]: {m: entry["value"] for m, entry in stage["measures"].items()} for stage in scorecard["stages"]}
    for name in ("sft", "dpo", "ppo"):
        assert (cards[name]["stage"], cards[name]["root"]) == (name, BASE)
        assert cards[name]["scores"] == measured[name] != {}


def test_a_served_stage_names_what_its_training_started_from(run_server: Listening):
    """As the scorecard does; what started from the base names it as it is served, and the base has no parent."""
    parents = {card["id"]: card["parent"] for card in run_server.get("/v1/models").json()["data"]}
    assert parents == {BASE: None, "sft": BASE, "dpo": "sft", "ppo": "sft"}


def test_a_runs_policies_answer_as_they_do_in_a_chat(run_server: Listening):
    target = open_target(str(finished_run()))
    for name in target.names:
        expected = alone(target.base, "Hi", 12, target.policies.activate(name))
        assert words(run_server, "Hi", BASE if name == "base" else name, 12) == expected


def test_a_run_that_was_not_evaluated_has_no_scores(tmp_path: Path):
    run = copied_run(tmp_path / "run")
    (run / "scorecard.json").unlink()
    assert read_scores(run) == {}


def test_a_policy_that_was_changed_is_not_served(tmp_path: Path):
    run = copied_run(tmp_path / "run")
    weights = run / "dpo" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="was changed after it was made"):
        open_service(str(run), budget_bytes=2**30, limits=Limits())


def test_a_policy_of_full_fine_tuning_takes_the_place_of_the_base(tmp_path: Path):
    run = tmp_path / "full"
    assert main(command(run, "--set", 'adapter.kind="full"', "--until", "sft")) == 0
    service = open_service(str(run), budget_bytes=2**30, limits=Limits())
    running = Listening(service, build_app(service, keys=None, hosts=LOOPBACK))
    (card,) = running.get("/v1/models").json()["data"]
    said = words(running, "Hi", "sft", 12)
    running.end()
    target = open_target(str(run / "sft"))
    assert said == alone(target.base, "Hi", 12, target.policies.activate("sft"))
    assert (card["id"], card["stage"], card["parent"]) == ("sft", "sft", target.base.source.model)
    assert card["fingerprint"] == hash_file(run / "sft/model.safetensors")  # and not that of the base in whose place it is
    with pytest.raises(RecipeError, match="has full weights instead of adapters · serve the base model to use adapters"):
        open_service(str(run), folder=tmp_path, budget_bytes=2**30, limits=Limits())


# --- tokens -----------------------------------------------------------------------------------------------------------


def conversation(seed: int) -> list[Message]:
    """Turns of anything: words, spaces, control tokens spelled out, other scripts."""
    made = random.Random(seed)
    pieces = [
        "word",
        " ",
        "\n",
        "<end_of_turn>",
        "<bos>",
        "<|im_end|>",
        "é",
        "日本",
        "🙂",
        "\x00",
        "  two",
        "Question: ",
        "{{ x }}",
    ]
    turns = [Message("system", "Be brief.")] if made.random() < 0.3 else []
    for turn in range(2 * made.randint(0, 3) + 1):
        text = "".join(made.choice(pieces) for _ in range(made.randint(1, 12)))
        turns.append(Message("assistant" if turn % 2 else "user", text))
    return turns


@pytest.mark.parametrize("template", ["gemma", "chatml", "plain"])
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_server_renders_as_training_does(template: str, count: int):
    """Ids of `/tokenize` are those that training gives, with at most one BOS: 0 differences."""
    trained = load_chat(locate_base("random:tiny"), template)
    with listening(load_base("random:tiny", template=template, dtype="float32")) as server:
        with httpx.Client(base_url=server.url) as client:
            for seed in range(count):
                turns = conversation(seed)
                messages = [{"role": turn.role, "content": turn.content} for turn in turns]
                prompt = client.post("/tokenize", json={"messages": messages}).json()
                whole = trained.encode([*turns, Message("assistant", "Yes.")])
                _, (answer,) = trained.encode_completions(turns, [Message("assistant", "Yes.")])
                assert prompt["tokens"] == whole.ids[: len(whole.ids) - len(answer)]
                assert prompt["count"] == len(prompt["tokens"])
                assert prompt["tokens"].count(trained.bos_id) == (prompt["tokens"][0] == trained.bos_id)
                ended = [*messages, {"role": "assistant", "content": "Yes."}]
                body = {"messages": ended, "add_generation_prompt": False, "model": BASE}
                assert client.post("/tokenize", json=body).json()["tokens"] == whole.ids
                text = {"prompt": turns[-1].content}
                ids = client.post("/tokenize", json=text).json()["tokens"]
                assert ids == trained.encode_text(turns[-1].content, control=True)
                assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == trained.decode(ids, special=True)

"""What lm-evaluation-harness 0.4.13 sends, and what it reads from the answers, against transformers on the same weights.

`local-completions` asks for one token more than it wants, echoes the prompt and drops the last entry of every list. The
harness itself is no dependency; docs/serving.md tells how it was run.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import pytest
import torch
from listening import BASE, Listening, listening
from transformers import AutoModelForCausalLM

from posttrain.generate.engine import generate
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.models.source import locate_base

CONTEXTS = ["Question: What is rain?\nAnswer:", "a", "One two three four five six seven"]
ANSWERS = [" Water.", "b", " eight nine ten", "\u00e9\U0001f642"]


@pytest.fixture(scope="module")
def server(tiny: BaseModel) -> Iterator[Listening]:
    with listening(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(locate_base("random:tiny").folder, dtype=torch.float32)


def asked(prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    """The body of a request for log-likelihoods."""
    return {
        "model": BASE, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, **more,
    }  # fmt: skip


def parsed(answer: dict[str, Any], lengths: list[int]) -> list[tuple[float, bool]]:
    """Log-likelihood after so many tokens of context, and whether each token was the likeliest, as the harness has them."""
    found = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), lengths, strict=True):
        told = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(told), all(one == max(top.values()) for one, top in zip(told, tops, strict=True))))
    return found


def expected(reference: torch.nn.Module, ids: list[int], length: int) -> tuple[float, bool]:
    with torch.no_grad():
        logprobs = reference(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(length, len(ids))
    greedy = all(int(logprobs[place - 1].argmax()) == ids[place] for place in places)
    return sum(float(logprobs[place - 1, ids[place]]) for place in places), greedy


@pytest.mark.parametrize("end", [None, "end_id", "eos_id"])
def test_log_likelihoods_are_those_of_transformers(
    tiny: BaseModel, server: Listening, reference: torch.nn.Module, end: str | None
):
    """Whatever the token is that nobody asked for: where it ends the answer it has its entry as well."""
    pairs = [(tiny.chat.encode_text(context), answer) for context in CONTEXTS for answer in ANSWERS]
    whole = [[*context, *tiny.chat.encode_text(answer)[1:]] for context, answer in pairs]
    (greedy,) = generate(tiny, [pairs[0][0]], SamplingSettings(4), "base")
    rows = [*whole, [*pairs[0][0], *greedy.completion_ids]]
    lengths = [*(len(context) for context, _ in pairs), len(pairs[0][0])]
    more = {} if end is None else {"logit_bias": {str(vars(tiny.chat)[end]): 100}}
    response = server.post("/v1/completions", asked(rows, **more))
    assert response.status_code == 200, response.text
    for choice, row in zip(response.json()["choices"], rows, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(row) + 1
        assert choice["finish_reason"] == ("length" if end is None else "stop")
    found = parsed(response.json(), lengths)
    for (number, greediest), row, length in zip(found, rows, lengths, strict=True):
        value, truth = expected(reference, row, length)
        assert number == pytest.approx(value, abs=1e-4)
        assert greediest == truth
    assert found[-1][1]


def test_answers_end_where_the_harness_says(tiny: BaseModel, server: Listening):
    """Generation on token ids, with stop strings of which the last is the name of a token."""
    prompts = [tiny.chat.encode_text(context) for context in CONTEXTS]
    alone = [one.text for one in generate(tiny, prompts, SamplingSettings(24), "base")]
    stop = alone[0][3:5]
    body = {
        "prompt": prompts, "model": BASE, "max_tokens": 24, "temperature": 0.0, "stop": [stop, "\n\n", "<end_of_turn>"],
        "seed": 1234,
    }  # fmt: skip
    answer = server.post("/v1/completions", body).json()
    texts = [choice["text"] for choice in sorted(answer["choices"], key=itemgetter("index"))]
    assert texts == [text.split(stop)[0].split("\n\n")[0] for text in alone]
    assert texts[0] == alone[0].split(stop)[0] != alone[0]


def test_prompts_of_a_power_of_two_and_one_more_are_scored_without_generation(server: Listening, reference: torch.nn.Module):
    """`max_tokens: 0` writes nothing, so the whole prompt is all that the cache must hold."""
    ids = [1, *(7 + 11 * i % 250 for i in range(1024))]
    prompts = [ids[:length] for length in (64, 65, 128, 129, 1024, 1025)]
    response = server.post("/v1/completions", asked(prompts, max_tokens=0))
    assert response.status_code == 200, response.text
    with torch.no_grad():
        logprobs_TV = reference(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = logprobs_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    for choice, prompt in zip(response.json()["choices"], prompts, strict=True):
        first, *found = choice["logprobs"]["token_logprobs"]
        assert first is None
        assert found == pytest.approx(wanted[: len(prompt) - 1], abs=1e-4)

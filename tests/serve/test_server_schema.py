"""The schema at /openapi.json against the server: requests made from it, right ones and wrong ones; no 5xx, no other shapes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from listening import BASE, Listening, listening
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from posttrain.models.base_model import BaseModel
from posttrain.serve.limits import Limits

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip
POSITIVE = GenerationMode.POSITIVE
OPERATIONS = [
    "GET /health", "GET /metrics", "GET /ready", "GET /v1/models", "GET /v1/models/{model}", "POST /detokenize",
    "POST /tokenize", "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    limits = Limits(default_tokens=3, max_tokens=8)
    with listening(tiny, limits=limits, folder=tmp_path_factory.mktemp("adapters")) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server: Listening) -> dict[str, Any]:
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    schema.config.update(base_url=server.url)
    return {operation.label: operation for operation in (found.ok() for found in schema.get_all_operations())}


def test_every_operation_is_tried(operations: dict[str, Any]):
    assert sorted(operations) == OPERATIONS


# A request without a body has nothing that could be wrong with it.
TRIED = [(label, mode) for label in OPERATIONS for mode in GenerationMode if mode is POSITIVE or label.startswith("POST")]


@pytest.mark.parametrize(("label", "mode"), TRIED)
@pytest.mark.parametrize("examples", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_requests_made_from_the_schema(operations: dict[str, Any], label: str, mode: GenerationMode, examples: int):
    operation = operations[label]
    answered = Counter[int]()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            # An invented name, or one number that is too large for this server, would end every request at once.
            small = {name: min(value, 3) for name, value in case.body.items() if type(value) is int}
            case.body.update(small, model=BASE)
        response = case.call()
        answered[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode is not POSITIVE:
        assert 200 not in answered
        assert sum(answered.values()) >= examples
    elif label != "GET /v1/models/{model}" and "adapter" not in label:
        assert answered[200] > 0
    print(label, mode.value, dict(answered))

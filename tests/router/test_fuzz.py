"""Whatever fits the OpenAPI document, or nearly does, gets an answer of the documented shape and no 5xx."""

import time
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.router.processes import fake_worker, router

EXAMPLES = 60


@pytest.fixture(scope="module")
def url():
    with fake_worker("--reply", "ok") as worker, router("--workers", worker) as (_, address):
        deadline = time.monotonic() + 20
        while httpx.get(f"{address}/ready").status_code != 200:
            assert time.monotonic() < deadline
        yield address


@pytest.fixture(scope="module")
def document(url):
    found = httpx.get(f"{url}/openapi.json").json()
    for name in (
        "ChatRequest",
        "CompletionRequest",
        "TokenizeRequest",
        "DetokenizeRequest",
    ):  # or nearly every example would end at an unknown model
        found["components"]["schemas"][name]["properties"]["model"]["enum"] = ["fake", "other"]
    # Likewise messages that say nothing, which only assistants with tool calls may send.
    message = found["components"]["schemas"]["Message"]
    message["properties"]["content"] = {"type": "string"}
    message["required"] = [*message["required"], "content"]
    return found


def whole(value):
    """JSON Schema takes 1.0 for an integer and the router does not: write it as 1."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_generation_answers_whatever_it_is_sent(document, url, path, mode):
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    statuses = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def check(case):
        if mode is schemathesis.GenerationMode.POSITIVE:
            case.body = whole(case.body)
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(
            response, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
        )

    check()
    assert statuses.keys() <= {200, 400, 404, 415}
    assert statuses[200 if mode is schemathesis.GenerationMode.POSITIVE else 400], statuses

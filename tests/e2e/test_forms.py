"""A real model through router and worker: whatever form is asked for, the answer has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion

from tests.e2e.parts import Stack, stack

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ANSWERS = 50


@pytest.fixture(scope="module")
def served() -> Iterator[Stack]:
    from tests.launch.started import DEMO_MODEL

    with stack(Path(DEMO_MODEL), 1, "--max-running", "25") as running:
        yield running


def random_schema(rng: Random, depth: int = 2) -> dict[str, Any]:
    """Small, so that a model that says nothing to the purpose still comes to the end."""
    kinds = ["integer", "number", "boolean", "string", "enum", "null"] + ["object", "array"] * (depth > 0)
    match rng.choice(kinds) if depth < 2 else "object":
        case "object":
            names = rng.sample(["name", "age", "größe", "a b", 'quo"te', "x"], rng.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": names[: rng.randint(1, len(names))],
                "additionalProperties": False,
            }
        case "array":
            return {"type": "array", "items": random_schema(rng, 0), "minItems": 1, "maxItems": 3}
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 12)}
        case "integer":
            least = rng.randint(-50, 50)
            return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 2000)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": 10}
        case "enum":
            return {"enum": rng.sample(["red", "green", 3, None, "ö"], 3)}
        case other:
            return {"type": other}


def test_fifty_schemas_are_followed_whatever_the_seed(served: Stack) -> None:
    rng = Random(1)
    schemas = [random_schema(rng) for _ in range(ANSWERS)]

    def ask(number: int) -> ChatCompletion:
        return served.client.chat.completions.create(
            model=served.model,
            messages=[{"role": "user", "content": f"Invent something, number {number}."}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schemas[number]}},
            temperature=1.0,
            seed=number,
            max_tokens=250,
        )

    with ThreadPoolExecutor(25) as threads:
        answers = list(threads.map(ask, range(ANSWERS)))
    ended = 0
    for schema, answer in zip(schemas, answers, strict=True):
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(choice.message.content or ""), schema)
    assert ended >= 0.9 * ANSWERS, "numbers may have digits without end"


def test_a_call_that_is_demanded_comes_and_streams(served: Stack) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    stream = served.client.chat.completions.create(
        model=served.model,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=120,
        stream=True,
    )
    name, arguments, reason = "", "", None
    for chunk in stream:
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, reason) == ("weather", "tool_calls")
    jsonschema.validate(json.loads(arguments), parameters)

import msgspec
import pytest

from services.router.api.decode import decode
from services.router.api.errors import ApiError
from services.router.api.requests import ChatRequest, CompletionRequest

CHAT = msgspec.json.Decoder(ChatRequest)
COMPLETION = msgspec.json.Decoder(CompletionRequest)
USER = {"role": "user", "content": "hi"}


def refusal(decoder, body):
    with pytest.raises(ApiError) as error:
        decode(body if isinstance(body, bytes) else msgspec.json.encode(body), decoder)
    assert error.value.status == 400
    return error.value.detail


@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({"temperature": 2.5}, "temperature", ["<= 2.0", "2.5"]),
        ({"temperature": "hot"}, "temperature", ["float", '"hot"']),
        ({"top_p": 0}, "top_p", ["> 0", "is 0"]),
        ({"top_k": -2}, "top_k", [">= -1", "-2"]),
        ({"top_k": 2**70}, "top_k", ["<= 2147483647"]),  # no integer of the token channel
        ({"min_p": 1.01}, "min_p", ["<= 1.0", "1.01"]),
        ({"presence_penalty": -3}, "presence_penalty", [">= -2", "-3"]),
        ({"frequency_penalty": 3}, "frequency_penalty", ["<= 2", "3"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["> 0"]),
        ({"max_tokens": 0}, "max_tokens", [">= 1", "is 0"]),
        ({"max_tokens": 1.5}, "max_tokens", ["int", "1.5"]),
        ({"max_completion_tokens": -1}, "max_completion_tokens", [">= 1"]),
        ({"min_tokens": -1}, "min_tokens", [">= 0"]),
        ({"n": 9}, "n", ["<= 8", "9"]),
        ({"seed": "1"}, "seed", ["int"]),
        ({"stream": 1}, "stream", ["bool", "1"]),
        ({"stop": [""]}, "stop[0]", [">= 1"]),
        ({"stop": ["a"] * 17}, "stop", ["16"]),
        ({"stop": "x" * 300}, "stop", ["256", "…"]),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", [">= 0", "-1"]),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", ["<= 100", "101"]),
        ({"top_logprobs": 21}, "top_logprobs", ["<= 20"]),
        ({"retention": [{"start": -1}]}, "retention[0].start", [">= 0", "-1"]),
        ({"retention": [{"start": 0, "priority": 101}]}, "retention[0].priority", ["<= 100", "101"]),
        ({"retention": [{"start": 0, "ttl_s": 0}]}, "retention[0].ttl_s", ["> 0"]),
        ({"retention": {"start": 0}}, "retention", ["array"]),
        ({"service_tier": "flex"}, "service_tier", ["auto, default", "flex"]),
        ({"tool_choice": "any"}, "tool_choice", ["auto, none, required", "any"]),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.type", ["function", "tool"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["json_object, json_schema", "xml"]),
        ({"guided_choice": []}, "guided_choice", [">= 1"]),
        ({"messages": []}, "messages", [">= 1"]),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", ["tool", "robot"]),
        ({"messages": [USER, {"role": "user", "content": 5}]}, "messages[1].content", ["str", "5"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            ["text", "image_url"],
        ),
        ({"messages": [{**USER, "cache_priority": 101}]}, "messages[0].cache_priority", ["<= 100"]),
        ({"tools": [{"type": "x", "function": {"name": "f"}}]}, "tools[0].type", ["function", "x"]),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_field_value_and_limit(fields, param, parts):
    detail = refusal(CHAT, {"model": "m", "messages": [USER], **fields})
    assert detail.param == param
    assert detail.message.startswith(param.replace("[...]", ""))
    for part in parts:
        assert part in detail.message


@pytest.mark.parametrize(
    "name",
    ["functions", "function_call", "audio", "prediction", "reasoning_effort", "web_search_options", "x"],
)
def test_unsupported_fields_are_refused_by_name(name):
    detail = refusal(CHAT, {"model": "m", "messages": [USER], name: {}})
    assert (detail.message, detail.param) == (f"{name} is not supported", name)
    assert detail.code == "unsupported_parameter"


def test_unsupported_fields_inside_messages_are_refused_by_name():
    detail = refusal(CHAT, {"model": "m", "messages": [{**USER, "cache_control": {}}]})
    assert detail.param == "messages[0].cache_control"


@pytest.mark.parametrize(
    ("body", "param"), [({"messages": [USER]}, "model"), ({"model": "m"}, "messages")]
)  # fmt: skip
def test_missing_fields_are_named(body, param):
    assert refusal(CHAT, body).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"), ({"logprobs": True}, "logprobs"),
     ({"prompt": {"a": 1}}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"),
     ({"messages": [USER]}, "messages")],
)  # fmt: skip
def test_completions_refuse_what_is_not_theirs(fields, param):
    assert refusal(COMPLETION, {"model": "m", "prompt": "x", **fields}).param == param


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"\xff\xfe", b'{"model":"m","messages":NaN}', b'{"model":"\\ud800"}',
     b'{"model":"m","messages":' + b"[" * 200_000, b"[]", b"null", b'"x"', b"1e999",
     b'{"model":"m","tools":[{"function":{"name":"f","parameters":{"a":1e999}}}]}'],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(body):
    assert refusal(CHAT, body).type == "invalid_request_error"


def test_null_means_absent():
    nulls = dict.fromkeys(ChatRequest.__struct_fields__)
    decode(msgspec.json.encode({**nulls, "model": "m", "messages": [USER]}), CHAT)

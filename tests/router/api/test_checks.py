import pytest

from services.router.api.checks import check_chat, check_completion
from services.router.api.errors import ApiError
from services.router.api.requests import (
    ChatRequest,
    CompletionRequest,
    FunctionDefinition,
    Message,
    NamedTool,
    StreamOptions,
    Tool,
    ToolName,
)


def chat(**fields):
    return ChatRequest(**{"model": "m", "messages": [Message("user", "hi")], **fields})


def function(**fields):
    return Tool("function", FunctionDefinition("f", **fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [function()], "tool_choice": NamedTool("function", ToolName("g"))},
            "tool_choice.function.name",
        ),
        ({"modalities": []}, "modalities"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"messages": [Message("user")]}, "messages[0].content"),
        ({"stream_options": StreamOptions(include_usage=True)}, "stream_options"),
        (
            {"stream": True, "stream_options": StreamOptions(include_obfuscation=True)},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as error:
        check_chat(chat(**fields))
    assert error.value.detail.param == param


def test_values_that_change_nothing_are_accepted():
    check_chat(
        chat(
            store=False,
            parallel_tool_calls=False,
            modalities=["text"],
            user="u",
            metadata={"a": "b"},
            service_tier="auto",
            safety_identifier="s",
            prompt_cache_key="k",
            stream=True,
            stream_options=StreamOptions(include_usage=True, include_obfuscation=False),
        )
    )


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"prompt": ["a", 1]}, "prompt", "either kind"),
        ({"prompt": ["a", [1]]}, "prompt", "either kind"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128 prompts, got 129"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, "echo", "logprobs"),
    ],
)
def test_prompts_are_of_one_kind_and_not_too_many(fields, param, word):
    with pytest.raises(ApiError, match=word) as error:
        check_completion(CompletionRequest(model="m", **fields))
    assert error.value.detail.param == param

import pytest

from services.router.api.checks import check_chat, check_completion, template_message, template_tools
from services.router.api.errors import ApiError
from services.router.api.requests import (
    ChatRequest,
    CompletionRequest,
    FunctionCall,
    FunctionDefinition,
    Message,
    StreamOptions,
    TextPart,
    Tool,
    ToolCall,
)
from services.router.text.template import ChatTemplate

PLAIN = ChatTemplate("{{ messages }}", {})


def chat(**fields):
    return ChatRequest(**{"model": "m", "messages": [Message("user", "hi")], **fields})


def function(**fields):
    return Tool("function", FunctionDefinition("f", **fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"modalities": []}, "modalities"),
        ({"tools": [function(strict=True)]}, "tools[0].function.strict"),
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
            parallel_tool_calls=True,
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
    ("fields", "word"),
    [({"prompt": ["a", "b"]}, "lists of prompts"), ({"prompt": [[1, 2]]}, "lists of prompts"),
     ({"prompt": "x", "echo": True}, "echo")],
)  # fmt: skip
def test_completions_take_one_prompt(fields, word):
    with pytest.raises(ApiError, match=word):
        check_completion(CompletionRequest(model="m", **fields))


def test_parts_join_and_tool_calls_carry_objects():
    call = ToolCall("c1", "function", FunctionCall("f", '{"x": 1}'))
    message = Message("assistant", [TextPart("text", "a"), TextPart("text", "b")], tool_calls=[call])
    assert template_message(message, PLAIN) == {
        "role": "assistant",
        "content": "a\nb",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }


def test_arguments_that_are_not_json_stay_text():
    call = ToolCall("c1", "function", FunctionCall("f", "{broken"))
    message = template_message(Message("assistant", tool_calls=[call]), PLAIN)
    assert message["tool_calls"][0]["function"]["arguments"] == "{broken"
    assert message["content"] == ""


@pytest.mark.parametrize(("source", "role"), [("{{ messages }}", "system"), ("developer", "developer")])
def test_developer_is_system_to_templates_that_do_not_know_it(source, role):
    assert template_message(Message("developer", "x"), ChatTemplate(source, {}))["role"] == role


def test_tools_go_to_the_template_unless_the_client_chose_none():
    template = ChatTemplate("{{ tools }}", {})
    asked = chat(tools=[function(description="d", parameters={"type": "object"})])
    assert template_tools(asked, template) == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    ]
    asked.tool_choice = "none"
    assert template_tools(asked, template) is None


def test_tools_that_the_template_would_ignore_are_refused():
    with pytest.raises(ApiError, match="no place for tools"):
        template_tools(chat(tools=[function()]), PLAIN)

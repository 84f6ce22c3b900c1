import json

import pytest

from services.router.api.conversation import conversation, template_message
from services.router.api.requests import (
    ChatRequest,
    FunctionCall,
    FunctionDefinition,
    Message,
    TextPart,
    Tool,
    ToolCall,
)
from services.router.text.template import ChatTemplate

PLAIN = ChatTemplate("{{ messages }}", {})
TAKES = ChatTemplate("{{ tools }}", {})
DEFINITION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = Tool("function", FunctionDefinition(**DEFINITION, strict=True))
CALL = ToolCall("c1", "function", FunctionCall("f", '{"x": 1}'))


def chat(*messages, **fields):
    return ChatRequest(model="m", messages=list(messages) or [Message("user", "hi")], **fields)


def test_parts_join_and_tool_calls_carry_objects():
    message = Message("assistant", [TextPart("text", "a"), TextPart("text", "b")], tool_calls=[CALL])
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
    seen = conversation(chat(tools=[TOOL]), TAKES)
    assert (seen.tools, seen.added) == ([{"type": "function", "function": DEFINITION}], 0)
    assert conversation(chat(tools=[TOOL], tool_choice="none"), TAKES).tools is None


def test_a_template_without_a_place_for_tools_gets_them_in_the_system_message():
    seen = conversation(chat(tools=[TOOL]), PLAIN)
    system, user = seen.messages
    assert (seen.tools, seen.added, user["content"], system["role"]) == (None, 1, "hi", "system")
    shown = json.dumps({"type": "function", "function": DEFINITION})
    assert f"<tools>\n{shown}\n</tools>" in system["content"]
    joined = conversation(chat(Message("system", "Be brief."), Message("user", "hi"), tools=[TOOL]), PLAIN)
    assert joined.added == 0
    assert joined.messages[0]["content"] == f"Be brief.\n\n{system['content']}"
    assert conversation(chat(tools=[TOOL], tool_choice="none"), PLAIN).messages == [user]


def test_there_calls_and_their_results_are_text():
    seen = conversation(
        chat(
            Message("user", "hi"),
            Message("assistant", "I look.", tool_calls=[CALL, CALL]),
            Message("tool", "42", tool_call_id="c1"),
        ),
        PLAIN,
    )
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert seen.messages[1:] == [
        {"role": "assistant", "content": f"I look.\n{call}\n{call}"},
        {"role": "user", "content": "<tool_response>\n42\n</tool_response>"},
    ]
    kept = conversation(chat(Message("tool", "42", tool_call_id="c1")), TAKES).messages
    assert kept == [{"role": "tool", "content": "42", "tool_call_id": "c1"}]

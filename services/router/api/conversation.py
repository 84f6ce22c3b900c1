"""A chat request to what the chat template sees: messages and tools.

A template without a place for tools gets them as Qwen's and Hermes' templates write them, in the system
message; calls and their results become text in the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from services.router.answer.hermes import BEGIN, END
from services.router.api.requests import ChatRequest, Message
from services.router.text.template import ChatTemplate

# Source: the chat template of Qwen2.5, which follows NousResearch/Hermes-Function-Calling.
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    f"{BEGIN}{END} XML tags:\n{BEGIN}\n"
    '{"name": <function-name>, "arguments": <args-json-object>}'
    f"\n{END}"
)


@dataclass(frozen=True)
class Conversation:
    """What the template is given. `added` messages come before those of the request."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    added: int


def conversation(request: ChatRequest, template: ChatTemplate | None) -> Conversation:
    """The request as its model's template takes it."""
    messages = [template_message(message, template) for message in request.messages]
    tools = _tools(request)
    if template is None or template.takes_tools:
        return Conversation(messages, tools, 0)
    messages = [_as_text(message) for message in messages]
    if not tools:
        return Conversation(messages, None, 0)
    described = _TOOLS_HEAD + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + _TOOLS_TAIL
    if messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{described}"}
        return Conversation(messages, None, 0)
    return Conversation([{"role": "system", "content": described}, *messages], None, 1)


def _tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """Tools as templates want them."""
    if not request.tools or request.tool_choice == "none":
        return None
    return [
        {
            "type": "function",
            "function": {
                key: value
                for key, value in msgspec.structs.asdict(tool.function).items()
                if value is not None and key != "strict"
            },
        }
        for tool in request.tools
    ]


def template_message(message: Message, template: ChatTemplate | None) -> dict[str, Any]:
    """One message as templates expect it: content is one string (parts joined by newlines), `developer` is
    `system` where the template does not know it, arguments of tool calls are objects where they parse."""
    developer = message.role == "developer" and not (template and template.knows_developer)
    result: dict[str, Any] = {
        "role": "system" if developer else message.role,
        "content": _text(message),
    }
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message without calls and results but as text."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    if calls := message.get("tool_calls"):
        written = [f"{BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{END}" for call in calls]
        text = "\n".join([message["content"]] * bool(message["content"]) + written)
        return {"role": message["role"], "content": text}
    return message


def _text(message: Message) -> str:
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _arguments(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text

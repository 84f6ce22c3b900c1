"""Chat requests to what the template sees, and the checks that types cannot express."""

from __future__ import annotations

from typing import Any

import msgspec

from services.router.api.errors import invalid
from services.router.api.requests import ChatRequest, CompletionRequest, Message, Sampling
from services.router.text.template import ChatTemplate

#: Variables that templates get from us.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


def check_chat(request: ChatRequest) -> None:
    """Raises ApiError (400) for what we do not implement or what contradicts itself."""
    _check_common(request)
    if request.store:
        raise _only("store", "false")
    if request.parallel_tool_calls is False:
        raise _only("parallel_tool_calls", "true")
    if request.modalities is not None and request.modalities != ["text"]:
        raise _only("modalities", '["text"]')
    for i, tool in enumerate(request.tools or ()):
        if tool.function.strict:
            raise _only(f"tools[{i}].function.strict", "false")
    for name in request.chat_template_kwargs or ():
        if name in RESERVED:
            raise invalid(f"chat_template_kwargs.{name} is set by the router", f"chat_template_kwargs.{name}")
    for i, message in enumerate(request.messages):
        if message.content is None and message.refusal is None and not message.tool_calls:
            name = f"messages[{i}].content"
            raise invalid(f"{name} is required", name, "missing_required_parameter")


def check_completion(request: CompletionRequest) -> None:
    """Raises ApiError (400) for what we do not implement or what contradicts itself."""
    _check_common(request)
    if request.echo:
        raise _only("echo", "false")
    if not isinstance(request.prompt, str) and any(not isinstance(item, int) for item in request.prompt):
        raise invalid(
            "prompt: lists of prompts are not supported; send a string or one list of token ids", "prompt"
        )


def template_tools(request: ChatRequest, template: ChatTemplate | None) -> list[dict[str, Any]] | None:
    """Tools as the template wants them. Raises ApiError (400) if it would ignore them."""
    if not request.tools or request.tool_choice == "none":
        return None
    if template is not None and not template.takes_tools:
        raise invalid("tools: the chat template of this model has no place for tools", "tools")
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


def _check_common(request: Sampling) -> None:
    if request.stream_options is not None:
        if not request.stream:
            raise invalid("stream_options needs stream to be true", "stream_options")
        if request.stream_options.include_obfuscation:
            raise _only("stream_options.include_obfuscation", "false")


def _only(field: str, value: str) -> Exception:
    return invalid(f"{field}: only {value} is supported", field, "unsupported_value")


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

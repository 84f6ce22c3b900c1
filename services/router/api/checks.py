"""The checks of requests that types cannot express."""

from __future__ import annotations

from services.router.api.errors import invalid
from services.router.api.requests import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    Sampling,
)

#: Variables that templates get from us.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


def check_chat(request: ChatRequest) -> None:
    """Raises ApiError (400) for what we do not implement or what contradicts itself."""
    _check_common(request)
    if request.store:
        raise _only("store", "false")
    if request.modalities is not None and request.modalities != ["text"]:
        raise _only("modalities", '["text"]')
    _check_tools(request)
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
    if request.echo and request.logprobs is not None:
        raise invalid("echo cannot be combined with logprobs: a prompt's own are not computed", "echo")
    if isinstance(request.prompt, str):
        return
    if len({type(item) for item in request.prompt}) > 1:
        raise invalid("prompt must be a text, token ids, or a list of either kind alone", "prompt")
    if not isinstance(request.prompt[0], int) and len(request.prompt) > MAX_PROMPTS:
        raise invalid(f"prompt: at most {MAX_PROMPTS} prompts, got {len(request.prompt)}", "prompt")


def _check_tools(request: ChatRequest) -> None:
    choice = request.tool_choice
    if choice in (None, "auto", "none"):
        return
    if not request.tools:
        raise invalid("tool_choice needs tools", "tool_choice")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        known = [tool.function.name for tool in request.tools]
        if name not in known:
            allowed = ", ".join(known)[:200]
            raise invalid(
                f"tool_choice.function.name must be one of the tools, {allowed}; got {name[:80]!r}",
                "tool_choice.function.name",
            )


def _check_common(request: Sampling) -> None:
    if request.stream_options is not None:
        if not request.stream:
            raise invalid("stream_options needs stream to be true", "stream_options")
        if request.stream_options.include_obfuscation:
            raise _only("stream_options.include_obfuscation", "false")


def _only(field: str, value: str) -> Exception:
    return invalid(f"{field}: only {value} is supported", field, "unsupported_value")

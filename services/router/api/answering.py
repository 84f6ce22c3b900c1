"""How the answers to one request are to be written, and how they are read: grammar, calls, thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.router.answer import AnswerParser, Family, family_of
from services.router.answer.families import CallStyle
from services.router.answer.form import (
    Body,
    FormError,
    Function,
    answer_grammar,
    calls_body,
    choice_body,
    free_calls_body,
    grammar_body,
    json_body,
    regex_body,
)
from services.router.answer.parser import Thinking, thinking_after
from services.router.api.errors import invalid
from services.router.api.requests import (
    ChatRequest,
    CompletionRequest,
    NamedTool,
    ResponseFormat,
    Sampling,
    StructuredOutputs,
)
from services.router.text import ModelText

_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Answering:
    """Of one request. Answers without thoughts or calls need no parser."""

    family: Family
    grammar: str = ""
    marks: Mapping[str, int] = field(default_factory=dict)  # special tokens that show in the text
    thinking: Thinking = "none"
    functions: frozenset[str] | None = None  # that may be called; None: no call is looked for
    most_calls: int | None = None

    @property
    def parsed(self) -> bool:
        return self.thinking != "none" or self.functions is not None

    def parser(self) -> AnswerParser:
        """One for one answer."""
        calls = self.family.call_parser(self.functions) if self.functions is not None else None
        return AnswerParser(self.thinking, calls, self.most_calls)


def answering(
    request: ChatRequest | CompletionRequest,
    text: ModelText,
    prompt_end: str,
    calls: CallStyle | None,
    thinks: bool | None,
) -> Answering:
    """`calls` and `thinks` hold instead of what the model's template tells. Raises ApiError (400) naming the
    field whose form cannot be followed."""
    family = family_of(text.template.source if text.template else "", calls, thinks)
    form = requested_form(request)
    if isinstance(request, CompletionRequest):
        return Answering(family, grammar=answer_grammar([form], "none", {}) if form else "")
    thinking = thinking_after(prompt_end) if family.thinks else "none"
    tools = request.tools if request.tool_choice != "none" else None
    marks = text.special(family.marks(bool(tools)))
    bodies = [form] if form else []
    if tools:
        bodies = _with_calls(request, family, marks, bodies)
    grammar = ""
    if bodies:
        with _named("response_format" if form else "tools"):
            grammar = answer_grammar(bodies, thinking, marks)
    return Answering(
        family,
        grammar,
        marks,
        thinking,
        frozenset(tool.function.name for tool in tools) if tools else None,
        1 if request.parallel_tool_calls is False else None,
    )


def requested_form(request: Sampling) -> Body | None:
    """The form that the answer must have, apart from calls; None if it is free. Raises ApiError (400)."""
    given = [
        (name, value)
        for name, value in (
            ("response_format", request.response_format),
            ("structured_outputs", request.structured_outputs),
            ("guided_json", request.guided_json),
            ("guided_regex", request.guided_regex),
            ("guided_choice", request.guided_choice),
            ("guided_grammar", request.guided_grammar),
        )
        if value is not None and not (isinstance(value, ResponseFormat) and value.type == "text")
    ]
    if not given:
        return None
    if len(given) > 1:
        raise invalid(f"{given[1][0]} cannot be combined with {given[0][0]}", given[1][0])
    name, value = given[0]
    if isinstance(value, ResponseFormat):
        return _response_format(value)
    if isinstance(value, StructuredOutputs):
        return _structured(value)
    return _form(name.removeprefix("guided_"), name, value)


def _response_format(format: ResponseFormat) -> Body:
    if format.type == "json_object":
        return json_body(_ANY_OBJECT, strict=False)
    wanted = format.json_schema
    if wanted is None:
        name = "response_format.json_schema"
        raise invalid(f"{name} is required", name, "missing_required_parameter")
    with _named("response_format.json_schema.schema"):
        schema = _ANY_OBJECT if wanted.schema is None else wanted.schema
        return json_body(schema, strict=bool(wanted.strict))


def _structured(outputs: StructuredOutputs) -> Body:
    asked = {
        name: value for name, value in msgspec.structs.asdict(outputs).items() if value not in (None, False)
    }
    if len(asked) != 1:
        raise invalid(
            "structured_outputs must have exactly one of json, regex, choice, grammar and json_object, "
            f"got {', '.join(asked) or 'none'}",
            "structured_outputs",
        )
    ((kind, value),) = asked.items()
    return _form(kind, f"structured_outputs.{kind}", value)


def _form(kind: str, field: str, value: Any) -> Body:
    with _named(field):
        match kind:
            case "json":
                return json_body(_schema(value), strict=False)
            case "regex":
                return regex_body(value)
            case "choice":
                return choice_body(value)
            case "grammar":
                return grammar_body(value)
            case _:
                return json_body(_ANY_OBJECT, strict=False)


def _schema(value: dict[str, Any] | str) -> dict[str, Any]:
    """Raises FormError."""
    if isinstance(value, dict):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise FormError(f"it is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise FormError("it must be a JSON object")
    return schema


def _with_calls(
    request: ChatRequest, family: Family, marks: Mapping[str, int], bodies: list[Body]
) -> list[Body]:
    """What an answer may be when there are tools; empty if anything. Raises ApiError (400)."""
    assert request.tools
    several = request.parallel_tool_calls is not False
    choice = request.tool_choice
    wanted = choice.function.name if isinstance(choice, NamedTool) else None
    forced = choice not in (None, "auto")
    if not forced and not bodies and not any(tool.function.strict for tool in request.tools):
        return []
    functions = []
    for i, tool in enumerate(request.tools):
        function = tool.function
        if wanted in (None, function.name):
            with _named(f"tools[{i}].function.parameters"):
                arguments = json_body(_ANY_OBJECT | (function.parameters or {}), strict=bool(function.strict))
            functions.append(Function(function.name, arguments))
    if forced:
        return [calls_body(functions, family.calls, marks, several=several and wanted is None)]
    if bodies:
        return [calls_body(functions, family.calls, marks, several=several), *bodies]
    return [free_calls_body(functions, family.calls, marks)]


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Errors of a form become the request's, naming the field."""
    try:
        yield
    except FormError as error:
        raise invalid(f"{field}: {error}", field, "invalid_value") from None

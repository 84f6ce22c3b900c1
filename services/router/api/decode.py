"""JSON bodies to request objects; every refusal names the field, the value and what is allowed."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from services.router.api.errors import ApiError, invalid

T = TypeVar("T")

#: msgspec says "Expected `int`, got `str` - at `$.messages[0].content`".
_WHERE = re.compile(r"(?s)(?P<what>.*?)(?: - at (?:`key` in )?`\$?(?P<path>.*)`)?")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")

LONGEST_VALUE_SHOWN = 80


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode and validate. Raises ApiError (400)."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None


def _explain(message: str, body: bytes, expected: type) -> ApiError:
    match = _WHERE.fullmatch(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    field = path.lstrip(".")
    if unknown := _UNKNOWN.fullmatch(what):
        name = f"{field}.{unknown[1]}" if field else unknown[1]
        return invalid(f"{name} is not supported", name, "unsupported_parameter")
    if missing := _MISSING.fullmatch(what):
        name = f"{field}.{missing[1]}" if field else missing[1]
        return invalid(f"{name} is required", name, "missing_required_parameter")
    if not field:
        return invalid(f"the body is not a valid request: {what}", code="invalid_value")
    steps = [int(index) if index else key for key, index in _STEP.findall(path)]
    if allowed := _allowed(expected, steps):
        what = f"must be one of {', '.join(allowed)}"
    value = _shorten(_find(body, steps))
    return invalid(f"{field}: {what[:1].lower()}{what[1:]}; the value is {value}", field, "invalid_value")


def _find(body: bytes, steps: list[str | int]) -> Any:
    """The value at the end of `steps`, or as near to it as they lead."""
    value: Any = None
    try:
        value = msgspec.json.decode(body)
        for step in steps:
            value = value[step]
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError):
        pass  # a path into a mapping's values, say: what was found is shown
    return value


def _allowed(expected: type, steps: list[str | int]) -> list[str]:
    """The values of the enumeration at the end of `steps`; empty if there is none."""
    info: msgspec.inspect.Type = msgspec.inspect.type_info(expected)
    for step in [*steps, None]:
        while isinstance(info, msgspec.inspect.Metadata):
            info = info.type
        options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
        for option in options:
            if step is None and isinstance(option, msgspec.inspect.LiteralType):
                return [str(value) for value in option.values]
            if isinstance(step, int) and isinstance(option, msgspec.inspect.ListType):
                info = option.item_type
            elif isinstance(option, msgspec.inspect.StructType):
                info = next((field.type for field in option.fields if field.encode_name == step), info)
    return []


def _shorten(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= LONGEST_VALUE_SHOWN else text[:LONGEST_VALUE_SHOWN] + "…"

"""A call of a function as models write it, {"name": "f", "arguments": {…}}, read character by character.

Arguments go out as they are written, from their first character on; nothing of them is changed.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Any

import msgspec

from services.router.answer.pieces import Arguments, Call, Piece

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class State(Enum):
    OPEN = "open"
    WHOLE = "whole"
    BROKEN = "broken"  # this is no such object


class JsonValue:
    """Finds the end of one JSON value. Checks no more than brackets and quotes."""

    def __init__(self) -> None:
        self.text = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def is_object(self) -> bool:
        return self.text[:1] == "{"

    def feed(self, char: str) -> bool:
        """Take `char` in, the first one not a space. False when it does not belong to the value any more: a
        number or word ends with what follows it."""
        if not self._depth and not self._in_string and self.text and char in _SPACE + ",]}":
            return False
        self.text += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "]}":
            self._depth -= 1
        return True

    @property
    def whole(self) -> bool:
        """It has ended with the last character. Numbers and words never have."""
        return not self._depth and not self._in_string and self.text[:1] in ("{", "[", '"')


class Expected(Enum):
    """What comes next in the object, but for white space."""

    OBJECT = "{"
    KEY_OR_END = "key or }"
    KEY = "key"
    COLON = ":"
    VALUE = "value"
    COMMA_OR_END = ", or }"


class CallObject:
    """Reads one call.

    `name` is set once it is certain that this is one: name and arguments have begun, or the object has ended.
    A call without arguments has {}.
    """

    def __init__(self, names: Collection[str] | None = None, needs_arguments: bool = False) -> None:
        """`names`: the only ones that a call may have, None = any. `needs_arguments`: else it is no call."""
        self.name: str | None = None
        self.state = State.OPEN
        self._names = names
        self._needs_arguments = needs_arguments
        self._expected = Expected.OBJECT
        self._value: JsonValue | None = None  # the key or value that has begun
        self._key = ""
        self._written_name: str | None = None
        self._arguments: str | None = None  # that were not taken yet; None = have not begun

    def feed(self, text: str) -> int:
        """Take text in until the object is whole or broken; returns how many characters belong to it."""
        for place, char in enumerate(text):
            self._step(char)
            if self.state is not State.OPEN:
                return place + (self.state is State.WHOLE)
        return len(text)

    def take_arguments(self) -> str:
        """What has come of the arguments since the last call, once there is a name."""
        if self.name is None or not self._arguments:
            return ""
        text, self._arguments = self._arguments, ""
        return text

    def _step(self, char: str) -> None:
        if self._value is not None:
            if self._value.feed(char):
                self._grow(char)
                return
            self._end_value(self._value)
        if char in _SPACE or self.state is not State.OPEN:
            return
        expected = self._expected
        if expected is Expected.OBJECT and char == "{":
            self._expected = Expected.KEY_OR_END
        elif expected in (Expected.KEY_OR_END, Expected.COMMA_OR_END) and char == "}":
            self._end()
        elif expected is Expected.COMMA_OR_END and char == ",":
            self._expected = Expected.KEY
        elif expected is Expected.COLON and char == ":":
            self._expected = Expected.VALUE
        elif (expected in (Expected.KEY_OR_END, Expected.KEY) and char == '"') or (
            expected is Expected.VALUE and char not in ",:]}"
        ):
            self._value = JsonValue()
            self._value.feed(char)
            self._grow(char)
        else:
            self.state = State.BROKEN

    def _grow(self, char: str) -> None:
        """The key or value has got `char`."""
        assert self._value is not None
        if self._is_arguments(self._value):
            if self._value.text == char and self._arguments is not None:
                self.state = State.BROKEN  # a second time
                return
            self._arguments = (self._arguments or "") + char
            self._decide()
        if self._value.whole and self.state is State.OPEN:
            self._end_value(self._value)

    def _is_arguments(self, value: JsonValue) -> bool:
        """Whether this goes out as it is written."""
        return self._expected is Expected.VALUE and self._key in _ARGUMENTS and value.is_object

    def _end_value(self, value: JsonValue) -> None:
        self._value = None
        if not self._is_arguments(value):
            try:
                decoded = msgspec.json.decode(value.text)
            except (msgspec.DecodeError, RecursionError):
                self.state = State.BROKEN
                return
            if self._expected is not Expected.VALUE:
                self._key = decoded
                self._expected = Expected.COLON
                return
            self._take(decoded, value.text)
        self._expected = Expected.COMMA_OR_END

    def _take(self, decoded: Any, text: str) -> None:
        """A value that had to be read to its end."""
        if self._key == "name":
            if not isinstance(decoded, str) or not decoded or self._written_name is not None:
                self.state = State.BROKEN
                return
            self._written_name = decoded
        elif self._key in _ARGUMENTS:
            if self._arguments is not None:
                self.state = State.BROKEN
                return
            if isinstance(decoded, str):  # a document in a string
                text = decoded
            self._arguments = text if decoded else "{}"
        self._decide()

    def _decide(self) -> None:
        if self._written_name is None or self.name is not None:
            return
        if self._names is not None and self._written_name not in self._names:
            self.state = State.BROKEN
        elif self._arguments is not None:
            self.name = self._written_name

    def _end(self) -> None:
        if self._arguments is None and not self._needs_arguments:
            self._arguments = "{}"
        self._decide()
        if self.state is State.OPEN:
            self.state = State.BROKEN if self.name is None else State.WHOLE


class OpenCall:
    """One call of an answer while it is read: its pieces, and its text as long as it may be content."""

    def __init__(
        self,
        index: int,
        written: str,
        names: Collection[str] | None = None,
        needs_arguments: bool = False,
    ) -> None:
        """`written` marks its beginning; the others as for `CallObject`."""
        self.begun = False  # it is certain that it is one
        self.written = written
        self._index = index
        self._object = CallObject(names, needs_arguments)

    @property
    def state(self) -> State:
        return self._object.state

    def feed(self, text: str, pieces: list[Piece]) -> str:
        """Take text in, add what is certain to `pieces`; returns what follows the call."""
        taken = self._object.feed(text)
        name = self._object.name
        if name is None:
            self.written += text[:taken]
            return text[taken:]
        if not self.begun:
            self.begun = True
            self.written = ""
            pieces.append(Call(self._index, name))
        if arguments := self._object.take_arguments():
            pieces.append(Arguments(self._index, arguments))
        return text[taken:]

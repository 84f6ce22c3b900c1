"""Calls as Mistral models write them, in two forms, beside content:

    [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]        until tokenizer v7
    [TOOL_CALLS]f[CALL_ID]…[ARGS]{…}[TOOL_CALLS]g{…}        v11 and later; what is in brackets may be missing

Source: https://github.com/mistralai/mistral-common, tokens/tokenizers/instruct.py.
"""

from __future__ import annotations

import re
from enum import Enum

from services.router.answer.json_call import JsonValue, OpenCall, State
from services.router.answer.pieces import Arguments, Call, Content, Marks, Piece

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

#: What stands between the mark and the arguments of a named call.
_NAMED = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?\s*")

#: OpenAI's names have 64 characters at most, call ids some 30.
_LONGEST_HEAD = 256


class _Place(Enum):
    OUTSIDE = "outside"
    HEAD = "head"  # after the mark, before it is known what follows
    LIST = "list"  # between the calls of a list
    CALL = "call"  # in a call of a list
    ARGUMENTS = "arguments"  # of a named call


class MistralParser:
    """A `CallParser`. What does not go on like a call after the mark is content, mark and all."""

    def __init__(self) -> None:
        self._place = _Place.OUTSIDE
        self._marks = Marks(BEGIN)
        self._written = ""  # from the mark on, while it is not certain that a call follows
        self._call: OpenCall | None = None
        self._arguments = JsonValue()
        self._calls = 0  # that have begun
        self._skips = False  # up to the next mark, after a call that broke off

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            match self._place:
                case _Place.OUTSIDE:
                    text = self._outside(text, pieces)
                case _Place.HEAD:
                    text = self._head(text, pieces)
                case _Place.LIST:
                    text = self._list(text, pieces)
                case _Place.CALL:
                    text = self._in_call(text, pieces)
                case _Place.ARGUMENTS:
                    text = self._in_arguments(text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        left = self._marks.finish() if self._place is _Place.OUTSIDE else self._written
        # White space after calls is none of the answer.
        return [Content(left)] if left and not self._skips and (left.strip() or not self._calls) else []

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        before, mark, rest = self._marks.feed(text)
        if before and not self._skips:
            pieces.append(Content(before))
        if mark:
            self._skips = False
            self._written = mark
            self._place = _Place.HEAD
        return rest

    def _head(self, text: str, pieces: list[Piece]) -> str:
        written = self._written + text
        begin = written.index(BEGIN) + len(BEGIN)
        head = written[begin:]
        if head.lstrip()[:1] == "[":
            at = written.index("[", begin) + 1
            self._written = written[:at]
            self._place = _Place.LIST
            return written[at:]
        at = head.find("{", 0, _LONGEST_HEAD)
        if at < 0 and len(head) < _LONGEST_HEAD:
            self._written = written
            return ""
        named = _NAMED.fullmatch(head, 0, at) if at >= 0 else None
        if named is None:
            at = begin + (_LONGEST_HEAD if at < 0 else at)
            self._content(written[:at], pieces)
            return written[at:]
        self._written = ""
        pieces.append(Call(self._calls, named[1]))
        self._calls += 1
        self._arguments = JsonValue()
        self._place = _Place.ARGUMENTS
        return head[at:]

    def _list(self, text: str, pieces: list[Piece]) -> str:
        rest = text.lstrip(", \t\r\n")
        if self._written:
            self._written += text[: len(text) - len(rest)]
        if not rest:
            return ""
        if rest[0] == "{":
            self._call = OpenCall(self._calls, self._written)
            self._place = _Place.CALL
            return rest
        if self._written:
            self._content(self._written, pieces)
            return rest
        self._place = _Place.OUTSIDE
        self._skips = rest[0] != "]"
        return rest[1:]

    def _in_call(self, text: str, pieces: list[Piece]) -> str:
        call = self._call
        assert call is not None
        begun = call.begun
        rest = call.feed(text, pieces)
        self._calls += call.begun and not begun
        if self._written:
            self._written = call.written if not call.begun else ""
        if call.state is State.WHOLE:
            self._place = _Place.LIST
        elif call.state is State.BROKEN and self._written:
            self._content(self._written, pieces)
        elif call.state is State.BROKEN:
            self._place = _Place.OUTSIDE
            self._skips = True
        return rest

    def _in_arguments(self, text: str, pieces: list[Piece]) -> str:
        value = self._arguments
        for place, char in enumerate(text, start=1):
            value.feed(char)
            if value.whole:
                pieces.append(Arguments(self._calls - 1, text[:place]))
                self._place = _Place.OUTSIDE
                return text[place:]
        pieces.append(Arguments(self._calls - 1, text))
        return ""

    def _content(self, text: str, pieces: list[Piece]) -> None:
        pieces.append(Content(text))
        self._written = ""
        self._place = _Place.OUTSIDE

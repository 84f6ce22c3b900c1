"""Calls as Hermes and Qwen models write them: <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any
number of them, beside content.

Source: https://github.com/NousResearch/Hermes-Function-Calling; the chat templates of Qwen2.5 and Qwen3.
"""

from __future__ import annotations

from services.router.answer.json_call import OpenCall, State
from services.router.answer.pieces import Content, Marks, Piece

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser:
    """A `CallParser`. What is not the object of a call between the marks is content, marks and all."""

    def __init__(self) -> None:
        self._marks = Marks(BEGIN, END)
        self._call: OpenCall | None = None
        self._calls = 0  # that have begun
        self._skips = False  # to the end of a call that broke off

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._call is None:
                text = self._outside(text, pieces)
            else:
                text = self._inside(self._call, text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        left = self._marks.finish() if self._call is None else self._call.written
        # White space after calls is none of the answer.
        return [Content(left)] if left and not self._skips and (left.strip() or not self._calls) else []

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        before, mark, rest = self._marks.feed(text)
        if mark.endswith(END) and not self._calls:
            before += mark
        if before and not self._skips:
            pieces.append(Content(before))
        if mark:
            self._skips = False
        if mark.endswith(BEGIN):
            self._call = OpenCall(self._calls, mark)
        return rest

    def _inside(self, call: OpenCall, text: str, pieces: list[Piece]) -> str:
        begun = call.begun
        rest = call.feed(text, pieces)
        self._calls += call.begun and not begun
        if call.state is not State.OPEN:
            self._call = None
            self._skips = call.state is State.BROKEN and call.begun
            if not call.begun:
                pieces.append(Content(call.written))
        return rest

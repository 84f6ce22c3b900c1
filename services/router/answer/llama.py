"""Calls as Llama 3 writes them: an answer that begins with {"name": "f", "parameters": {…}}, perhaps after
<|python_tag|>; several are separated by semicolons, commas or white space.

Nothing marks a call but its form, so it must name one of the request's functions.

Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/ (JSON based tool calling).
"""

from __future__ import annotations

from collections.abc import Collection

from services.router.answer.json_call import OpenCall, State
from services.router.answer.pieces import Content, Piece

PYTHON_TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"


class LlamaParser:
    """A `CallParser`. Once something is no call, all that follows is content."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._call: OpenCall | None = None
        self._between = ""  # what came before a call, or may turn out to be content
        self._calls = 0  # that are whole
        self._is_content = False
        self._skips = False  # what follows a call that broke off

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text and not self._skips:
            if self._is_content:
                pieces.append(Content(text))
                break
            if self._call is None:
                text = self._outside(text, pieces)
            else:
                text = self._inside(self._call, text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        left = self._between if self._call is None else self._call.written
        # What separates calls is none of the answer after the last one.
        return [Content(left)] if left and (not self._calls or left.strip(_BETWEEN)) else []

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        self._between += text
        start = self._between.lstrip(_BETWEEN if self._calls else None)
        if start.startswith(PYTHON_TAG):
            start = start[len(PYTHON_TAG) :].lstrip()
        if start.startswith("{"):
            written = self._between[: len(self._between) - len(start)]
            self._call = OpenCall(self._calls, written, self._names, needs_arguments=True)
            self._between = ""
            return start
        if not PYTHON_TAG.startswith(start):
            self._is_content = True
            pieces.append(Content(self._between))
            self._between = ""
        return ""

    def _inside(self, call: OpenCall, text: str, pieces: list[Piece]) -> str:
        rest = call.feed(text, pieces)
        if call.state is State.WHOLE:
            self._calls += 1
        elif call.state is State.BROKEN and call.begun:
            self._skips = True
        elif call.state is State.BROKEN:
            self._is_content = True
            pieces.append(Content(call.written))
        if call.state is not State.OPEN:
            self._call = None
        return rest

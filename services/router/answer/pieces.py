"""The pieces of an answer, in the order in which they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """More of what the assistant says."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what it thinks before."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function begins, the `index`-th of this answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments: together they are one JSON document, if the model wrote one."""

    index: int
    text: str


Piece = Content | Thought | Call | Arguments


class CallParser(Protocol):
    """Content and calls in the text of one answer, however it is cut: the same pieces but for where texts are
    cut."""

    def feed(self, text: str) -> list[Piece]:
        """More text; what is certain now."""

    def finish(self) -> list[Piece]:
        """What is left when no text follows."""


class PlainText:
    """A `CallParser` for answers without calls."""

    def feed(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class Marks:
    """Looks for marks in text that comes in pieces. Holds back what may be the beginning of one, with the
    white space before it: that belongs to the mark."""

    def __init__(self, *marks: str) -> None:
        self._marks = marks
        self._held = ""

    def feed(self, text: str) -> tuple[str, str, str]:
        """(text before the first mark as far as it is certain, the mark with the white space before it, what
        follows it); the latter two are empty while there is none."""
        text = self._held + text
        found = min(((at, mark) for mark in self._marks if (at := text.find(mark)) >= 0), default=None)
        if found is not None:
            at, mark = found
            self._held = ""
            before, end = text[:at].rstrip(), at + len(mark)
            return before, text[len(before) : end], text[end:]
        certain = len(text) - max(_beginning(text, mark) for mark in self._marks)
        certain = len(text[:certain].rstrip())
        self._held = text[certain:]
        return text[:certain], "", ""

    def finish(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of a kind joined."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + piece.text)
        elif isinstance(piece, Thought) and isinstance(last, Thought):
            result[-1] = Thought(last.text + piece.text)
        elif isinstance(piece, Arguments) and isinstance(last, Arguments) and piece.index == last.index:
            result[-1] = Arguments(piece.index, last.text + piece.text)
        else:
            result.append(piece)
    return result

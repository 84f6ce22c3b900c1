"""One answer's text to its pieces: thoughts first, then content and calls."""

from __future__ import annotations

from typing import Literal

from services.router.answer.pieces import (
    Arguments,
    Call,
    CallParser,
    Marks,
    Piece,
    PlainText,
    Thought,
    merged,
)

BEGIN_THOUGHT, END_THOUGHT = "<think>", "</think>"

#: Where thoughts stand when the answer begins: there are none; the prompt has begun them; the model may.
Thinking = Literal["none", "begun", "possible"]


def thinking_after(prompt_end: str) -> Thinking:
    """What a model that thinks does after a prompt with these last characters."""
    end = prompt_end.rstrip()
    if end.endswith(BEGIN_THOUGHT):
        return "begun"
    return "none" if end.endswith(END_THOUGHT) else "possible"


class AnswerParser:
    """Splits one answer, cut anywhere, into its pieces. White space around thoughts and calls is left out."""

    def __init__(
        self, thinking: Thinking = "none", calls: CallParser | None = None, most_calls: int | None = None
    ) -> None:
        """Calls beyond `most_calls` are left out."""
        self.calls = 0  # so far
        self._thinking = thinking
        self._trims = thinking == "begun"  # white space comes before anything
        self._thoughts = Marks(END_THOUGHT)
        self._begin = ""  # of the answer, while it is not certain whether it is a thought's
        self._calls = calls or PlainText()
        self._most_calls = most_calls

    def feed(self, text: str) -> list[Piece]:
        """More text; the pieces that are certain now."""
        pieces: list[Piece] = []
        if self._thinking == "possible":
            text = self._decide(text)
        if self._thinking == "begun":
            text = self._think(text, pieces)
        if self._trims and self._thinking == "none":
            text = text.lstrip()
            self._trims = not text
        return self._counted(pieces + self._calls.feed(text)) if text else pieces

    def finish(self) -> list[Piece]:
        """What is left when no text follows."""
        if self._thinking == "begun":
            left = self._thoughts.finish().rstrip()
            left = left.lstrip() if self._trims else left
            return [Thought(left)] if left else []
        return self._counted(self._calls.feed(self._begin) + self._calls.finish())

    def _decide(self, text: str) -> str:
        """Does the answer begin with a thought? Returns what that leaves to read."""
        self._begin += text
        start = self._begin.lstrip()
        if BEGIN_THOUGHT.startswith(start) and start != BEGIN_THOUGHT:
            return ""
        begins = start.startswith(BEGIN_THOUGHT)
        self._thinking = "begun" if begins else "none"
        self._trims = begins
        text = start[len(BEGIN_THOUGHT) :] if begins else self._begin
        self._begin = ""
        return text

    def _think(self, text: str, pieces: list[Piece]) -> str:
        thought, mark, rest = self._thoughts.feed(text)
        if self._trims:
            thought = thought.lstrip()
        if thought:
            self._trims = False
            pieces.append(Thought(thought))
        if mark:
            self._thinking = "none"
            self._trims = True
        return rest

    def _counted(self, pieces: list[Piece]) -> list[Piece]:
        wanted: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Call | Arguments) and not self._is_wanted(piece.index):
                continue
            self.calls += isinstance(piece, Call)
            wanted.append(piece)
        return merged(wanted)

    def _is_wanted(self, call: int) -> bool:
        return self._most_calls is None or call < self._most_calls

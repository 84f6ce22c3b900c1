"""The pieces of a chat's answer as the OpenAI API writes them: deltas of a stream, or one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from msgspec import UNSET

from services.router.answer.families import CallStyle
from services.router.answer.pieces import Arguments, Call, Content, Piece, Thought
from services.router.api.responses import AssistantMessage, CalledFunction, MadeToolCall


def delta(piece: Piece, style: CallStyle) -> dict[str, Any]:
    """`delta` of a chunk: a call begins with its id and name, its arguments follow in pieces."""
    match piece:
        case Content(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case Call(index, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id(style), "type": "function", "function": function}
            return {"tool_calls": [call]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def message(pieces: Sequence[Piece], style: CallStyle) -> AssistantMessage:
    """All of an answer."""
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    calls = [
        MadeToolCall(call_id(style), "function", CalledFunction(piece.name, ""))
        for piece in pieces
        if isinstance(piece, Call)
    ]
    for piece in pieces:
        if isinstance(piece, Arguments):
            calls[piece.index].function.arguments += piece.text
    return AssistantMessage(
        "assistant",
        content if content or not calls else None,
        reasoning_content=thoughts or UNSET,
        tool_calls=calls or UNSET,
    )


def call_id(style: CallStyle) -> str:
    """A new one. Mistral's chat templates refuse all but nine letters and digits."""
    return uuid4().hex[:9] if style == "mistral" else f"call_{uuid4().hex[:24]}"

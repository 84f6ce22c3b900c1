"""Answers on the wire: whole JSON documents, or server-sent events put together from ready-made bytes.

A chunk's only variable parts are its text and, rarely, its log-probabilities, so everything around them is
encoded once a request. Answers that may hold thoughts or calls go through a parser each, and what it makes of
a text are the deltas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from uuid import uuid4

import msgspec

from services.router.answer import AnswerParser
from services.router.answer.pieces import Piece
from services.router.api.answering import Answering
from services.router.api.messages import delta, message
from services.router.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    FinishReason,
    TextChoice,
    TextCompletion,
    Usage,
)
from services.router.text.choice import TokenLogprob
from services.router.text.logprobs import chat_logprobs, completion_logprobs
from services.router.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode

Kind = Literal["chat", "completion"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished choice; `logprobs` is None when they were not asked for."""

    text: str
    logprobs: Sequence[TokenLogprob] | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class _Style:
    """What differs between the two kinds of completion."""

    id_prefix: str
    chunk: str  # `object` of a chunk
    begin: bytes  # a choice's first event, empty for none
    before_text: bytes
    after_text: bytes
    end: bytes  # a choice's last event
    logprobs: Callable[[Sequence[TokenLogprob], Tokenizer], dict[str, Any]]


_STYLES: dict[Kind, _Style] = {
    "chat": _Style(
        "chatcmpl-",
        "chat.completion.chunk",
        begin=b'"delta":{"role":"assistant","content":""}',
        before_text=b'"delta":{"content":',
        after_text=b"}",
        end=b'"delta":{}',
        logprobs=chat_logprobs,
    ),
    "completion": _Style(
        "cmpl-",
        "text_completion",
        begin=b"",
        before_text=b'"text":',
        after_text=b"",
        end=b'"text":""',
        logprobs=completion_logprobs,
    ),
}


class Writer(Protocol):
    """How the answers to one request are written, as `Format` does it."""

    def begin(self, index: int) -> bytes: ...

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes: ...

    def finish(self, index: int, reason: FinishReason) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes: ...


class Format:
    """How one request's answers are written."""

    def __init__(
        self,
        kind: Kind,
        model: str,
        fingerprint: bytes,
        choices: int,
        usage_follows: bool,
        tokenizer: Tokenizer,
        answering: Answering,
        echo: Sequence[str] = (),
    ) -> None:
        """`echo`: texts that come before those of the choices, one for each."""
        self._echo = echo
        self._call_style = answering.family.calls
        self._parsers = [answering.parser() for _ in range(choices)] if answering.parsed else None
        self._kind = kind
        self._style = _STYLES[kind]
        self._tokenizer = tokenizer
        self._id = self._style.id_prefix + uuid4().hex
        self._created = int(time.time())
        self._model = model
        self._fingerprint = f"fp_{fingerprint.hex()[:12]}"
        head = {
            "id": self._id,
            "object": self._style.chunk,
            "created": self._created,
            "model": model,
            "system_fingerprint": self._fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        # OpenAI: with include_usage every chunk has the field, and only the last one a value.
        self._tail = b'}],"usage":null}\n\n' if usage_follows else b"}]}\n\n"
        self._before = [
            self._head + b'{"index":%d,' % index + self._style.before_text for index in range(choices)
        ]
        self._after = self._style.after_text + b',"logprobs":null,"finish_reason":null' + self._tail

    # ---- events ----------------------------------------------------------------------------------

    def begin(self, index: int) -> bytes:
        """Comes before the first text of a choice."""
        if self._echo:
            return self.delta(index, self._echo[index], None)
        return self._event(index, self._style.begin) if self._style.begin else b""

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        """Carries more text; empty where a parser waits for more."""
        if self._parsers is not None:
            return self._pieces(index, self._parsers[index].feed(text), logprobs)
        if logprobs is None:
            return self._before[index] + _encode(text) + self._after
        content = self._style.before_text + _encode(text) + self._style.after_text
        return self._event(index, content, _encode(self._style.logprobs(logprobs, self._tokenizer)))

    def finish(self, index: int, reason: FinishReason) -> bytes:
        """Ends a choice."""
        events = b""
        if self._parsers is not None:
            parser = self._parsers[index]
            events = self._pieces(index, parser.finish(), None)
            reason = _reason(parser, reason)
        return events + self._event(index, self._style.end, reason=b'"%b"' % reason.encode())

    def usage(self, usage: Usage) -> bytes:
        """Comes after the last choice for those who asked."""
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def _pieces(self, index: int, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob] | None) -> bytes:
        """An event for each piece; log-probabilities go with the first one, or alone."""
        deltas = [delta(piece, self._call_style) for piece in pieces]
        if logprobs and not deltas:
            deltas.append({})
        explained = [_encode(self._style.logprobs(logprobs, self._tokenizer))] if logprobs else []
        explained += [b"null"] * (len(deltas) - len(explained))
        return b"".join(
            self._event(index, b'"delta":' + _encode(content), values)
            for content, values in zip(deltas, explained, strict=True)
        )

    def _event(self, index: int, content: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        choice = b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b' % (index, content, logprobs, reason)
        return self._head + choice + self._tail

    # ---- whole answers ---------------------------------------------------------------------------

    def whole(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        """The document for those who do not stream."""
        same: dict[str, Any] = {
            "id": self._id,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "usage": usage,
        }
        if self._kind == "chat":
            chat = [self._choice(i, answer) for i, answer in enumerate(answers)]
            return _encode(ChatCompletion(object="chat.completion", choices=chat, **same))
        echo = self._echo or [""] * len(answers)
        text = [
            TextChoice(i, echo[i] + a.text, self._logprobs(a), a.finish_reason) for i, a in enumerate(answers)
        ]
        return _encode(TextCompletion(object="text_completion", choices=text, **same))

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        text, reason = AssistantMessage("assistant", answer.text), answer.finish_reason
        if self._parsers is not None:
            parser = self._parsers[index]
            text = message(parser.feed(answer.text) + parser.finish(), self._call_style)
            reason = _reason(parser, reason)
        return ChatChoice(index, text, self._logprobs(answer), reason)

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if answer.logprobs is None:
            return None
        return self._style.logprobs(answer.logprobs, self._tokenizer)


def _reason(parser: AnswerParser, reason: FinishReason) -> FinishReason:
    return "tool_calls" if parser.calls and reason == "stop" else reason

"""Reading a streamed answer: server-sent events (WHATWG HTML, 9.2) that hold OpenAI completion chunks."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from .http import BadAnswer

#: A line longer than this is not an event of any server we know.
MAX_LINE_BYTES = 8 << 20
MAX_ERROR_BYTES = 64 << 10


class EventSplitter:
    """Cuts a byte stream into the data of its events, whatever the boundaries of what was read."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes. Raises BadAnswer on a line over the limit."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            raise BadAnswer(f"an event's line is longer than {MAX_LINE_BYTES} bytes")
        events = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        return events


class CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: CachedTokens | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that came from a cache; None where the server does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class Logprobs(msgspec.Struct):
    """One entry a token: `tokens` in completions, `content` in chat."""

    tokens: list[Any] | None = None
    content: list[Any] | None = None


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class ErrorBody(msgspec.Struct):
    error: Any = None
    detail: Any = None
    message: str | None = None


_chunk_decoder = msgspec.json.Decoder(Chunk)


class AnswerStream:
    """A Receiver (see `http.py`) that times the tokens of one streamed answer.

    A chunk bears tokens if it has text. The role that opens a chat does not count, nor does the finish reason
    alone: a server that sends either early must not look fast. `times_s` has the time of every such chunk.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.times_s = array("d")
        self.text: list[str] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.complete = False  # [DONE] was seen
        self.counted_tokens = 0  # entries of logprobs
        self._finished_at_s = 0.0
        self._events = EventSplitter()
        self._refusal = bytearray()

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers

    def data(self, chunk: bytes, at_s: float) -> None:
        if self.status != 200:
            self._refusal += chunk[: MAX_ERROR_BYTES - len(self._refusal)]
            return
        for event in self._events.feed(chunk):
            if event == b"[DONE]":
                self.complete = True
            else:
                self._chunk(event, at_s)

    def refusal(self) -> str:
        """What a status other than 200 said, in one line."""
        try:
            body = msgspec.json.decode(self._refusal, type=ErrorBody)
        except msgspec.DecodeError:
            return one_line(self._refusal.decode("utf-8", "replace"))
        return _message(body.error or body.detail or body.message or "")

    def first_s(self) -> float | None:
        """When the first token came; with the finish where the text stayed empty."""
        if self.times_s:
            return self.times_s[0]
        return self._finished_at_s if self.usage and self.usage.completion_tokens else None

    def last_s(self) -> float | None:
        """When the last token came: with the finish, which may bring what was held back."""
        first_s = self.first_s()
        return (
            None if first_s is None else max(self.times_s[-1] if self.times_s else 0.0, self._finished_at_s)
        )

    def _chunk(self, event: bytes, at_s: float) -> None:
        try:
            chunk = _chunk_decoder.decode(event)
        except msgspec.DecodeError as error:
            raise BadAnswer(f"malformed chunk: {error}") from None
        if chunk.error is not None:
            self.error = _message(chunk.error)
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            bears_tokens = False
            if choice.text is not None:
                # An empty text before the end is a token that has no visible character yet.
                bears_tokens = bool(choice.text) or choice.finish_reason is None
                self.text.append(choice.text)
            elif choice.delta is not None:
                delta = choice.delta
                bears_tokens = bool(delta.content or delta.reasoning_content or delta.tool_calls)
                if delta.content:
                    self.text.append(delta.content)
            if choice.logprobs is not None:
                self.counted_tokens += len(choice.logprobs.tokens or choice.logprobs.content or ())
            if bears_tokens:
                self.times_s.append(at_s)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
                self._finished_at_s = at_s


def one_line(text: str, limit: int = 200) -> str:
    """`text` without line breaks, cut at `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _message(error: Any) -> str:
    if isinstance(error, dict) and error.get("message"):
        error = error["message"]
    return one_line(error if isinstance(error, str) else msgspec.json.encode(error).decode())

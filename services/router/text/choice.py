"""One generated sequence: a worker's tokens in, text that may go to the client out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.router.text.detokenize import Detokenizer
from services.router.text.stops import StopStrings
from services.wire.messages import Logprob, StepItem

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, where its text begins in the choice's text, and its log-probabilities."""

    token: int
    text_offset: int
    logprob: Logprob


@dataclass(slots=True)
class _Held:
    token: TokenLogprob
    end: int


class Choice:
    """Text, log-probabilities, finish reason and token count of one of a request's `n` answers."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops else None
        self._decoded = 0  # characters made so far
        self._emitted = 0  # characters handed out so far
        self._logprobs: deque[_Held] = deque()

    def feed(self, item: StepItem) -> str:
        """Take in one step's tokens, and the finish if it has come; returns the text that is certain now.

        A stop string ends the choice: `finish_reason` is set, tokens after it are neither shown nor counted,
        and nothing may be fed any more. Not for items that finish with an error.
        """
        text = self._feed_tokens(item)
        if item.finish is not None and self.finish_reason is None:
            text += self._finish("length" if item.finish.reason == "length" else "stop")
        return text

    def take_logprobs(self) -> list[TokenLogprob]:
        """Those of the tokens whose whole text has been handed out since the last call."""
        ready = []
        while self._logprobs and (self.finish_reason or self._logprobs[0].end <= self._emitted):
            ready.append(self._logprobs.popleft().token)
        return ready

    def _feed_tokens(self, item: StepItem) -> str:
        detokenize = self._detokenizer.feed
        if self._stops is None and not item.logprobs:
            text = "".join([detokenize(token) for token in item.tokens])
            self.completion_tokens += len(item.tokens)
            self._decoded += len(text)
            self._emitted += len(text)
            return text
        text = ""
        for i, token in enumerate(item.tokens):
            piece = detokenize(token)
            self.completion_tokens += 1
            if item.logprobs:
                entry = TokenLogprob(token, self._decoded, item.logprobs[i])
                self._logprobs.append(_Held(entry, self._decoded + len(piece)))
            self._decoded += len(piece)
            text += self._emit(piece)
            if self.finish_reason:
                break
        return text

    def _emit(self, piece: str) -> str:
        if self._stops is not None:
            piece, stopped = self._stops.feed(piece)
            if stopped:
                self.finish_reason = "stop"
        self._emitted += len(piece)
        if self.finish_reason:  # the tokens that make up the stop string do not show
            while self._logprobs and self._logprobs[-1].token.text_offset >= self._emitted:
                self._logprobs.pop()
        return piece

    def _finish(self, reason: FinishReason) -> str:
        tail = self._detokenizer.finish()
        self._decoded += len(tail)
        text = self._emit(tail)
        if self.finish_reason is None:
            self.finish_reason = reason
            if self._stops is not None:
                text += self._stops.finish()
        return text

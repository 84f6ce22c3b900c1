"""Tokens to text as they arrive: every piece emitted is final and never a broken character."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from services.router.text.tokenizer import Tokenizer

#: Tokens of the prompt that a decoder which looks at neighbours is shown before the first generated one.
CONTEXT_TOKENS = 5

#: A character has at most four bytes, so one that is still broken after as many tokens stays broken.
LONGEST_CHARACTER = 4


class ByteDetokenizer:
    """For byte-level tokenizers: table look-up and an incremental UTF-8 decoder, O(1) a token."""

    def __init__(self, text_bytes: Sequence[bytes]) -> None:
        self._bytes = text_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token: int) -> str:
        """The text that is certain now that `token` is known; special tokens have none."""
        return self._decode(self._bytes[token])

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never completed."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other decoder: decode a short window of the last tokens with and without the new one.

    The window starts at a token whose text has been emitted, so that spaces which depend on the neighbour
    come out as in the whole text. It grows only while its end is a broken character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._window = [token for token in prompt[-CONTEXT_TOKENS:] if token not in self._special]
        self._emitted = len(self._window)  # leading tokens of the window whose text is out

    def feed(self, token: int) -> str:
        """The text that is certain now that `token` is known; special tokens have none."""
        if token in self._special:
            return ""
        self._window.append(token)
        return self._advance(final=len(self._window) - self._emitted > LONGEST_CHARACTER)

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never completed."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._tokenizer.decode(self._window)
        if text.endswith("\ufffd") and not final:
            return ""
        before = self._tokenizer.decode(self._window[: self._emitted])
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text[len(before) :]


class MarkingDetokenizer:
    """Shows some special tokens too, as the marks they are."""

    def __init__(self, detokenizer: ByteDetokenizer | WindowDetokenizer, marks: Mapping[int, str]) -> None:
        self._detokenizer = detokenizer
        self._marks = marks

    def feed(self, token: int) -> str:
        """The text that is certain now that `token` is known; other special tokens have none."""
        if token in self._marks:
            return self._detokenizer.finish() + self._marks[token]
        return self._detokenizer.feed(token)

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never completed."""
        return self._detokenizer.finish()


Detokenizer = ByteDetokenizer | WindowDetokenizer | MarkingDetokenizer


def make_detokenizer(tokenizer: Tokenizer, prompt: Sequence[int]) -> ByteDetokenizer | WindowDetokenizer:
    """A detokenizer for one generated sequence that follows `prompt`."""
    if tokenizer.text_bytes is not None:
        return ByteDetokenizer(tokenizer.text_bytes)
    return WindowDetokenizer(tokenizer, prompt)

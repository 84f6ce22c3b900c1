"""The model's tokenizer, and what each token's text is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

#: Shorter prompts are tokenised in the event loop (about 1 ms at this length); longer ones in a thread.
INLINE_CHARS = 2048


class Tokenizer:
    """A Hugging Face tokenizer document, with a table from token id to bytes where the decoder allows one.

    A byte-level BPE decoder maps every token to its bytes whatever stands around it, so text can be put
    together by concatenating entries of `text_bytes` (empty for special tokens). Other decoders
    (SentencePiece's among them) look at neighbours; the table is then None and text comes from `decode`.
    """

    def __init__(self, document: bytes, vocab_size: int) -> None:
        """Raises ValueError if `document` is not a tokenizers JSON document."""
        try:
            self._tokenizer = HFTokenizer.from_str(document.decode())
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"the worker's tokenizer cannot be read: {error}") from error
        self.vocab_size = vocab_size
        self.special_ids = frozenset(
            token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        )
        self._all_bytes: list[bytes] | None = None
        self.text_bytes: list[bytes] | None = None
        if _decodes_bytes(json.loads(document).get("decoder")):
            self._all_bytes = [_raw_bytes(self._tokenizer.id_to_token(i)) for i in range(vocab_size)]
            self.text_bytes = [b"" if i in self.special_ids else b for i, b in enumerate(self._all_bytes)]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written out in it count as such. Releases the GIL."""
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and for each the index of its first character in `text`."""
        encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`, special tokens left out or by their names."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def name(self, token: int) -> str:
        """As the vocabulary has it; empty for ids that pad it."""
        return self._tokenizer.id_to_token(token) or ""

    def token_id(self, token: str) -> int | None:
        """The id of a token written as in the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def one_token(self, token: int) -> bytes:
        """What a token stands for alone, special tokens by their name: the form logprobs show."""
        if self._all_bytes:
            return self._all_bytes[token]
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()


def _decodes_bytes(decoder: dict[str, Any] | None) -> bool:
    """Is this decoder `ByteLevel`, alone or as the only step of a sequence?"""
    if not decoder:
        return False
    if decoder.get("type") == "Sequence":
        return [step.get("type") for step in decoder.get("decoders", [])] == ["ByteLevel"]
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: itself where printable, else the next free one from
    U+0100 on (openai/gpt-2, src/encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet.values()]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _raw_bytes(token: str | None) -> bytes:
    """A vocabulary entry's bytes. Added tokens are not written in the alphabet: their text is their bytes."""
    if token is None:  # padding of the embedding table
        return b""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()

"""A tokenizer whose token ids are byte values, with a ChatML template: text that tests can read as tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from services.wire.messages import ModelCard, TextAssets

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
SPECIAL = {BOS: "<|bos|>", EOS: "<|eos|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
FAKE_VOCAB = 256 + len(SPECIAL)

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [names[byte] for byte in range(256)]


def byte_text_assets(words: Sequence[str] = ()) -> TextAssets:
    """Token id = byte value; 256 and up are the special tokens, then `words` as whole tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {"id": token, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for token, text in SPECIAL.items()
    ]  # fmt: skip
    characters = _byte_characters()
    vocab = {character: byte for byte, character in enumerate(characters)}
    for token, word in enumerate(words, start=FAKE_VOCAB):
        vocab["".join(characters[byte] for byte in word.encode())] = token
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab | {text: token for token, text in SPECIAL.items()},
            "merges": [],
        },
    }
    return TextAssets(
        tokenizer=json.dumps(tokenizer).encode(),
        chat_template=CHAT_TEMPLATE,
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
    )


def fake_card(name: str, max_model_len: int, text: TextAssets, words: int = 0) -> ModelCard:
    """The card of the model that FakeEngine pretends to run; `words` are those in `text`."""
    return ModelCard(
        name=name,
        fingerprint=blake2b(name.encode(), digest_size=16).digest(),
        text_digest=blake2b(msgspec.msgpack.encode(text), digest_size=16).digest(),
        vocab_size=FAKE_VOCAB + words,
        max_model_len=max_model_len,
        eos_token_ids=(EOS, IM_END),
    )

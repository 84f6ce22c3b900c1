"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face tokenizers document.

A GGUF holds the vocabulary with token types, the merges or scores, and the name of a pre-tokenizer; how text
is split and spelled follows from that name and is written down here, per name, as the models' own
tokenizer.json files have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import msgspec
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from services.wire.messages import TextAssets
from services.worker.models.config import ModelError
from services.worker.text_assets import plain_tokenizer

#: SentencePiece's stand-in for a space.
SPACE = "▁"


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: How a byte-level vocabulary splits text, by `tokenizer.ggml.pre`. {digits}: longest run of digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "smaug-bpe")
QWEN2 = ("qwen2", "deepseek-r1-qwen")
GPT2 = ("default", "gpt-2")
SMOLLM = ("smollm",)

#: general.sampling.* -> the field of generation_config.json.
SAMPLING = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def text_assets_from_metadata(metadata: Mapping[str, Any]) -> TextAssets:
    """Everything about text in a GGUF file's metadata.

    Raises ModelError for a tokenizer or pre-tokenizer that is not supported, and for a damaged one.
    """
    tokenizer = build_tokenizer(metadata)
    bos_token = _token(metadata, "bos_token_id")
    # The defaults of files that do not say, as llama.cpp has them.
    implied = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", implied)
    sampling = {name: metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    return TextAssets(
        tokenizer=plain_tokenizer(msgspec.json.decode(tokenizer.to_str())),
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_token=bos_token,
        eos_token=_token(metadata, "eos_token_id"),
        add_bos=bool(add_bos) and bos_token is not None,
        generation_defaults={name: float(value) for name, value in sampling.items() if value is not None},
    )


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer, special tokens included. Raises ModelError (see `text_assets_from_metadata`)."""
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ModelError(f"GGUF tokenizer {kind!r} is not supported; supported: {', '.join(builders)}")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type must have {len(tokens)} entries, got {len(types)}")
    tokenizer = builders[kind](metadata, tokens, types)
    # Matched whole in the text before anything else; special ones vanish when decoded to text.
    matched = {TokenType.UNKNOWN: True, TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=matched[TokenType(type_)])
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in matched
        ]
    )
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """GPT-2's scheme: bytes spelled as printable characters, ranked merges."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = _stored_merges(metadata)
    # Llama 3 takes a word that is a token as that token, even where its merges lead elsewhere.
    model = _bpe(tokens, merges, ignore_merges=pre in LLAMA3)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    if pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in LLAMA3 or pre in QWEN2:
        split = Regex(SPLIT.format(digits="{1,3}" if pre in LLAMA3 else ""))
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    supported = ", ".join((*GPT2, *SMOLLM, *LLAMA3, *QWEN2))
    raise ModelError(f"GGUF pre-tokenizer {pre!r} is not supported; supported: {supported}")


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE (Llama 2, Mistral): spaces as ▁, bytes for what the vocabulary lacks."""
    unknown = _token(metadata, "unknown_token_id") or "<unk>"
    if "tokenizer.ggml.merges" in metadata:
        merges = _stored_merges(metadata)
    else:
        merges = _merges_from_scores(tokens, types, metadata.get("tokenizer.ggml.scores", []))
    tokenizer = Tokenizer(_bpe(tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", SPACE)
    decoder = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoder.append(decoders.Strip(" ", left=1))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score; as ranked merges that is every
    split of every token into two tokens, best union first."""
    if len(scores) != len(tokens):
        raise ModelError(f"tokenizer.ggml.scores must have {len(tokens)} entries, got {len(scores)}")
    ids = {
        token: i for i, token in enumerate(tokens) if types[i] in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    ranked = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]


def _bpe(tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises Exception itself, naming the merge
        raise ModelError(f"tokenizer.ggml.merges do not fit the vocabulary: {error}") from error


def _stored_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in metadata.get("tokenizer.ggml.merges", []):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _token(metadata: Mapping[str, Any], key: str) -> str | None:
    """The token named by an id in the metadata, None when the file names none."""
    tokens, index = metadata.get("tokenizer.ggml.tokens", []), metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ModelError(f"tokenizer.ggml.{key} must be below {len(tokens)}, got {index}")
    return str(tokens[index])

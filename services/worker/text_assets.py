"""Text assets from a model folder: what a router needs to turn text into tokens and back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from services.wire.messages import TextAssets
from services.worker.models.config import ModelError

#: Sampling fields of generation_config.json that become a request's defaults.
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def text_digest(text: TextAssets) -> bytes:
    """16 bytes naming the assets, so that a router fetches each set once."""
    return hashlib.blake2b(msgspec.msgpack.encode(text), digest_size=16).digest()


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, {} when there is no such file. Raises ModelError if it holds anything else."""
    if not file.is_file():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ModelError(f"{file.name} is not a JSON object: {error}") from error


def text_assets_from_directory(directory: Path) -> TextAssets:
    """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    Raises ModelError without tokenizer.json, or when one of the files is malformed.
    """
    config = read_json(directory / "tokenizer_config.json")
    special = read_json(directory / "special_tokens_map.json")
    document = read_json(directory / "tokenizer.json")
    if not document:
        raise ModelError(
            f"{directory.name} has no tokenizer.json, the only tokenizer format that is supported"
        )
    tokenizer = _parse(document)
    bos_token = _token_text(config.get("bos_token", special.get("bos_token")))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos_token is not None and _starts_with(tokenizer, bos_token)
    return TextAssets(
        tokenizer=plain_tokenizer(document),
        chat_template=_chat_template(directory, config),
        bos_token=bos_token,
        eos_token=_token_text(config.get("eos_token", special.get("eos_token"))),
        add_bos=bool(add_bos) and bos_token is not None,
        generation_defaults=_generation_defaults(directory),
    )


def plain_tokenizer(document: dict[str, Any]) -> bytes:
    """The tokenizer without what some files carry beside it: truncation and padding, left over from
    training, would cut prompts, and a post-processor would add BOS a second time (see TextAssets.add_bos)."""
    return msgspec.json.encode(document | {"truncation": None, "padding": None, "post_processor": None})


def _parse(document: dict[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(msgspec.json.encode(document).decode())
    except Exception as error:  # the library raises Exception itself
        raise ModelError(f"tokenizer.json is not a tokenizer: {error}") from error


def _starts_with(tokenizer: Tokenizer, bos_token: str) -> bool:
    """Whether the tokenizer itself puts `bos_token` before a text."""
    ids = tokenizer.encode("a").ids
    return bool(ids) and ids[0] == tokenizer.token_to_id(bos_token)


def _token_text(token: Any) -> str | None:
    """A special token is written as a string or as {"content": …}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _generation_defaults(directory: Path) -> dict[str, float]:
    config = read_json(directory / "generation_config.json")
    values = {name: config.get(name) for name in GENERATION_DEFAULTS}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}

"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.router.text.choice import TokenLogprob
from services.router.text.tokenizer import Tokenizer

#: JSON has no minus infinity; the OpenAI API writes this for a token that cannot come.
IMPOSSIBLE = -9999.0


def chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` object of a chat choice or chunk."""
    return {
        "content": [
            {
                **_entry(item.token, item.logprob.chosen, tokenizer),
                "top_logprobs": [_entry(token, value, tokenizer) for token, value in item.logprob.top],
            }
            for item in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` object of a text completion choice or chunk."""
    return {
        "tokens": [_text(tokenizer.one_token(item.token)) for item in tokens],
        "token_logprobs": [max(item.logprob.chosen, IMPOSSIBLE) for item in tokens],
        "top_logprobs": [_by_text(item.logprob.top, tokenizer) for item in tokens],
        "text_offset": [item.text_offset for item in tokens],
    }


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.one_token(token)
    return {"token": _text(data), "logprob": max(logprob, IMPOSSIBLE), "bytes": list(data)}


def _by_text(top: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> dict[str, float]:
    """The most likely of the tokens that read the same (parts of characters do) stands for them all."""
    found: dict[str, float] = {}
    for token, value in top:
        found.setdefault(_text(tokenizer.one_token(token)), max(value, IMPOSSIBLE))
    return found


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")

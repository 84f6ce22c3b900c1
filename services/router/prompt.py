"""From a request's text to tokens and block hashes, off the event loop where it takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from services.router.api.conversation import conversation
from services.router.api.errors import invalid
from services.router.api.requests import ChatRequest, CompletionRequest
from services.router.api.retention import (
    boundaries,
    explicit_retention,
    message_spans,
    span_retention,
)
from services.router.api.sampling import check_prompt_ids, check_room
from services.router.text import ModelText
from services.router.text.template import TemplateError
from services.wire.hashes import TOKEN_BYTES, chain_hashes, pack_tokens, root_hash
from services.wire.messages import ModelCard, Retention

T = TypeVar("T")

#: Bodies below this are tokenised in the event loop (about 1 ms at this length), longer ones in a thread.
INLINE_BYTES = 2048


@dataclass(eq=False)
class Prompt:
    """Tokens to continue, how long to keep their blocks, and their names under every root asked for."""

    tokens: list[int]
    salt: bytes
    retention: tuple[Retention, ...] = ()
    end: str = ""  # last characters of a chat's text: they may begin the answer
    packed: bytes = b""
    _hashes: dict[tuple[bytes, int], list[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.packed = pack_tokens(self.tokens)

    def root(self, fingerprint: bytes) -> bytes:
        """Parent of the first block for a model's fingerprint."""
        return root_hash(fingerprint, self.salt)

    def hashes(self, fingerprint: bytes, block_size: int) -> list[bytes]:
        """Names of the full blocks; computed once."""
        key = (fingerprint, block_size)
        if key not in self._hashes:
            self._hashes[key] = chain_hashes(self.root(fingerprint), self.packed, block_size)
        return self._hashes[key]

    def with_answer(
        self, answer: Iterable[int], fingerprint: bytes, block_size: int
    ) -> tuple[bytes, list[bytes]]:
        """Packed tokens and names of the full blocks of the prompt and what has been answered so far."""
        hashes = self.hashes(fingerprint, block_size)
        answered = pack_tokens(answer)
        if not answered:
            return self.packed, hashes
        packed = self.packed + answered
        parent = hashes[-1] if hashes else self.root(fingerprint)
        rest = packed[len(hashes) * block_size * TOKEN_BYTES :]
        return packed, hashes + chain_hashes(parent, rest, block_size)


class PromptBuilder:
    """Templates, tokenises and hashes: what costs more than a millisecond runs in a few threads."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prompt")

    async def build(
        self,
        request: ChatRequest | CompletionRequest,
        size: int,
        text: ModelText,
        card: ModelCard,
        block_size: int,
        salt: bytes,
    ) -> Prompt:
        """The prompt of a request whose body had `size` bytes. Raises ApiError (400)."""
        return await self.run(size, partial(_build, request, text, card, block_size, salt))

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` for a request whose body had `size` bytes."""
        if size < INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Drop what waits; what runs finishes in its thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _build(
    request: ChatRequest | CompletionRequest, text: ModelText, card: ModelCard, block_size: int, salt: bytes
) -> Prompt:
    end = ""
    if isinstance(request, ChatRequest):
        tokens, retention, end = _chat(request, text, card)
    else:
        tokens, retention = _completion(request, text, card)
    prompt = Prompt(tokens, salt, retention, end)
    prompt.hashes(card.fingerprint, block_size)  # here, in the thread: routing will ask for them
    return prompt


def _chat(
    request: ChatRequest, text: ModelText, card: ModelCard
) -> tuple[list[int], tuple[Retention, ...], str]:
    spans = message_spans(request.messages)
    if spans and request.retention:
        raise invalid("retention and cache_priority cannot be combined in one request", "retention")
    seen = conversation(request, text.template)
    wanted = boundaries(spans)
    try:
        chat = text.encode_chat(
            seen.messages, seen.tools, request.chat_template_kwargs, [index + seen.added for index in wanted]
        )
    except TemplateError as error:
        raise invalid(f"messages: the model's chat template refused them: {error}", "messages") from None
    if not chat.tokens:
        raise invalid("messages: the model's chat template made an empty prompt of them", "messages")
    check_room(len(chat.tokens), card, "messages")
    if spans:
        starts = dict(zip(wanted, chat.starts, strict=True))
        return chat.tokens, span_retention(spans, starts, len(chat.tokens)), chat.end
    return chat.tokens, explicit_retention(request.retention, len(chat.tokens)), chat.end


def _completion(
    request: CompletionRequest, text: ModelText, card: ModelCard
) -> tuple[list[int], tuple[Retention, ...]]:
    if isinstance(request.prompt, str):
        tokens = text.encode_prompt(request.prompt)
    else:
        tokens = [token for token in request.prompt if isinstance(token, int)]
        check_prompt_ids(tokens, card)
    check_room(len(tokens), card, "prompt")
    return tokens, explicit_retention(request.retention, len(tokens))

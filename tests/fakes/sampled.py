"""A reply that depends on all that sampling does: a resumed answer that gets any of it wrong differs."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import msgspec

from services.worker.request import Request
from tests.fakes.text import EOS


def sampled_reply(request: Request) -> Iterator[int]:
    """For FakeEngine: letters, now and then the beginning of a character of three bytes, and an end after 40
    tokens or so. Each follows from the parameters, its position, the prompt and the answer before it."""
    history = list(request.tokens)
    while True:
        position = len(history) - request.prompt_length
        state = (request.sampling, request.prompt_length, position, history)
        drawn = int.from_bytes(blake2b(msgspec.msgpack.encode(state), digest_size=8).digest())
        if drawn % 40 == 0 and position >= request.sampling.min_tokens:
            token = EOS
        elif drawn % 17 == 0:
            token = 0xE2
        else:
            token = 97 + drawn % 26
        yield token
        history.append(token)

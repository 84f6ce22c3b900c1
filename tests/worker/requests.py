"""Requests for tests of the scheduler and the engine."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from services.wire.hashes import chain_hashes, pack_tokens
from services.wire.messages import Retention, SamplingParams
from services.worker.grammar import Matcher
from services.worker.request import Request

ROOT = b"r" * 16
BLOCK = 16


def prompt(length: int, seed: int = 0, vocab: int = 320) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]


def make_request(
    key: Hashable,
    tokens: Sequence[int],
    *,
    max_tokens: int = 8,
    temperature: float = 0.0,
    priority: int = 0,
    arrival_s: float = 0.0,
    retention: tuple[Retention, ...] = (),
    tenant: str = "",
    block_size: int = BLOCK,
    generated: int = 0,
    matcher: Matcher | None = None,
    **sampling: object,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, **sampling)  # type: ignore[arg-type]
    return Request(
        key=key,
        tokens=tokens,
        root=ROOT,
        hashes=chain_hashes(ROOT, pack_tokens(tokens), block_size),
        sampling=params,
        retention=retention,
        priority=priority,
        tenant=tenant,
        arrival_s=arrival_s,
        generated=generated,
        matcher=matcher,
    )

"""The functions on a real server with a clock that the test turns."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from redis import Redis

from services.cache_store.functions import ROOT, SOURCE, NewBlock, Reserved, StoreFunctions, owner_digest

CLOCK_KEY = "test:clock"
#: The same functions with Redis' TIME replaced by a list [seconds, microseconds] of the same shape.
TURNABLE = SOURCE.replace("redis.call('TIME')", f"redis.call('LRANGE', '{CLOCK_KEY}', 0, 1)")
CONDEMNED = 2  # in the byte that says whether a block has retentions
ALICE, BOB = owner_digest("alice"), owner_digest("bob")


def block_hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()


def chain(name: str, length: int) -> list[bytes]:
    return [block_hash(f"{name}/{i}") for i in range(length)]


def new_blocks(
    hashes: list[bytes], size: int = 100, owner: bytes = ALICE, **retention: int
) -> list[NewBlock]:
    return [
        NewBlock(hash_, parent, size, owner, **retention)
        for hash_, parent in zip(hashes, [ROOT, *hashes], strict=False)
    ]


class Store:
    """StoreFunctions on a flushed server with a clock of its own."""

    def __init__(self, client: Redis, capacity: int = 1000) -> None:
        client.flushall()
        client.function_flush()
        self.client = client
        self.calls = StoreFunctions(client, source=TURNABLE)
        self.calls.configure(capacity)
        self.set_clock(1_800_000_000_000)

    def set_clock(self, now_ms: int) -> None:
        self.now = now_ms
        pipeline = self.client.pipeline()
        pipeline.delete(CLOCK_KEY)
        pipeline.rpush(CLOCK_KEY, now_ms // 1000, now_ms % 1000 * 1000)
        pipeline.execute()

    def turn_clock(self, ms: int = 1) -> None:
        self.set_clock(self.now + ms)

    def reserve(self, hashes: list[bytes], life_ms: int = 10_000, **arguments: Any) -> Reserved:
        self.turn_clock()
        return self.calls.reserve(new_blocks(hashes, **arguments), life_ms)

    def store(self, hashes: list[bytes], **arguments: Any) -> str:
        """Reserve and commit; the statuses as one word."""
        reserved = self.reserve(hashes, **arguments)
        written = [h for h, status in zip(hashes, reserved.statuses, strict=True) if status == "W"]
        assert all(self.calls.commit(reserved.fence, written))
        return "".join(reserved.statuses)

    def length(self, hashes: list[bytes]) -> int:
        return self.calls.peek(hashes)

    def records(self) -> dict[bytes, Record]:
        return {
            hash_: Record.unpack(packed)
            for hash_, packed in self.client.hgetall(self.calls.key["blocks"]).items()
        }


@dataclass
class Record:
    state: int
    tier: int
    uses: int
    priority: int
    condemned: bool
    readers: int
    children: int
    size: int
    last: int
    lease: int
    fence: bytes
    parent: bytes

    @classmethod
    def unpack(cls, packed: bytes) -> Record:
        state, value, last, priority, _, retained, readers, children, size, lease, fence, _, parent = (
            struct.unpack(">BB6sBBBHHI6s7s8s16s", packed)
        )
        last_ms, lease_ms = int.from_bytes(last, "big"), int.from_bytes(lease, "big")
        return cls(
            state, value >> 4, value & 15, priority, retained >= CONDEMNED, readers, children, size, last_ms,
            lease_ms, fence, parent,
        )  # fmt: skip

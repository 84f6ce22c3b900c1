"""The shared store as the engine's third tier: loads ahead of prefill, writes behind it.

The engine's thread never touches a socket. A load is given up when it takes much longer than it promised, and
a store that is down answers every question at once with nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.kv_payload import Codec, KVShape
from services.cache_store.client import BlockStore
from services.cache_store.frames import FrameFormat
from services.cache_store.known import KnownBlocks
from services.cache_store.link import LinkEstimate
from services.worker.store_reader import StoreReader
from services.worker.store_writer import StoreWriter
from services.worker.tiers import Load, OfferedBlock


@dataclass(frozen=True)
class StoreTierConfig:
    """`block_shape` is [layer, 2, head, token, dim] of `dtype`: what payloads decode to."""

    url: str  # redis://, rediss:// or unix://
    fingerprint: bytes  # the model's: covers weights, dtype and layout
    block_shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    capacity: int | None = None  # bytes of the whole store; set where none is set yet
    max_queued_bytes: int = 256 << 20  # of blocks on their way to the store
    codec: Codec = Codec.NONE  # of what is written; frames of more exact ones are read too


class RedisStoreTier:
    """A `StoreTier` (services.worker.tiers) on one Redis. `close` it when the engine has stopped."""

    def __init__(self, config: StoreTierConfig, clock: Callable[[], float] = time.monotonic) -> None:
        layers, _, kv_heads, tokens, dim = config.block_shape
        shape = KVShape(layers, kv_heads, tokens, dim, config.dtype)
        block_bytes = shape.payload_bytes(config.codec)
        format = FrameFormat(
            config.fingerprint,
            layers,
            tokens,
            block_bytes,
            config.codec,
            takes={codec: shape.payload_bytes(codec) for codec in config.codec.as_exact()},
            raw_bytes=shape.payload_bytes(Codec.NONE),
        )
        self._clock = clock
        self._blocks_per_byte = 1 / block_bytes
        self._tokens_per_block = tokens
        self._store = BlockStore(config.url, format, capacity=config.capacity, clock=clock)
        self._known = KnownBlocks()
        self._link = LinkEstimate()
        self._reader = StoreReader(self._store, self._known, self._link, shape, block_bytes, clock)
        self._writer = StoreWriter(self._store, self._known, max(1, config.max_queued_bytes // block_bytes))

    def start_load(self, hashes: Sequence[bytes], recompute_s: Sequence[float], tenant: str) -> Load | None:
        return self._reader.start(hashes, recompute_s, tenant)

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        return self._writer.offer(blocks)

    def wants(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        return self._writer.wants(hashes)

    def retain(self, hashes: Sequence[bytes], priority: int, ttl_s: float | None, tenant: str) -> None:
        """Tell the store what a request wants of blocks that it need not store again."""
        self._writer.retain(hashes, priority, ttl_s, tenant)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        return self._known.take_events()

    def tokens_per_s(self) -> float:
        if self._store.is_down() or not self._writer.reached:
            return 0.0
        return self._link.bytes_per_s(self._clock()) * self._blocks_per_byte * self._tokens_per_block

    def counts(self) -> dict[str, int]:
        """Counters since the start: loads, loaded_blocks, gate_closed, given_up, errors, quarantined:<reason>
        and written:<outcome> (see frames.BadFrame and client.Outcome)."""
        return self._store.counts()

    def close(self) -> None:
        self._reader.stop()
        self._writer.stop()
        self._store.close()  # wakes the threads that wait for an answer
        self._reader.join()
        self._writer.join()

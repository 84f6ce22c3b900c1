"""The shared store as the engine's third tier: loads ahead of prefill, writes behind it.

The engine's thread never touches a socket. Computing never waits for a load, and a store that is down answers
every question at once with nothing.

The store may be several servers. Each has everything of its own, client, threads, beliefs and link, so one
that is slow or down costs hits of its own prefixes and nobody else's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch

from kernels.kv_payload import Codec, KVShape
from services.cache_store.address import Address, split_urls
from services.cache_store.client import BlockStore
from services.cache_store.frames import FrameFormat
from services.cache_store.known import KnownBlocks
from services.cache_store.link import LinkEstimate
from services.cache_store.shards import Rendezvous
from services.worker.store_reader import StoreReader
from services.worker.store_writer import StoreWriter
from services.worker.tiers import Load, OfferedBlock, Outlook


@dataclass(frozen=True)
class StoreTierConfig:
    """`block_shape` is [layer, 2, head, token, dim] of `dtype`: what payloads decode to."""

    url: str  # redis://, rediss:// or unix://; several servers' separated by commas
    fingerprint: bytes  # the model's: covers weights, dtype and layout
    block_shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    capacity: int | None = None  # bytes of the whole store; set where none is set yet
    max_queued_bytes: int = 256 << 20  # of blocks on their way to the store
    pinned: bool = False  # load into memory that a GPU copies from at full speed
    codec: Codec = Codec.NONE  # of what is written; frames of more exact ones are read too


class RedisStoreTier:
    """A `StoreTier` (services.worker.tiers) on Redis. `close` it when the engine has stopped."""

    def __init__(self, config: StoreTierConfig, clock: Callable[[], float] = time.monotonic) -> None:
        urls = split_urls(config.url)
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
        capacity = None if config.capacity is None else config.capacity // len(urls)
        # All clients before the first thread: a URL that makes no sense leaves none behind.
        stores = [BlockStore(url, format, capacity=capacity, clock=clock) for url in urls]
        self._tokens_per_byte = tokens / block_bytes
        self._rendezvous = Rendezvous([Address.from_url(url).name for url in urls])
        self._shards = [_Shard(store, config, shape, len(urls), clock) for store in stores]

    def start_load(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        first: bytes,
        most: int,
        outlook: Outlook | None = None,
    ) -> Load | None:
        return self._shard(first).reader.start(hashes, recompute_s, tenant, most, outlook)

    @property
    def awaited(self) -> Set[bytes]:
        each = [awaited for shard in self._shards if (awaited := shard.reader.flights.awaited)]
        return each[0] if len(each) == 1 else frozenset[bytes]().union(*each)

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        taken = 0
        for first, run in groupby(blocks, attrgetter("first")):
            taken += self._shard(first).writer.offer(list(run))
        return taken

    def wants(self, hashes: Sequence[bytes], first: bytes) -> Sequence[bool]:
        return self._shard(first).writer.wants(hashes)

    def server(self, first: bytes) -> int:
        return self._rendezvous.choose(first)

    def room(self, server: int) -> int:
        return self._shards[server].writer.room()

    def threshold(self, first: bytes) -> float:
        return self._shard(first).writer.threshold

    def retain(
        self, hashes: Sequence[bytes], priority: int, ttl_s: float | None, tenant: str, first: bytes
    ) -> None:
        """Tell the store what a request wants of blocks that it need not store again."""
        self._shard(first).writer.retain(hashes, priority, ttl_s, tenant)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        stored: list[bytes] = []
        removed: list[bytes] = []
        for shard in self._shards:
            new, gone = shard.known.take_events()
            stored += new
            removed += gone
        return stored, removed

    def tokens_per_s(self) -> float:
        """The mean over the servers, a prefix being on any of them."""
        bytes_per_s = sum(shard.bytes_per_s() for shard in self._shards) / len(self._shards)
        return bytes_per_s * self._tokens_per_byte

    def counts(self) -> dict[str, int]:
        """Counters since the start: loads, loaded_blocks, gate_closed, errors, busy,
        quarantined:<reason> and written:<outcome> (see frames.BadFrame and client.Outcome); claims,
        claims_followed, follows, followed_blocks, follows_recomputed (see flight)."""
        total: Counter[str] = Counter()
        for shard in self._shards:
            total.update(shard.store.counts())
        return dict(total)

    def close(self) -> None:
        for shard in self._shards:
            shard.stop()
        for shard in self._shards:
            shard.join()

    def _shard(self, first: bytes) -> _Shard:
        return self._shards[self.server(first)]


class _Shard:
    """One server of the store, `of` how many."""

    def __init__(
        self,
        store: BlockStore,
        config: StoreTierConfig,
        shape: KVShape,
        of: int,
        clock: Callable[[], float],
    ) -> None:
        block_bytes = shape.payload_bytes(config.codec)
        self._clock = clock
        self.store = store
        self.known = KnownBlocks()
        self.link = LinkEstimate()
        self.reader = StoreReader(store, self.known, self.link, shape, block_bytes, config.pinned, clock)
        most_queued = max(1, config.max_queued_bytes // of // block_bytes)
        self.writer = StoreWriter(store, self.known, most_queued, self.reader.flights.written)

    def bytes_per_s(self) -> float:
        """Measured bandwidth of loads; 0 while the server is unreachable."""
        if self.store.is_down() or not self.writer.reached:
            return 0.0
        return self.link.bytes_per_s(self._clock())

    def stop(self) -> None:
        self.reader.stop()
        self.writer.stop()
        self.store.close()  # wakes the threads that wait for an answer

    def join(self) -> None:
        self.reader.join()
        self.writer.join()

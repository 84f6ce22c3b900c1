"""The block store as its users see it: a failure is a miss, and nothing waits for a store that is down."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from os import urandom
from typing import TypeVar

from redis import Connection, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError
from redis.retry import Retry

from services.cache_store.address import Address
from services.cache_store.allocation import stored_bytes
from services.cache_store.breaker import CircuitBreaker
from services.cache_store.claims import CLAIMER_BYTES, Claimed, Claims, Followed, Times
from services.cache_store.embedded import public_url
from services.cache_store.frames import (
    CODEC_IDS,
    HEADER_BYTES,
    BadFrame,
    FrameFormat,
    Payload,
    frame_header,
    open_frame,
)
from services.cache_store.functions import (
    FOLLOW,
    HAVE,
    MAX_BLOCKS,
    NO_ROOM,
    ORPHAN,
    WRITE,
    Margin,
    NewBlock,
    Reserved,
    StoreFunctions,
    Unconfigured,
    owner_digest,
)
from services.cache_store.lanes import Lane, LaneBusy, Lanes
from services.cache_store.payloads import Payloads, unlink_payloads
from services.cache_store.pool import ConnectionPool
from services.wire.hashes import HASH_BYTES

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: A lease must outlast the load that it protects; a dead reader blocks its blocks' eviction for so long.
LEASE_MS = 10_000

#: A reservation must outlast one batch of writes.
RESERVATION_MS = 10_000

#: Rounds of making room for one batch: at most 64 blocks leave a round.
_ROOM_ROUNDS = 4

#: Wait so long for a turn of a metadata call; no more than a request can spare.
_PEEK_WAIT_S = 0.1


class Outcome(StrEnum):
    """What became of a block that was to be written."""

    STORED = "stored"
    HAD = "had"  # in the store already
    FOLLOWED = "followed"  # another writer is at it
    ORPHANED = "orphaned"  # the block before it is not in the store
    NO_ROOM = "no_room"  # all that could go for it ranks higher
    FAILED = "failed"  # the store is down or full, or the write came too late


@dataclass(frozen=True)
class WriteBlock:
    """A block to store; `parent` is ROOT for a prefix's first block. `payload` holds its KV values."""

    hash: bytes
    parent: bytes
    tenant: str
    priority: int
    ttl_s: float | None
    payload: memoryview


@dataclass
class WriteReport:
    outcomes: dict[bytes, Outcome] = field(default_factory=dict)  # by block hash; absent = FAILED
    dropped: list[bytes] = field(default_factory=list)  # hashes of blocks that left the store on the way


@dataclass(frozen=True)
class Found:
    """A leading run that the store holds, safe from eviction until it is released or `until` has passed."""

    hashes: list[bytes]
    names: list[bytes]  # of the payloads
    leases: list[tuple[bytes, bytes]]
    until: float  # on the store's clock


class BlockStore:
    """One shard of the store for blocks of one `format`. Thread-safe; a store in trouble raises nothing.

    `url` is redis://, rediss:// (TLS) or unix://, with user and password where needed. `capacity` in bytes is
    set if the store has none. After 5 failures within 10 s all calls answer at once, for 2 s at a time.
    Raises ValueError for a URL or capacity that makes no sense.
    """

    def __init__(
        self,
        url: str,
        format: FrameFormat,
        *,
        capacity: int | None = None,
        shard: int = 0,
        timeout_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity is not None and capacity <= 0:
            raise ValueError(f"capacity must be positive, got {capacity} bytes")
        # One immediate retry on a fresh connection: after a restart all pooled ones are dead.
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        self._redis = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=retry,
            redis_connect_func=self._greet,
        )
        self._where = public_url(url)
        self._format = format
        self._shard = shard
        self._capacity = capacity
        self._block_bytes = stored_bytes(format.frame_bytes)
        self._functions = StoreFunctions(self._redis, shard=shard)
        claimer = urandom(CLAIMER_BYTES)
        self._claims = Claims(self._redis, claimer, CODEC_IDS[format.codec], shard=shard)
        self._lanes = Lanes()
        self._pool = ConnectionPool(Address.from_url(url), timeout_s)
        self._payloads = Payloads(
            self._pool,
            self._lanes,
            format.frame_bytes,
            timeout_s=timeout_s,
            shard=shard,
            others=[HEADER_BYTES + size for size in format.takes.values()],
        )
        self._clock = clock
        self._closed = False
        self._lock = threading.Lock()
        self._breaker = CircuitBreaker()
        self._counts: Counter[str] = Counter()

    @property
    def batch(self) -> int:
        """Frames that `read` and one round of `write` move at most: 8 MiB of them."""
        return self._payloads.batch

    @property
    def slot_bytes(self) -> int:
        """Memory that `read` needs for each frame: its length rounded up to whole cache lines."""
        return self._payloads.slot_bytes

    def is_down(self) -> bool:
        """Whether calls are answered without asking, because the store keeps failing."""
        with self._lock:
            return self._breaker.is_open(self._clock())

    def count(self, what: str, by: int = 1) -> None:
        """Add to one of the `counts`."""
        with self._lock:
            self._counts[what] += by

    def counts(self) -> dict[str, int]:
        """What this client has seen: errors, busy, out_of_memory, quarantined:<reason>,
        written:<outcome> blocks, and whatever its user counted."""
        with self._lock:
            return dict(self._counts)

    def identity(self) -> bytes | None:
        """Names the store's contents: another value means that it was emptied. None: it cannot be reached."""
        return self._try(partial(self._functions.attach, self._capacity), None)

    def margin(self) -> Margin | None:
        """How full the store is and what its next victim is worth. None: unreachable."""
        return self._try(self._functions.margin, None)

    def lookup(self, hashes: Sequence[bytes], tenant: str) -> Found | None:
        """The leading run of `hashes` that the store holds, leased: release it. None: unreachable."""
        return self._try(partial(self._lookup, hashes, owner_digest(tenant)), None)

    def stored(self, hashes: Sequence[bytes]) -> int | None:
        """How many leading ones of `hashes` the store holds, at most 1,024 of them; this is no use of them.
        None: unreachable."""
        return self._try(partial(self._peek, partial(self._functions.peek, hashes[:MAX_BLOCKS])), None)

    def claim(
        self, before: Sequence[bytes], run: Sequence[bytes], times: Times, least: int
    ) -> Claimed | Followed | None:
        """See Claims.claim. None: unreachable."""
        return self._try(partial(self._peek, partial(self._claims.claim, before, run, times, least)), None)

    def holds(self, followed: Followed) -> bool | None:
        """See Claims.holds. None: unreachable."""
        return self._try(partial(self._peek, partial(self._claims.holds, followed)), None)

    def renew_claims(self, keys: Sequence[bytes]) -> list[tuple[bool, bool]] | None:
        """See Claims.renew. None: unreachable."""
        return self._try(partial(self._claims.renew, keys), None)

    def release_claims(self, keys: Sequence[bytes]) -> None:
        """See Claims.release; those that cannot be reached end by themselves."""
        self._try(partial(self._claims.release, keys), None)

    def read(
        self,
        found: Found,
        start: int,
        stop: int,
        memory: memoryview | None = None,
        lane: Lane = Lane.PREFETCH,
    ) -> list[Payload]:
        """Payloads of blocks `start` to `stop` of a run, at most `batch`: a leading part of them, in order.

        It ends before the first one that is missing or not what it should be, which is then quarantined.
        Each payload is a view into `memory`: `slot_bytes` for each block, writable and the
        caller's to choose (pinned, say). Without it the frames get memory of their own.
        """
        names = found.names[start:stop]
        if memory is None:
            memory = memoryview(bytearray(len(names) * self.slot_bytes))
        payloads: list[Payload] = []
        bad: list[tuple[bytes, BadFrame]] = []

        def take(index: int, frame: memoryview | None) -> bool:
            block = found.hashes[start + index]
            payload = BadFrame.MISSING if frame is None else open_frame(self._format, block, frame)
            if isinstance(payload, BadFrame):
                bad.append((names[index], payload))
                return False
            payloads.append(payload)
            return True

        self._try(partial(self._payloads.get, names, memory, lane, take), None)
        for name, reason in bad:
            self._quarantine(name, reason)
        return payloads

    def quarantine(self, found: Found, index: int, reason: BadFrame) -> None:
        """Block `index` of a run was read and is of no use: it leaves the store, and what builds on it waits
        for another one or goes as well (`BadFrame.taints`)."""
        self._quarantine(found.names[index], reason)

    def release(self, found: Found, saved_s: float = 0.0) -> None:
        """End the leases of a run. `saved_s`: what it would have taken to compute what was loaded."""
        for last, fence in found.leases:
            if self._clock() < found.until:  # later it might end the lease of somebody else
                self._try(partial(self._functions.release, last, fence, saved_s), None)
                saved_s = 0.0  # counted once

    def write(self, blocks: Sequence[WriteBlock]) -> WriteReport:
        """Store blocks, parents before children."""
        report = WriteReport()
        for start in range(0, len(blocks), self.batch):
            part = blocks[start : start + self.batch]
            if not self._try(partial(self._write, part, report), False):
                break
        for block in blocks:
            self.count(f"written:{report.outcomes.get(block.hash, Outcome.FAILED)}")
        return report

    def retain(self, hashes: Sequence[bytes], tenant: str, priority: int, ttl_s: float | None) -> None:
        """Tell the store what a request wants of blocks that are stored already."""
        owner, ttl_ms = owner_digest(tenant), _milliseconds(ttl_s)
        for start in range(0, len(hashes), MAX_BLOCKS):
            part = hashes[start : start + MAX_BLOCKS]
            self._try(partial(self._functions.retain, part, owner, priority, ttl_ms), 0)

    def close(self) -> None:
        """Close all connections, also under the feet of calls in other threads: those answer as a miss."""
        self._closed = True
        self._lanes.close()
        self._pool.close()
        self._redis.close()
        self._redis.connection_pool.disconnect()

    # ---- inside

    def _greet(self, connection: Connection) -> None:
        """Begin a connection for control calls; after `close` nothing may, not even redis-py's retry."""
        if self._closed:
            raise RedisConnectionError("the store's client is closed")
        connection.on_connect()

    def _try(self, call: Callable[[], _Result], otherwise: _Result) -> _Result:
        with self._lock:
            if self._closed or not self._breaker.allow(self._clock()):
                return otherwise
        try:
            result = call()
        except LaneBusy:
            with self._lock:
                self._breaker.abandoned()
                self._counts["busy"] += 1
            return otherwise
        except (RedisError, OSError, Unconfigured) as error:
            with self._lock:
                was_open = self._breaker.is_open(self._clock())
                self._breaker.failed(self._clock())
                opened = self._breaker.is_open(self._clock()) and not was_open
                self._counts["errors"] += 1
            if opened:
                log.warning("store %s keeps failing, going on without it: %s", self._where, error)
            return otherwise
        with self._lock:
            self._breaker.succeeded()
        return result

    def _lookup(self, hashes: Sequence[bytes], owner: bytes) -> Found:
        until = self._clock() + LEASE_MS / 1000
        fences: list[bytes] = []
        leases = []
        for start in range(0, len(hashes), MAX_BLOCKS):
            part = hashes[start : start + MAX_BLOCKS]
            with self._lanes.turn(Lane.PEEK, 0, _PEEK_WAIT_S):
                found = self._functions.lookup(part, owner, LEASE_MS)
            if found:
                leases.append((part[len(found) - 1], found[-1]))
            fences += found
            if len(found) < len(part):
                break
        run = list(hashes[: len(fences)])
        return Found(run, [block + fence for block, fence in zip(run, fences, strict=True)], leases, until)

    def _peek(self, call: Callable[[], _Result]) -> _Result:
        """A metadata call that a request waits for."""
        with self._lanes.turn(Lane.PEEK, 0, _PEEK_WAIT_S):
            return call()

    def _quarantine(self, name: bytes, reason: BadFrame) -> None:
        self.count(f"quarantined:{reason}")
        block, fence = name[:HASH_BYTES], name[HASH_BYTES:]
        self._drop(self._try(partial(self._functions.quarantine, block, fence, reason, reason.taints), []))

    def _write(self, blocks: Sequence[WriteBlock], report: WriteReport) -> bool:
        """One batch; raises when the store fails."""
        left = list(blocks)
        for _ in range(_ROOM_ROUNDS):
            try:
                reserved = self._reserve(left)
            except OutOfMemoryError:
                self._make_memory(len(left) * self._block_bytes, report)
                return True
            report.dropped += [name[:HASH_BYTES] for name in reserved.dropped]
            self._drop(reserved.dropped)
            to_write = []
            for block, status in zip(left, reserved.statuses, strict=True):
                if status == WRITE:
                    to_write.append(block)
                else:
                    report.outcomes[block.hash] = _OUTCOMES[status]
            self._put(to_write, reserved.fence, report)
            left = [block for block in left if report.outcomes.get(block.hash) in _FOR_WANT_OF_ROOM]
            if not left or not reserved.more_room:
                break
        return True

    def _reserve(self, blocks: Sequence[WriteBlock]) -> Reserved:
        new = [
            NewBlock(
                block.hash, block.parent, self._block_bytes, owner_digest(block.tenant), block.priority,
                _milliseconds(block.ttl_s),
            )
            for block in blocks
        ]  # fmt: skip
        try:
            return self._functions.reserve(new, RESERVATION_MS)
        except Unconfigured:
            self._functions.attach(self._capacity)
            return self._functions.reserve(new, RESERVATION_MS)

    def _put(self, blocks: Sequence[WriteBlock], fence: bytes, report: WriteReport) -> None:
        if not blocks:
            return
        written = self._payloads.put(
            [
                (
                    block.hash + fence,
                    frame_header(self._format, block.hash, block.parent, block.payload),
                    block.payload,
                )
                for block in blocks
            ]
        )
        there = [block.hash for block, ok in zip(blocks, written, strict=True) if ok]
        refused = [block.hash for block, ok in zip(blocks, written, strict=True) if not ok]
        committed = self._functions.commit(fence, there)
        late = [block for block, ok in zip(there, committed, strict=True) if not ok]
        # Nobody else's: the fence in their names is ours.
        unlink_payloads(self._redis, [block + fence for block in late], shard=self._shard)
        for block in there:
            report.outcomes[block] = Outcome.FAILED if block in late else Outcome.STORED
        if refused:
            self._drop(self._functions.abort(fence, refused))
            self._make_memory(len(refused) * self._block_bytes, report)

    def _make_memory(self, wanted: int, report: WriteReport) -> None:
        """Redis is full before the capacity is reached: it is set too high, or others use the same Redis."""
        self.count("out_of_memory")
        if self.counts()["out_of_memory"] == 1:
            log.warning("store %s: Redis is out of memory below the store's capacity", self._where)
        names, _, _ = self._functions.evict(max(0, self._functions.usage().total - wanted), "memory")
        report.dropped += [name[:HASH_BYTES] for name in names]
        self._drop(names)

    def _drop(self, names: Sequence[bytes]) -> None:
        if names:
            unlink_payloads(self._redis, names, shard=self._shard)
            self._functions.unlinked(names)


_OUTCOMES = {
    HAVE: Outcome.HAD,
    FOLLOW: Outcome.FOLLOWED,
    ORPHAN: Outcome.ORPHANED,
    NO_ROOM: Outcome.NO_ROOM,
}
_FOR_WANT_OF_ROOM = (Outcome.NO_ROOM, Outcome.ORPHANED)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(seconds * 1000))

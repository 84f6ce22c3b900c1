"""Writes behind: blocks on their way to the store, one thread, bounded in bytes.

    offer -> queue -> [thread] reserve -> payloads -> commit

The same thread keeps in touch with an idle store, so that nobody's request is the one to find out that it is
gone or has come back empty.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from services.cache_store.client import BlockStore, Outcome, WriteBlock
from services.cache_store.functions import ROOT
from services.cache_store.known import KnownBlocks
from services.worker.store_reader import tensor_bytes
from services.worker.tiers import OfferedBlock

log = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0  # how often to ask whether the store is there, still the same, and how full

#: With so much of the capacity in use the store counts as full: the service evicts from 85 % down to 80 %.
FULL = 0.78
_MOST_RETAINS = 256  # waiting to be told to the store
_JOIN_S = 5.0


class StoreWriter:
    """The thread that writes and the queue of at most `most_queued` blocks before it."""

    def __init__(
        self,
        store: BlockStore,
        known: KnownBlocks,
        most_queued: int,
        written: Callable[[Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        """`written` hears after each batch which of its blocks the store does not have, and which another
        writer is at."""
        self._most_queued = most_queued
        self._store = store
        self._known = known
        self._written = written
        self._work = threading.Condition()
        self._offers: deque[OfferedBlock] = deque()
        self._retains: deque[tuple[Sequence[bytes], str, int, float | None]] = deque(maxlen=_MOST_RETAINS)
        self._queued: set[bytes] = set()  # hashes offered and not written yet
        self._identity: bytes | None = None  # of the store's contents
        self._threshold = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="store-write", daemon=True)
        self._thread.start()

    @property
    def reached(self) -> bool:
        """Whether the store has ever answered."""
        return self._identity is not None

    @property
    def threshold(self) -> float:
        """See `StoreTier.threshold`."""
        return self._threshold

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        with self._work:
            taken = 0
            for block in blocks:
                if not self._room():
                    break
                taken += 1
                if not self._has(block.hash):
                    self._queued.add(block.hash)
                    self._offers.append(block)
            self._work.notify()
        return taken

    def wants(self, hashes: Sequence[bytes]) -> list[bool]:
        if self._store.is_down():
            return [False] * len(hashes)
        with self._work:
            room = self._room()
            wanted = []
            for block in hashes:
                wanted.append(room > 0 and not self._has(block))
                room -= wanted[-1]
        return wanted

    def room(self) -> int:
        """See `StoreTier.room`."""
        if self._store.is_down():
            return self._most_queued
        with self._work:
            return self._room()

    def retain(self, hashes: Sequence[bytes], priority: int, ttl_s: float | None, tenant: str) -> None:
        with self._work:
            self._retains.append((hashes, tenant, priority, ttl_s))
            self._work.notify()

    def stop(self) -> None:
        """Drop what is queued; the thread ends as soon as the store lets go of it."""
        with self._work:
            self._stopped = True
            self._offers.clear()
            self._work.notify()

    def join(self) -> None:
        self._thread.join(_JOIN_S)

    def _room(self) -> int:
        """Blocks that may be queued now."""
        return 0 if self._stopped else self._most_queued - len(self._queued)

    def _has(self, block: bytes) -> bool:
        return block in self._queued or block in self._known

    def _run(self) -> None:
        checked_s = -math.inf
        while True:
            with self._work:
                if not (self._stopped or self._offers or self._retains):
                    self._work.wait(max(0.0, checked_s + _HEARTBEAT_S - time.monotonic()))
                if self._stopped:
                    return
                retains = list(self._retains)
                self._retains.clear()
                batch = [self._offers.popleft() for _ in range(min(len(self._offers), self._store.batch))]
            try:
                if time.monotonic() - checked_s >= _HEARTBEAT_S:
                    checked_s = time.monotonic()
                    self._check()
                for retain in retains:
                    self._store.retain(*retain)
                self._write(batch)
            except Exception:  # a bug must cost these blocks, not all blocks to come
                log.exception("blocks were not written to the store")
            finally:
                with self._work:
                    self._queued.difference_update(block.hash for block in batch)

    def _check(self) -> None:
        identity = self._store.identity()
        if identity is None:
            return
        if self._identity is not None and identity != self._identity:
            self._known.clear()  # the store was emptied
        self._identity = identity
        margin = self._store.margin()
        if margin is not None:
            room = margin.total < FULL * margin.capacity
            self._threshold = 0.0 if room or margin.density is None else margin.density

    def _write(self, batch: Sequence[OfferedBlock]) -> None:
        report = self._store.write(
            [
                WriteBlock(
                    hash=block.hash,
                    parent=block.parent if block.depth else ROOT,
                    tenant=block.tenant,
                    priority=block.priority,
                    ttl_s=block.ttl_s,
                    payload=tensor_bytes(block.kv.payload),
                )
                for block in batch
            ]
        )
        self._known.discard(report.dropped)
        stored, elsewhere, unwritten, orphans = [], [], [], []
        for block in batch:
            outcome = report.outcomes.get(block.hash)
            if outcome in (Outcome.STORED, Outcome.HAD):
                stored.append(block.hash)
            elif outcome is Outcome.FOLLOWED:
                elsewhere.append(block.hash)
            else:
                unwritten.append(block.hash)
            if outcome is Outcome.ORPHANED:
                orphans.append(block.parent)  # not there, whatever we believed: wanted again
        self._known.add(stored)
        self._known.discard(orphans)
        self._written(unwritten, elsewhere)

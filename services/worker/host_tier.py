"""Host memory between the GPU and the shared store: blocks that leave the GPU come back from here at once.

    offer -> row given, victims chosen -> [thread] victims to the store, payload into the row
    load  -> rows into pages, on the step's stream; the store is asked only for what follows them

It is the `StoreTier` that the engine writes behind to, around the shared one or alone. What it holds and what
of that goes on to the store is decided by `host_index`; here are the bytes. All the memory is allocated at
the start, so that its size is exact. A row is not written again before whoever reads it is done: the engine
reads rows itself, and one thread writes them in the order of the engine's decisions, each after the device
has read it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from services.worker.block_copies import BlockCopies
from services.worker.host_index import HostBlock, HostIndex, Wish
from services.worker.tiers import EncodedBlock, Load, OfferedBlock, Outlook, StoreTier

log = logging.getLogger(__name__)

#: Of payloads that wait to be copied into their rows.
_MOST_WAITING_BYTES = 256 << 20

#: Pinned memory comes in powers of two: in pieces of this size nothing of it is lost.
_PIECE_BYTES = 1 << 30

_JOIN_S = 5.0


@dataclass(frozen=True)
class _Fill:
    """Copy a payload into the block's row."""

    block: HostBlock
    payload: torch.Tensor


@dataclass(frozen=True)
class _Give:
    """Offer what is in the block's row to the store."""

    block: HostBlock


class HostTier:
    """At most `capacity` bytes of blocks as `copies` encodes them. Used by the engine's thread; `close` it
    when the engine has stopped, `store` stays the caller's. Raises ValueError if not one block fits."""

    def __init__(
        self,
        capacity: int,
        copies: BlockCopies,
        store: StoreTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._copies = copies
        self._store = store
        self._clock = clock
        self._block_bytes = copies.shape.payload_bytes(copies.codec)
        self._rows = _rows(capacity, self._block_bytes, pinned=copies.on_gpu)
        self._index = HostIndex(len(self._rows))
        self._most_waiting = max(1, _MOST_WAITING_BYTES // self._block_bytes)
        self._waiting = 0  # fills, of which
        self._filled = 0  # so many are done
        self._reading: dict[int, torch.cuda.Event] = {}  # rows that the device reads until then
        self._counts: Counter[str] = Counter()
        self._jobs: SimpleQueue[_Fill | _Give | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="host-copy", daemon=True)
        self._thread.start()

    # ---- what host memory is for

    def held(self, hashes: Sequence[bytes]) -> int:
        """The leading blocks of `hashes` that `load` would bring."""
        return len(self._index.run(hashes))

    def load(self, hashes: Sequence[bytes], pages: Sequence[int]) -> int:
        """Put the leading blocks of `hashes` that are here into `pages`, one each, for the steps launched
        from now on. Returns how many."""
        blocks = self._index.run(hashes)
        if blocks:
            payloads = [EncodedBlock(self._copies.codec, self._rows[block.row]) for block in blocks]
            done = self._copies.write(pages[: len(blocks)], payloads)
            if done is not None:
                self._reading.update((block.row, done) for block in blocks)
            self._counts["loaded_blocks"] += len(blocks)
        return len(blocks)

    def use(self, hashes: Sequence[bytes]) -> None:
        """A request's prompt began with these blocks, wherever they were found: once a request."""
        blocks = self._index.use(hashes, self._now_ms())
        if blocks:
            self._give(blocks[-1])

    def give(self, hashes: Set[bytes]) -> None:
        """Have the store get those of these blocks that are here: another worker waits for them."""
        for block in self._index.held(hashes):
            self._give_path(block)

    def take_host_events(self) -> tuple[list[bytes], list[bytes]]:
        """(stored, removed) block hashes of host memory since the last call."""
        return self._index.take_events()

    def counts(self) -> dict[str, int]:
        """Counters since the start: kept_blocks, evicted_blocks, loaded_blocks, given_blocks (to the store),
        withheld_blocks (that left without it); any thread."""
        return dict(self._counts)

    @property
    def idle(self) -> bool:
        """Every block that was taken is in its row."""
        return self._waiting == self._filled

    # ---- the store behind it

    def start_load(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        first: bytes,
        most: int,
        outlook: Outlook | None = None,
    ) -> Load | None:
        if self._store is None:
            return None
        return self._store.start_load(hashes, recompute_s, tenant, first, most, outlook)

    @property
    def awaited(self) -> Set[bytes]:
        return self._store.awaited if self._store is not None else frozenset()

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        taken = 0
        for block in blocks:
            if not self._room():
                break
            taken += 1
            if block.hash not in self._index:
                self._keep(block)
        return taken

    def wants(self, hashes: Sequence[bytes], first: bytes) -> Sequence[bool]:
        room = self._room()
        wanted = []
        for hash in hashes:
            wanted.append(room > 0 and hash not in self._index)
            room -= wanted[-1]
        return wanted

    def server(self, first: bytes) -> int:
        return 0

    def room(self, server: int) -> int:
        return self._room()

    def threshold(self, first: bytes) -> float:
        return 0.0

    def retain(
        self, hashes: Sequence[bytes], priority: int, ttl_s: float | None, tenant: str, first: bytes
    ) -> None:
        self._index.retain(hashes, Wish(priority, ttl_s))
        if self._store is not None:
            self._store.retain(hashes, priority, ttl_s, tenant, first)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        return self._store.take_events() if self._store is not None else ([], [])

    def tokens_per_s(self) -> float:
        return self._store.tokens_per_s() if self._store is not None else 0.0

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(_JOIN_S)

    # ---- on the engine's thread

    def _room(self) -> int:
        return self._most_waiting - (self._waiting - self._filled)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _keep(self, offered: OfferedBlock) -> None:
        block, leaving = self._index.add(
            offered.hash,
            offered.parent,
            offered.first,
            offered.depth,
            offered.tenant,
            Wish(offered.priority, offered.ttl_s),
            self._now_ms(),
        )
        for victim, worth in leaving:
            self._counts["evicted_blocks"] += 1
            if self._store is not None and worth < self._store.threshold(victim.first):
                self._counts["withheld_blocks"] += 1
            else:
                self._give_path(victim)
        if block is None:
            return
        self._counts["kept_blocks"] += 1
        self._waiting += 1
        self._jobs.put(_Fill(block, offered.kv.payload))
        self._give(block)

    def _give(self, block: HostBlock) -> None:
        """Have the store get what it should have because of this block."""
        if self._store is not None:
            awaited = block.hash in self._store.awaited
            threshold = 0.0 if awaited else self._store.threshold(block.first)
            wanted = self._index.for_store(block, threshold)
            if wanted is not None:
                self._give_path(wanted)

    def _give_path(self, block: HostBlock) -> None:
        for needed in self._index.path(block, self._store_wants):
            self._jobs.put(_Give(needed))

    def _store_wants(self, block: HostBlock) -> bool:
        return self._store is not None and self._store.wants([block.hash], block.first)[0]

    # ---- on a thread of its own

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if isinstance(job, _Fill):
                    self._fill(job)
                else:
                    self._offer(job.block)
            except Exception:  # a bug must cost a block, not all blocks to come
                log.exception("a block was not copied")

    def _fill(self, job: _Fill) -> None:
        try:
            reading = self._reading.pop(job.block.row, None)
            if reading is not None:
                reading.synchronize()
            self._rows[job.block.row].copy_(job.payload)
            job.block.filled = True
        finally:
            self._filled += 1

    def _offer(self, block: HostBlock) -> None:
        if not block.filled or not self._store_wants(block):
            return  # it was given before, or the store has no room for it now
        assert self._store is not None
        taken = self._store.offer(
            [
                OfferedBlock(
                    hash=block.hash,
                    parent=block.parent,
                    first=block.first,
                    depth=block.depth,
                    kv=EncodedBlock(self._copies.codec, self._rows[block.row].clone()),
                    priority=block.wish.priority,
                    ttl_s=block.wish.ttl_s,
                    tenant=block.tenant,
                )
            ]
        )
        self._counts["given_blocks"] += taken


def _rows(capacity: int, block_bytes: int, *, pinned: bool) -> list[torch.Tensor]:
    """As many rows uint8 [block_bytes] as `capacity` bytes hold."""
    piece_bytes = capacity
    if pinned:
        piece_bytes = min(_PIECE_BYTES, 1 << (capacity.bit_length() - 1))
        piece_bytes = max(piece_bytes, 1 << (block_bytes - 1).bit_length())
    count = capacity // piece_bytes
    rows_each = piece_bytes // block_bytes
    if not count or not rows_each:
        raise ValueError(f"host_bytes must hold at least one block of {block_bytes} B, got {capacity}")
    pieces = [torch.empty(rows_each, block_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
    return [row for piece in pieces for row in piece]

"""Which block leaves a tier first: lowest effective priority, then least recently used, leaves only.

One object serves one tier: it knows blocks by hash, never by their place, and hears the time from its caller.

    effective priority   the highest priority that any use granted and that is still live; the default when
                         none is. A use grants its priority for good, or until nobody has used the block for
                         `ttl_s` seconds.
    never demoted        a later use with a lower priority adds a grant and takes none away; a use without a
                         time to live does not make a limited grant last.
    leaf first           a block goes only when no block of the tier continues it, for what hangs below a
                         missing block can never be hit.
    recency              the order of `release`; release a prefix from its tail, so that tails are older.

Every call is O(1) but for heap operations, O(log blocks).
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count

from services.wire.messages import DEFAULT_PRIORITY

#: Stale heap entries are dropped lazily, and swept once they outnumber the blocks by this factor.
_SWEEP_FACTOR = 2
_SWEEP_FLOOR = 64


class _Block:
    __slots__ = ("children", "hash", "held", "lasting", "limited", "parent", "queued", "released_s", "stamp")

    def __init__(self, hash: bytes, parent: _Block | None) -> None:
        self.hash = hash
        self.parent = parent
        self.children = 0  # blocks of this tier that continue it
        self.held = True
        self.released_s = 0.0
        self.stamp = 0  # place in the order of release
        self.queued = 0  # effective priority under which it waits for eviction
        self.lasting = -1  # highest priority granted for good; -1 = none
        self.limited: dict[int, float] = {}  # priority granted for a time -> seconds after the last use

    @property
    def evictable(self) -> bool:
        return not self.held and not self.children

    def effective_priority(self, now: float) -> int:
        best = self.lasting
        for priority, ttl_s in self.limited.items():
            if priority > best and self.released_s + ttl_s > now:
                best = priority
        return DEFAULT_PRIORITY if best < 0 else best


class EvictionPolicy:
    """Eviction order of the blocks of one tier. A block is held (in use) or released (may be evicted)."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, _Block] = {}
        self._queue: list[tuple[int, int, bytes]] = []  # heap of (effective priority, stamp, hash)
        self._expiries: list[tuple[float, int, bytes]] = []  # heap of (end of a grant, stamp, hash)
        self._stamps = count(1)

    def __len__(self) -> int:
        return len(self._blocks)

    def insert(self, hash: bytes, parent: bytes) -> None:
        """A block enters the tier, held. `parent` may be unknown here: the root, or lost."""
        above = self._blocks.get(parent)
        if above is not None:
            above.children += 1
        self._blocks[hash] = _Block(hash, above)

    def grant(self, hash: bytes, priority: int, ttl_s: float | None) -> None:
        """A user of a held block wants it kept with `priority`, for good or `ttl_s` seconds after use."""
        block = self._blocks[hash]
        if ttl_s is None:
            block.lasting = max(block.lasting, priority)
        else:
            block.limited[priority] = max(block.limited.get(priority, 0.0), ttl_s)

    def hold(self, hash: bytes, now: float) -> None:
        """A released block is used again; grants that ended before stay ended."""
        block = self._blocks[hash]
        if block.limited:
            block.limited = {p: ttl_s for p, ttl_s in block.limited.items() if block.released_s + ttl_s > now}
        block.held = True

    def release(self, hash: bytes, now: float) -> None:
        """The last user is gone: the block may be evicted, as the most recently used one."""
        block = self._blocks[hash]
        block.held = False
        block.released_s = now
        block.stamp = next(self._stamps)
        if block.evictable:
            self._enqueue(block, now)

    def evict(self, now: float) -> bytes | None:
        """Remove and return the block to lose first; None when every block is in use."""
        self._requeue_expired(now)
        while self._queue:
            priority, stamp, hash = heappop(self._queue)
            block = self._waiting(hash, stamp)
            if block is not None and block.queued == priority:
                self._forget(block, now)
                return hash
        return None

    def remove(self, hash: bytes, now: float) -> None:
        """A block leaves the tier for another reason than eviction."""
        self._forget(self._blocks[hash], now)

    def _waiting(self, hash: bytes, stamp: int) -> _Block | None:
        """The block of a heap entry, None if the entry is stale."""
        block = self._blocks.get(hash)
        return block if block is not None and block.stamp == stamp and block.evictable else None

    def _forget(self, block: _Block, now: float) -> None:
        del self._blocks[block.hash]
        above = block.parent
        if above is None:
            return
        above.children -= 1
        if above.evictable and self._blocks.get(above.hash) is above:
            self._enqueue(above, now)

    def _enqueue(self, block: _Block, now: float) -> None:
        block.queued = block.effective_priority(now)
        heappush(self._queue, (block.queued, block.stamp, block.hash))
        for ttl_s in block.limited.values():
            heappush(self._expiries, (block.released_s + ttl_s, block.stamp, block.hash))
        if len(self._queue) > _SWEEP_FACTOR * len(self._blocks) + _SWEEP_FLOOR:
            self._sweep()

    def _requeue_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, stamp, hash = heappop(self._expiries)
            block = self._waiting(hash, stamp)
            if block is not None and block.queued != (priority := block.effective_priority(now)):
                block.queued = priority
                heappush(self._queue, (priority, stamp, hash))

    def _sweep(self) -> None:
        waiting = [block for block in self._blocks.values() if block.evictable]
        self._queue = [(block.queued, block.stamp, block.hash) for block in waiting]
        self._expiries = [
            (block.released_s + ttl_s, block.stamp, block.hash)
            for block in waiting
            for ttl_s in block.limited.values()
        ]
        heapify(self._queue)
        heapify(self._expiries)

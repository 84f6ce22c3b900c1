"""The store's eviction policy without a store: the order in which `functions.lua` evicts, in plain Python.

Leaf first: a block goes only when no stored block continues it. Leaves wait in one queue a class, the least
recently used at its head; the victim is the head with the least density for its age (`worth`). Blocks that
left are remembered as ghosts: a block that comes back goes on counting its uses where it left off, and its
return is a hit of the class it had, for which more room would have been needed.

The same calls at the same times leave the same blocks in Redis (tests/cache_store/test_eviction.py). Ids are
numbers or bytes; equal ranks go by id. Times are ms and never fall. Room is counted in blocks:
leases, tenants and bytes are the functions' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Generic, TypeVar

from services.cache_store.worth import (
    AGES,
    GHOST_LIFE_MS,
    GHOSTS_AT_LEAST,
    GHOSTS_PER_BLOCK,
    MAX_USES,
    Events,
    History,
    Weights,
    age_bucket,
    value_class,
)

DEFAULT_TIER = 1

#: Ghosts that die in a call at most, so that a call's time is bounded; more than a call can make.
MAX_DEATHS = 128


Id = TypeVar("Id", int, bytes)


class _Block(Generic[Id]):
    __slots__ = ("children", "id", "last", "parent", "tier", "uses")

    def __init__(self, id: Id, parent: _Block[Id] | None, tier: int, uses: int, last: int) -> None:
        self.id: Id = id
        self.parent: _Block[Id] | None = parent
        self.children = 0
        self.tier = tier
        self.uses = uses
        self.last = last


class ValuePolicy(Generic[Id]):
    """A store of `capacity` blocks. `history` None never learns: plain LRU, leaf first. `on_evict` hears of
    every block that leaves, and what it was worth: hits a second of room, 0 while nothing is learned."""

    def __init__(
        self, capacity: int, history: History | None, on_evict: Callable[[Id, float], None] | None = None
    ) -> None:
        self._capacity = capacity
        self._history = history
        self._on_evict: Callable[[Id, float], None] | None = on_evict
        self._weights: Weights | None = None
        self._events = Events()
        self._blocks: dict[Id, _Block[Id]] = {}
        self._queues: dict[int, list[tuple[int, Id]]] = {}  # class -> heap of (last use, id), some stale
        self._ghosts: dict[Id, tuple[int, int, int]] = {}  # id -> last use, tier, uses
        self._dying: list[tuple[int, int, int, Id]] = []  # heap of (last use, tier, uses, id), some stale

    def __contains__(self, id: Id) -> bool:
        return id in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def uses(self, id: Id) -> int:
        """Of a stored block, those before an eviction included."""
        return self._blocks[id].uses

    def lookup(self, ids: Sequence[Id], now: int) -> int:
        """Length of the leading run that is stored, which this use refreshes."""
        self._events.lookups += 1
        found = 0
        block = None
        for id in ids:
            next_block = self._blocks.get(id)
            if next_block is None:
                break
            block = next_block
            found += 1
            self._use(block, now)
        if block is not None:
            self._enqueue(block)
        return found

    def retain(self, ids: Sequence[Id], tier: int) -> None:
        """Stored blocks are wanted as this tier from now on."""
        for id in ids:
            block = self._blocks[id]
            if block.tier != tier:
                block.tier = tier
                self._enqueue(block)

    def write(self, ids: Sequence[Id], parent: Id | None, now: int, tier: int = DEFAULT_TIER) -> int:
        """Store a run of blocks that continues `parent`, evicting what is worth least. Returns how many were
        stored: none of a run's own prefix is evicted for it."""
        self._bury(now)
        above = None if parent is None else self._blocks[parent]
        written = 0
        for id in ids:
            known = self._blocks.get(id)
            if known is not None:
                self._use(known, now)
                known.tier = tier
            else:
                if above is not None:
                    above.children += 1
                while len(self._blocks) >= self._capacity:
                    if not self._evict(now):
                        if above is not None:
                            above.children -= 1
                            self._enqueue(above)
                        return written
                known = self._blocks[id] = _Block(id, above, tier, 1 + self._remembered(id, now), now)
            above = known
            written += 1
        if above is not None:
            self._enqueue(above)
        return written

    def margin(self, now: int) -> float:
        """What the next block to go is worth; 0 while there is room or nothing is learned."""
        if len(self._blocks) < self._capacity:
            return 0.0
        best = self._least(now)
        return best[0] if best else 0.0

    def fold(self) -> None:
        """Learn from what has happened since the last fold."""
        if self._history is not None:
            self._weights = self._history.fold(self._events)
            self._events = Events()

    # ---- inside

    def _use(self, block: _Block, now: int) -> None:
        self._count(self._events.hits, block.tier, block.uses, now - block.last)
        block.uses = min(MAX_USES, block.uses + 1)
        block.last = now

    def _count(self, counts: dict[tuple[int, int], float], tier: int, uses: int, age_ms: int) -> None:
        event = value_class(tier, uses), age_bucket(age_ms)
        counts[event] = counts.get(event, 0) + 1

    def _enqueue(self, block: _Block[Id]) -> None:
        if not block.children:
            queue = self._queues.setdefault(value_class(block.tier, block.uses), [])
            heappush(queue, (block.last, block.id))

    def _least(self, now: int) -> tuple[float, int, Id] | None:
        """Worth, last use and id of the leaf to lose first."""
        best: tuple[float, int, Id] | None = None
        density = self._weights.density if self._weights else None
        for c, queue in self._queues.items():
            while queue and not self._waits(c, *queue[0]):
                heappop(queue)
            if queue:
                last, id = queue[0]
                worth = density[c * AGES + age_bucket(now - last)] if density else 0.0
                if best is None or (worth, last, id) < best:
                    best = worth, last, id
        return best

    def _evict(self, now: int) -> bool:
        best = self._least(now)
        if best is None:
            return False
        block = self._blocks.pop(best[2])
        self._ghosts[block.id] = block.last, block.tier, block.uses
        heappush(self._dying, (block.last, block.tier, block.uses, block.id))
        above = block.parent
        if above is not None:
            above.children -= 1
            above.last = max(above.last, block.last)
            self._enqueue(above)
        if self._on_evict is not None:
            self._on_evict(block.id, best[0])
        return True

    def _waits(self, c: int, last: int, id: Id) -> bool:
        """Whether an entry of a queue still says how things are."""
        block = self._blocks.get(id)
        return (
            block is not None
            and block.last == last
            and not block.children
            and value_class(block.tier, block.uses) == c
        )

    def _remembered(self, id: Id, now: int) -> int:
        """Uses before the eviction of a block that comes back."""
        ghost = self._ghosts.pop(id, None)
        if ghost is None:
            return 0
        last, tier, uses = ghost
        if now - last > GHOST_LIFE_MS:
            self._count(self._events.deaths, tier, uses, now - last)
            return 0
        self._count(self._events.hits, tier, uses, now - last)
        return min(MAX_USES - 1, uses)

    def _bury(self, now: int) -> None:
        """Ghosts that are too old, or too many, die: their blocks were not used again."""
        room = GHOSTS_PER_BLOCK * len(self._blocks) + GHOSTS_AT_LEAST
        for _ in range(MAX_DEATHS):
            while self._dying and self._ghosts.get(self._dying[0][3]) != self._dying[0][:3]:
                heappop(self._dying)
            if not self._dying or (now - self._dying[0][0] <= GHOST_LIFE_MS and len(self._ghosts) <= room):
                return
            last, tier, uses, id = heappop(self._dying)
            del self._ghosts[id]
            self._count(self._events.deaths, tier, uses, now - last)

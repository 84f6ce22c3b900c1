"""What a worker's host memory holds, what goes when it is full, and what of it the store should have.

Rows of memory are given to blocks by the store's own policy (services.cache_store.eviction): leaf first, the
least learned worth first, uses remembered beyond eviction. Pure: no clock, no tensor; times are ms.

A block crosses the link to the store when there is a reason for it, and waits here until then:
    room       the store is not full (its threshold is 0)
    awaited    another worker waits for it now (flight.py)
    asked for  its request wants it kept longer than by default
    shared     two different blocks continue it: a prompt of many, which others may ask another worker for
    leaving    it goes from here and is worth more than what would go for it in the store
With a block go those before it: the store takes none without its parent. To be used again is no reason: while
a block is here its users are sent here, and a copy that nobody uses leaves the store. Without host memory
nothing is held back, for what is not written at first sight is gone. (`python -m benchmarks.admission`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from services.cache_store.eviction import ValuePolicy
from services.cache_store.worth import History, tier
from services.wire.messages import DEFAULT_PRIORITY

#: Weights are learned anew every so many requests, as the store's service does it; half a millisecond.
LEARN_EVERY = 200


@dataclass(frozen=True)
class Wish:
    """How a request wants a block kept."""

    priority: int
    ttl_s: float | None


@dataclass
class HostBlock:
    """A block in row `row`."""

    hash: bytes
    parent: bytes
    first: bytes
    depth: int
    tenant: str
    wish: Wish
    row: int
    filled: bool = False  # its payload is in the row; set by whoever copies it there
    continuations: int = 0  # different blocks that have come after it


class HostIndex:
    """`rows` rows of memory. A block is kept only while all blocks before it are."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._policy: ValuePolicy[bytes] = ValuePolicy(rows, History(), self._evicted)
        self._blocks: dict[bytes, HostBlock] = {}
        self._free = list(range(rows - 1, -1, -1))
        self._leaving: list[tuple[HostBlock, float]] = []
        self._requests = 0
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def __contains__(self, hash: bytes) -> bool:
        return hash in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def run(self, hashes: Sequence[bytes]) -> list[HostBlock]:
        """The leading blocks of `hashes` whose payloads are here."""
        found: list[HostBlock] = []
        for hash in hashes:
            block = self._blocks.get(hash)
            if block is None or not block.filled:
                break
            found.append(block)
        return found

    def held(self, hashes: Iterable[bytes]) -> list[HostBlock]:
        """Those of these blocks that are here, each behind those before it in its prefix."""
        blocks = (self._blocks.get(hash) for hash in hashes)
        return sorted((block for block in blocks if block is not None), key=attrgetter("depth"))

    def add(
        self, hash: bytes, parent: bytes, first: bytes, depth: int, tenant: str, wish: Wish, now_ms: int
    ) -> tuple[HostBlock | None, list[tuple[HostBlock, float]]]:
        """Give a new block a row. Returns it, None if it may have none: its parent is not here, or everything
        else is its own prefix; and the blocks that had to go, with what they were worth."""
        if depth and parent not in self._blocks:
            return None, []
        kept = self._policy.write([hash], parent if depth else None, now_ms, tier(wish.priority))
        leaving, self._leaving = self._leaving, []
        if not kept:
            return None, leaving
        block = self._blocks[hash] = HostBlock(hash, parent, first, depth, tenant, wish, self._free.pop())
        if depth:
            self._blocks[parent].continuations += 1
        _note(hash, self._stored, self._removed)
        return block, leaving

    def use(self, hashes: Sequence[bytes], now_ms: int) -> list[HostBlock]:
        """A request's prompt began with these blocks, wherever they were. Returns those that are here."""
        if self._requests % LEARN_EVERY == 0:
            self._policy.fold()
        self._requests += 1
        found = self._policy.lookup(hashes, now_ms)
        return [self._blocks[hash] for hash in hashes[:found]]

    def retain(self, hashes: Sequence[bytes], wish: Wish) -> None:
        """A request wants these kept like this; a wish for less changes nothing."""
        for hash in hashes:
            block = self._blocks.get(hash)
            if block is not None and wish.priority > block.wish.priority:
                block.wish = wish
                self._policy.retain([hash], tier(wish.priority))

    def for_store(self, block: HostBlock, threshold: float) -> HostBlock | None:
        """What the store should have now that a request brought or used `block`: it, the one before it, or
        none."""
        if not threshold or block.wish.priority > DEFAULT_PRIORITY:
            return block
        above = self._blocks.get(block.parent) if block.depth else None
        return above if above is not None and above.continuations > 1 else None

    def path(self, block: HostBlock, wanted: Callable[[HostBlock], bool]) -> list[HostBlock]:
        """What to give to the store for `block`, the first block first: it, and those right before it that
        the store wants too."""
        path = []
        at: HostBlock | None = block
        while at is not None and wanted(at):
            path.append(at)
            at = self._blocks.get(at.parent) if at.depth else None
        return path[::-1]

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """(stored, removed) since the last call; no block is in both."""
        events = list(self._stored), list(self._removed)
        self._stored, self._removed = {}, {}
        return events

    def _evicted(self, hash: bytes, worth: float) -> None:
        block = self._blocks.pop(hash)
        self._free.append(block.row)
        self._leaving.append((block, worth))
        _note(hash, self._removed, self._stored)


def _note(hash: bytes, event: dict[bytes, None], opposite: dict[bytes, None]) -> None:
    if hash in opposite:
        del opposite[hash]  # nobody has heard of it yet
    else:
        event[hash] = None

"""What `benchmarks.eviction` compares: our policy, and the usual ones, on a store of blocks of one size.

All answer one question, how many leading blocks of a request are stored, and then store all of the request.
Ours and those called leaf-first never evict a block that a stored one continues.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Protocol

from benchmarks.eviction_workloads import Request
from services.cache_store.eviction import DEFAULT_TIER, ValuePolicy
from services.cache_store.worth import History, tier

#: What a hint asks for: 80 if the request is said to be continued, 20 if not.
SAID_TO_BE_CONTINUED, SAID_TO_BE_LAST = 80, 20

LEARN_EVERY = 200  # requests

#: How long a static priority lasts after it was last asked for.
STATIC_TTL_MS = 600_000


class Policy(Protocol):
    def request(self, request: Request, hint: bool | None) -> int:
        """The leading blocks that were stored. Stores all."""


def asked_priority(hint: bool) -> int:
    return SAID_TO_BE_CONTINUED if hint else SAID_TO_BE_LAST


def replay(policy: Policy, requests: Sequence[Request], said: Sequence[bool] | None) -> float:
    """Share of all blocks asked for that were found, as prefixes."""
    hit = asked = 0
    for number, request in enumerate(requests):
        hit += policy.request(request, None if said is None else said[number])
        asked += len(request.ids)
    return hit / asked


class Ours:
    """The store's policy; it learns every 200 requests."""

    def __init__(self, capacity: int) -> None:
        self._policy = ValuePolicy(capacity, History())
        self._requests = 0

    def request(self, request: Request, hint: bool | None) -> int:
        policy, ids, now = self._policy, request.ids, request.at_ms
        if self._requests % LEARN_EVERY == 0:
            policy.fold()
        self._requests += 1
        found = policy.lookup(ids, now)
        wanted = DEFAULT_TIER
        if hint is not None:
            wanted = tier(asked_priority(hint))
            policy.retain(ids[:found], wanted)
        policy.write(ids[found:], ids[found - 1] if found else None, now, wanted)
        return found

    def __len__(self) -> int:
        return len(self._policy)

    def margin(self, now: int) -> float:
        """What the next block to go is worth."""
        return self._policy.margin(now)


class _Block:
    __slots__ = ("children", "high_until", "key", "last", "parent", "uses")

    def __init__(self, parent: int | None) -> None:
        self.parent = parent
        self.children = 0
        self.uses = 0
        self.last = 0
        self.high_until = -1
        self.key: tuple[int, int] = (0, 0)  # under which it waits


class LeafFirst:
    """Evicts the leaf with the least (`_rank`, last use): by itself, the least recently used."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: dict[int, _Block] = {}
        self._heap: list[tuple[tuple[int, int], int]] = []

    def request(self, request: Request, hint: bool | None) -> int:
        ids, blocks, now = request.ids, self._blocks, request.at_ms
        found = 0
        while found < len(ids) and ids[found] in blocks:
            found += 1
        parent: int | None = None
        for id in ids:
            block = blocks.get(id)
            if block is None:
                if parent is not None:
                    blocks[parent].children += 1
                while len(blocks) >= self._capacity:
                    if not self._evict(now):  # the request is as long as the store
                        if parent is not None:
                            blocks[parent].children -= 1
                            self._enqueue(parent, now)
                        return found
                block = blocks[id] = _Block(parent)
            self._use(id, block, now, hint)
            parent = id
        assert parent is not None
        self._enqueue(parent, now)
        return found

    def _use(self, id: int, block: _Block, now: int, hint: bool | None) -> None:
        block.uses += 1
        block.last = now

    def _rank(self, block: _Block, now: int) -> int:
        return 0

    def _enqueue(self, id: int, now: int) -> None:
        block = self._blocks[id]
        if not block.children:
            block.key = self._rank(block, now), block.last
            heappush(self._heap, (block.key, id))

    def _evict(self, now: int) -> bool:
        while self._heap:
            key, id = heappop(self._heap)
            block = self._blocks.get(id)
            if block is None or block.children or block.key != key or block.last != key[1]:
                continue
            del self._blocks[id]
            if block.parent is not None:
                parent = self._blocks[block.parent]
                parent.children -= 1
                self._enqueue(block.parent, now)
            return True
        return False


class LeastFrequent(LeafFirst):
    """LFU: uses since the block was stored, then last use."""

    def _rank(self, block: _Block, now: int) -> int:
        return block.uses


class StaticPriorities(LeafFirst):
    """Two levels, strictly: what was said to be continued within the last 10 minutes goes last."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ends: list[tuple[int, int]] = []

    def _use(self, id: int, block: _Block, now: int, hint: bool | None) -> None:
        super()._use(id, block, now, hint)
        if hint:
            block.high_until = now + STATIC_TTL_MS
            heappush(self._ends, (block.high_until, id))

    def _rank(self, block: _Block, now: int) -> int:
        return int(block.high_until > now)

    def _evict(self, now: int) -> bool:
        while self._ends and self._ends[0][0] <= now:
            until, id = heappop(self._ends)
            block = self._blocks.get(id)
            if block is not None and block.high_until == until:
                self._enqueue(id, now)
        return super()._evict(now)


class S3Fifo:
    """S3-FIFO (SOSP'23) over single blocks: a small queue of a tenth, a main one, ghosts as many as that."""

    def __init__(self, capacity: int) -> None:
        self._small_capacity = max(1, capacity // 10)
        self._capacity = capacity
        self._uses: dict[int, int] = {}
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def request(self, request: Request, hint: bool | None) -> int:
        found = 0
        while found < len(request.ids) and request.ids[found] in self._uses:
            found += 1
        for id in request.ids:
            if id in self._uses:
                self._uses[id] = min(3, self._uses[id] + 1)
                continue
            while len(self._uses) >= self._capacity:
                self._evict()
            (self._main if id in self._ghosts else self._small).append(id)
            self._ghosts.pop(id, None)
            self._uses[id] = 0
        return found

    def _evict(self) -> None:
        if len(self._small) >= self._small_capacity or not self._main:
            id = self._small.popleft()
            if self._uses[id] > 1:
                self._uses[id] = 0
                self._main.append(id)
                return
            self._ghosts[id] = None
            if len(self._ghosts) > self._capacity - self._small_capacity:
                self._ghosts.popitem(last=False)
        else:
            id = self._main.popleft()
            if self._uses[id]:
                self._uses[id] -= 1
                self._main.append(id)
                return
        del self._uses[id]


class Belady:
    """Knows the future: stores only what is used again, evicts what is used again last. Not leaf-first, so no
    leaf-first policy can be better."""

    def __init__(self, capacity: int, requests: Sequence[Request]) -> None:
        self._capacity = capacity
        self._stored: dict[int, int] = {}  # id -> number of its next request
        self._heap: list[tuple[int, int, int]] = []
        self._next: list[list[int | None]] = []
        self._number = 0
        coming: dict[int, int] = {}
        for number in range(len(requests) - 1, -1, -1):
            self._next.append([coming.get(id) for id in requests[number].ids])
            coming.update(dict.fromkeys(requests[number].ids, number))
        self._next.reverse()

    def request(self, request: Request, hint: bool | None) -> int:
        stored = self._stored
        found = 0
        while found < len(request.ids) and request.ids[found] in stored:
            found += 1
        for depth, (id, following) in enumerate(zip(request.ids, self._next[self._number], strict=True)):
            if following is None:
                stored.pop(id, None)
            else:
                stored[id] = following
                heappush(self._heap, (-following, -depth, id))
        self._number += 1
        while len(stored) > self._capacity:
            following, _, id = heappop(self._heap)
            if stored.get(id) == -following:
                del stored[id]
        return found

"""The store's metadata as a plain slow model: every rule written as its definition, nothing kept that can be
derived. Where the order leaves a choice (equal priority and last use) it follows the server and checks that
the server's choice was allowed."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.cache_store.functions import ROOT, NewBlock, Reserved
from services.wire.messages import DEFAULT_PRIORITY, MAX_PRIORITY

WRITING, READY, LOST = 0, 1, 2
MAX_RETENTIONS = 8
NEVER = 2**48 - 1


@dataclass
class Retention:
    ttl: int
    expires: int


@dataclass
class Block:
    hash: bytes
    parent: bytes
    owner: bytes
    state: int = WRITING
    size: int = 0
    fence: bytes = b""
    deadline: int = 0
    last: int = 0
    lease: int = 0
    readers: int = 0
    held: bool = False
    retentions: dict[tuple[bytes, int], Retention] = field(default_factory=dict)

    @property
    def name(self) -> bytes:
        return self.hash + self.fence


class Oracle:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.now = 0
        self.blocks: dict[bytes, Block] = {}
        self.dropped: set[bytes] = set()

    # ---- definitions

    def children(self, block: Block) -> list[Block]:
        return [other for other in self.blocks.values() if other.parent == block.hash]

    def is_leaf(self, block: Block) -> bool:
        return block.state == READY and not self.children(block)

    def total(self) -> int:
        return sum(block.size for block in self.blocks.values())

    def priority(self, block: Block) -> int:
        live = [priority for (_, priority), kept in block.retentions.items() if kept.expires > self.now]
        if block.held or not live:
            live.append(DEFAULT_PRIORITY)
        return max(live)

    def overdue(self, block: Block) -> bool:
        """Whether a retention has ended that the server may not have settled yet."""
        return any(kept.expires <= self.now for kept in block.retentions.values())

    def rank(self, block: Block) -> tuple[int, int]:
        return self.priority(block), block.last

    def victims(self, max_priority: int) -> list[Block]:
        """The leaves that may go next: more than one only if they rank alike."""
        leaves = [
            block
            for block in self.blocks.values()
            if self.is_leaf(block) and block.lease <= self.now and self.priority(block) <= max_priority
        ]
        return [block for block in leaves if self.rank(block) == min(map(self.rank, leaves))]

    # ---- changes

    def touch(self, block: Block) -> None:
        """A use of a block is a use of every block before it."""
        at: Block | None = block
        while at is not None:
            at.last = max(at.last, self.now)
            at = self.blocks.get(at.parent)

    def remove(self, block: Block) -> None:
        if block.state != LOST:
            self.dropped.add(block.name)
        if self.children(block):
            block.state, block.size, block.fence, block.lease, block.readers = LOST, 0, bytes(7), 0, 0
            return
        del self.blocks[block.hash]
        parent = self.blocks.get(block.parent)
        if parent is not None and parent.state == LOST and not self.children(parent):
            self.remove(parent)

    def retain_block(self, block: Block, owner: bytes, priority: int, ttl: int | None) -> None:
        if priority == DEFAULT_PRIORITY and ttl is None:
            if block.held:
                return
            block.held = True
        else:
            kept = block.retentions.get((owner, priority))
            if kept is None or kept.expires <= self.now:
                kept = block.retentions[owner, priority] = Retention(0, 0)
            ttl = NEVER if ttl is None else ttl
            kept.ttl = max(kept.ttl, ttl)
            kept.expires = max(kept.expires, NEVER if ttl == NEVER else self.now + ttl)
        self.settle(block)

    def settle(self, block: Block) -> None:
        live = [(key, kept) for key, kept in block.retentions.items() if kept.expires > self.now]
        live.sort(key=lambda item: (-item[0][1], -item[1].expires, item[0][0]))
        block.retentions = dict(live[:MAX_RETENTIONS])

    def settle_due(self) -> None:
        for block in self.blocks.values():
            if self.overdue(block):
                self.settle(block)

    def reap(self) -> None:
        due = [b.hash for b in self.blocks.values() if b.state == WRITING and b.deadline <= self.now]
        for hash_ in due:
            self.remove(self.blocks[hash_])

    # ---- the functions

    def upkeep(self) -> None:
        self.reap()
        self.settle_due()

    def run(self, hashes: list[bytes]) -> list[Block]:
        """The leading READY blocks."""
        found = []
        for hash_ in hashes:
            block = self.blocks.get(hash_)
            if block is None or block.state != READY:
                break
            found.append(block)
        return found

    def lookup(self, hashes: list[bytes], owner: bytes, lease_ms: int) -> list[bytes]:
        found = self.run(hashes)
        for block in found:
            for (holder, _), kept in block.retentions.items():
                if holder == owner and kept.expires > self.now and kept.ttl < NEVER:
                    kept.expires = max(kept.expires, self.now + kept.ttl)
            self.settle(block)
        if found:
            deepest = found[-1]
            self.touch(deepest)
            if lease_ms:
                deepest.readers = 1 if deepest.lease <= self.now else deepest.readers + 1
                deepest.lease = max(deepest.lease, self.now + lease_ms)
        return [block.fence for block in found]

    def release(self, hash_: bytes, fence: bytes) -> None:
        block = self.blocks.get(hash_)
        if block is not None and block.fence == fence and block.readers and block.lease > self.now:
            block.readers -= 1
            if block.readers == 0:
                block.lease = 0

    def reserve(self, blocks: list[NewBlock], life_ms: int, reply: Reserved) -> list[str]:
        """Expected statuses; `reply.dropped` decides between victims of equal rank."""
        already = set(self.dropped)
        self.upkeep()
        evicted = [name for name in reply.dropped if name not in self.dropped - already]
        return [self.reserve_block(block, life_ms, reply.fence, evicted) for block in blocks]

    def reserve_block(self, new: NewBlock, life_ms: int, fence: bytes, evicted: list[bytes]) -> str:
        known = self.blocks.get(new.hash)
        if known is not None and known.state in (READY, WRITING):
            if known.state == READY:
                self.touch(known)
            self.retain_block(known, new.owner, new.priority, new.ttl_ms)
            return "H" if known.state == READY else "F"
        if known is None:
            if new.parent != ROOT and new.parent not in self.blocks:
                return "O"
            known = self.blocks[new.hash] = Block(new.hash, new.parent, new.owner)
        known.state, known.owner, known.fence = WRITING, new.owner, fence
        known.deadline, known.lease, known.readers = self.now + life_ms, 0, 0
        while self.total() + new.size > self.capacity:
            allowed = {block.name: block for block in self.victims(new.priority)}
            if not allowed:
                assert evicted.pop(0) == known.name
                self.remove(known)
                return "N"
            victim = evicted.pop(0)
            assert victim in allowed, "the server evicted a block out of order"
            self.remove(allowed[victim])
        known.size = new.size
        self.touch(known)
        self.retain_block(known, new.owner, new.priority, new.ttl_ms)
        return "W"

    def commit(self, fence: bytes, hashes: list[bytes]) -> list[bool]:
        done = []
        for hash_ in hashes:
            block = self.blocks.get(hash_)
            mine = block is not None and block.fence == fence and block.state != LOST
            if mine and block.state == WRITING:
                block.state = READY
                self.touch(block)
            done.append(mine)
        return done

    def abort(self, fence: bytes, hashes: list[bytes]) -> None:
        for hash_ in hashes:
            block = self.blocks.get(hash_)
            if block is not None and block.state == WRITING and block.fence == fence:
                self.remove(block)

    def quarantine(self, hash_: bytes, fence: bytes) -> None:
        block = self.blocks.get(hash_)
        if block is not None and block.state == READY and block.fence == fence:
            self.remove(block)

    def retain(self, hashes: list[bytes], owner: bytes, priority: int, ttl: int | None) -> int:
        known = [self.blocks[hash_] for hash_ in hashes if hash_ in self.blocks]
        for block in known:
            self.retain_block(block, owner, priority, ttl)
        return len(known)

    def evict(self, target: int, dropped: list[bytes]) -> None:
        already = set(self.dropped)
        self.upkeep()
        for name in [name for name in dropped if name not in self.dropped - already]:
            allowed = {block.name: block for block in self.victims(MAX_PRIORITY)}
            assert name in allowed, "the server evicted a block out of order"
            assert self.total() > target, "the server evicted more than it was asked to"
            self.remove(allowed[name])
        assert self.total() <= target or not self.victims(MAX_PRIORITY)

"""The store's metadata as a plain slow model: every rule written as its definition, nothing kept that can be
derived."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from services.cache_store.functions import PINNED, ROOT, NewBlock, Reserved
from services.cache_store.worth import (
    AGES,
    GHOST_LIFE_MS,
    MAX_USES,
    Weights,
    age_bucket,
    tier,
    value_class,
)
from services.wire.messages import DEFAULT_PRIORITY, MAX_PRIORITY

WRITING, READY, LOST = 0, 1, 2
MAX_RETENTIONS = 8
NEVER = 2**48 - 1
WEIGHTS_LIFE, LOST_LIFE, PAUSE = 600_000, 600_000, 1000


@dataclass
class Retention:
    ttl: int
    expires: int
    superseded: bool = False  # its owner has asked for something else since


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
    look_again: int = 0  # when it may be tried once more, for a leaf that could not go when it was its turn
    uses: int = 0
    lease: int = 0
    readers: int = 0
    held: bool = False
    condemned: bool = False
    waits_until: int = 0  # of a LOST block: what follows it goes then
    retentions: dict[tuple[bytes, int], Retention] = field(default_factory=dict)

    @property
    def queued(self) -> int:
        return self.look_again or self.last

    @property
    def name(self) -> bytes:
        return self.hash + self.fence


class Oracle:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.now = 0
        self.blocks: dict[bytes, Block] = {}
        self.dropped: set[bytes] = set()
        self.weights: Weights | None = None
        self.weights_at = 0
        self.quotas: dict[bytes, int] = {}
        self.floors: dict[bytes, int] = {}
        self.ghosts: dict[bytes, tuple[int, int]] = {}  # last use, uses

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

    def tier(self, block: Block) -> int:
        """Of the highest priority that an owner asked for last."""
        asked = [
            priority
            for (_, priority), kept in block.retentions.items()
            if kept.expires > self.now and not kept.superseded
        ]
        if block.held or not asked:
            asked.append(DEFAULT_PRIORITY)
        return tier(max(asked))

    def used(self, owner: bytes) -> int:
        return sum(block.size for block in self.blocks.values() if block.owner == owner)

    def learned(self) -> bool:
        return self.weights is not None and self.weights_at + WEIGHTS_LIFE > self.now

    def group(self, block: Block) -> tuple[int, int]:
        return self.priority(block), value_class(self.tier(block), block.uses)

    def worth(self, block: Block) -> float:
        if not self.learned():
            return self.priority(block)
        assert self.weights is not None
        age = age_bucket(self.now - block.queued)
        return self.weights.density[self.group(block)[1] * AGES + age]

    def head(self) -> Block | None:
        """The leaf that goes next, if nothing protects it: worth least of the oldest of each group."""
        heads: dict[tuple[int, int], Block] = {}
        for block in sorted(self.blocks.values(), key=lambda block: (block.queued, block.hash)):
            if self.is_leaf(block) and block.queued <= self.now and self.priority(block) < PINNED:
                heads.setdefault(self.group(block), block)
        return min(heads.values(), key=lambda b: (self.worth(b), b.queued, b.hash), default=None)

    def follow(self, block: Block) -> list[Block]:
        """All that is stored behind a block."""
        return [deeper for child in self.children(block) for deeper in (child, *self.follow(child))]

    def doomed(self) -> tuple[set[bytes], set[bytes]]:
        lost = [block for block in self.blocks.values() if block.state == LOST]
        return (
            {block.hash for block in self.blocks.values() if block.condemned},
            {block.hash for block in lost if block.waits_until <= self.now},
        )

    def victim(self, max_priority: int, needs: bytes | None, own: bool = False) -> Block | None:
        """The leaf to lose for a block of `max_priority` of the owner `needs`, one of its `own` if it has
        reached its quota: of the oldest of each group the one worth least. One that may not go yet waits."""
        if self.learned():
            max_priority = MAX_PRIORITY
        until = self.now + (PAUSE if own else 0)
        while True:
            heads: dict[tuple[int, int], Block] = {}
            for block in sorted(self.blocks.values(), key=lambda block: (block.queued, block.hash)):
                if (
                    self.is_leaf(block)
                    and block.queued <= until
                    and self.priority(block) <= max_priority
                    and (not own or block.owner == needs)
                ):
                    heads.setdefault(self.group(block), block)
            if not heads:
                return None
            least = min(heads.values(), key=lambda block: (self.worth(block), block.queued, block.hash))
            protected = least.owner != needs and least.owner in self.floors
            if least.lease > self.now:
                least.look_again = max(least.lease, until + 1)
            elif protected and self.used(least.owner) - least.size < self.floors[least.owner]:
                least.look_again = self.now + PAUSE
            else:
                return least

    # ---- changes

    def touch(self, block: Block) -> None:
        """A use of a block is a use of every block before it."""
        block.look_again = 0
        at: Block | None = block
        while at is not None:
            at.last = max(at.last, self.now)
            at = self.blocks.get(at.parent)

    def remove(self, block: Block) -> None:
        if block.state != LOST:
            self.dropped.add(block.name)
        if self.children(block):
            block.waits_until = self.now + LOST_LIFE
            block.state, block.size, block.fence, block.lease, block.readers = LOST, 0, bytes(7), 0, 0
            return
        del self.blocks[block.hash]
        parent = self.blocks.get(block.parent)
        if parent is None or self.children(parent):
            return
        parent.look_again = 0
        if parent.state == LOST:
            self.remove(parent)

    def evict_one(self, block: Block) -> None:
        self.ghosts[block.hash] = block.last, block.uses
        self.remove(block)

    def retain_block(self, block: Block, owner: bytes, priority: int, ttl: int | None) -> None:
        plain = priority == DEFAULT_PRIORITY and ttl is None
        if plain and block.held and not block.retentions:
            return
        for (holder, asked), kept in block.retentions.items():
            if holder == owner:
                kept.superseded = plain or asked != priority
        if plain:
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
        block.look_again = 0

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
            if block is None or block.state != READY or block.condemned:
                break
            found.append(block)
        return found

    def lookup(self, hashes: list[bytes], owner: bytes, lease_ms: int) -> list[bytes]:
        found = self.run(hashes)
        for block in found:
            for (holder, _), kept in block.retentions.items():
                if holder == owner and kept.expires > self.now and kept.ttl < NEVER:
                    kept.expires = max(kept.expires, self.now + kept.ttl)
            if block.retentions:
                self.settle(block)
            block.uses = min(MAX_USES, block.uses + 1)
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
                block.lease = block.look_again = 0

    def reserve(self, blocks: list[NewBlock], life_ms: int, reply: Reserved) -> list[str]:
        """Expected statuses."""
        already = set(self.dropped)
        self.upkeep()
        evicted = [name for name in reply.dropped if name not in self.dropped - already]
        return [self.reserve_block(block, life_ms, reply.fence, evicted) for block in blocks]

    def reserve_block(self, new: NewBlock, life_ms: int, fence: bytes, evicted: list[bytes]) -> str:
        known = self.blocks.get(new.hash)
        if known is not None and known.condemned:
            return "F"
        if known is not None and known.state in (READY, WRITING):
            if known.state == READY:
                known.uses = min(MAX_USES, known.uses + 1)
                self.touch(known)
            self.retain_block(known, new.owner, new.priority, new.ttl_ms)
            return "H" if known.state == READY else "F"
        if known is None:
            parent = self.blocks.get(new.parent)
            if new.parent != ROOT and (parent is None or parent.condemned):
                return "O"
            known = self.blocks[new.hash] = Block(new.hash, new.parent, new.owner)
        known.state, known.owner, known.fence = WRITING, new.owner, fence
        known.deadline, known.lease, known.readers = self.now + life_ms, 0, 0
        quota = self.quotas.get(new.owner, math.inf)
        while (over := self.used(new.owner) + new.size > quota) or self.total() + new.size > self.capacity:
            victim = self.victim(new.priority, new.owner, own=over)
            if victim is None:
                assert evicted.pop(0) == known.name
                self.remove(known)
                return "N"
            assert evicted.pop(0) == victim.name, "the server evicted a block out of order"
            self.evict_one(victim)
        last, uses = self.ghosts.pop(new.hash, (0, 0))
        before = min(MAX_USES - 1, uses) if self.now - last <= GHOST_LIFE_MS else 0
        known.uses = min(MAX_USES, max(known.uses, before) + 1)
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

    def quarantine(self, hash_: bytes, fence: bytes, taints: bool) -> None:
        block = self.blocks.get(hash_)
        if block is not None and block.state == READY and block.fence == fence:
            block.condemned |= taints
            self.remove(block)

    def condemn(self, hash_: bytes) -> bool:
        if hash_ in self.blocks:
            self.blocks[hash_].condemned = True
        return hash_ in self.blocks

    def drop(self, hashes: list[bytes]) -> list[bytes]:
        """Those that have to wait."""
        waiting = []
        for hash_ in hashes:
            block = self.blocks.get(hash_)
            if block is not None and block.lease <= self.now and not self.children(block):
                self.remove(block)
            if hash_ in self.blocks:
                waiting.append(hash_)
        return waiting

    def delete_doomed(self) -> None:
        condemned, lost = self.doomed()
        following = [block for hash_ in condemned | lost for block in self.follow(self.blocks[hash_])]
        going = condemned | {block.hash for block in following} - lost
        before: set[bytes] = set()
        while going != before:
            before, going = going, set(self.drop(list(going)))

    def pin(
        self, lasts: list[bytes], owner: bytes, ttl: int, most: int, priority: int
    ) -> tuple[int, int, int] | str:
        """(blocks, their bytes, bytes of all pinned ones), or what is wrong."""
        path: dict[bytes, Block] = {}
        for last in lasts:
            at = last
            while at != ROOT and at not in path:
                block = self.blocks.get(at)
                if block is None or block.state != READY:
                    return "missing"
                if block.condemned:
                    return "deleting"
                path[at] = block
                at = block.parent
        new = sum(block.size for block in path.values() if self.priority(block) < PINNED)
        if priority == PINNED and ttl and new and self.pinned() + new > most:
            return "room"
        for block in path.values():
            if ttl:
                self.retain_block(block, owner, priority, ttl)
            elif block.retentions:
                block.retentions.pop((owner, priority), None)
                self.settle(block)
        return len(path), sum(block.size for block in path.values()), self.pinned()

    def pinned(self) -> int:
        return sum(block.size for block in self.blocks.values() if self.priority(block) == PINNED)

    def retain(self, hashes: list[bytes], owner: bytes, priority: int, ttl: int | None) -> int:
        known = [self.blocks[hash_] for hash_ in hashes if hash_ in self.blocks]
        for block in known:
            self.retain_block(block, owner, priority, ttl)
        return len(known)

    def evict(self, target: int, dropped: list[bytes]) -> None:
        already = set(self.dropped)
        self.upkeep()
        for name in [name for name in dropped if name not in self.dropped - already]:
            assert self.total() > target, "the server evicted more than it was asked to"
            victim = self.victim(MAX_PRIORITY, None)
            assert victim is not None, "the server evicted a block that may not go"
            assert name == victim.name, "the server evicted a block out of order"
            self.evict_one(victim)
        assert self.total() <= target or self.victim(MAX_PRIORITY, None) is None

    def learn(self, weights: Weights) -> None:
        self.weights, self.weights_at = weights, self.now

"""Random calls of the Redis Functions: server and model (oracle.py) must agree after every one of them."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from redis import Redis

from services.cache_store.deletion import Deletion
from services.cache_store.embedded import LocalRedis
from services.cache_store.functions import PINNED, ROOT, NewBlock, PinRefused
from services.cache_store.worth import AGES, CLASSES, Weights, value_class
from tests.cache_store.harness import ALICE, BOB, Store, block_hash
from tests.cache_store.oracle import LOST, WRITING, Oracle

#: A tree of 12 blocks: a trunk of two, three branches, and one chain apart.
PARENTS = [None, 0, 1, 2, 1, 4, 1, 6, 0, None, 9, 10]
NODES = [block_hash(f"node {i}") for i in range(len(PARENTS))]


def path(node: int) -> list[int]:
    parent = PARENTS[node]
    return [*(path(parent) if parent is not None else []), node]


def blocks_to(node: int, size: int, owner: bytes, priority: int, ttl: int | None) -> list[NewBlock]:
    hashes = [NODES[i] for i in path(node)]
    return [
        NewBlock(hash_, parent, size, owner, priority, ttl)
        for hash_, parent in zip(hashes, [ROOT, *hashes], strict=False)
    ]


nodes = st.integers(0, len(PARENTS) - 1)
owners = st.sampled_from([ALICE, BOB])
priorities = st.sampled_from([0, 35, 35, 60, 90])
ttls = st.sampled_from([None, None, 1, 50, 1000])


REFUSALS = {"missing": "not stored as a whole", "deleting": "being deleted", "room": "bytes would be pinned"}


class StoreMachine(RuleBasedStateMachine):
    client: Redis

    @initialize(capacity=st.sampled_from([500, 700, 900]))
    def start(self, capacity: int) -> None:
        self.store = Store(self.client, capacity)
        self.oracle = Oracle(capacity)
        self.oracle.now = self.store.now
        self.pending: list[tuple[bytes, list[bytes]]] = []  # reservations whose writer is alive
        self.leases: list[tuple[bytes, bytes]] = []
        self.fences: list[tuple[bytes, bytes]] = []  # every (hash, fence) ever given

    def tick(self, ms: int = 1) -> None:
        self.store.turn_clock(ms)
        self.oracle.now = self.store.now

    def try_to_reserve(self, blocks: list[NewBlock], life: int) -> tuple[bytes, list[bytes]]:
        self.tick()
        reply = self.store.calls.reserve(blocks, life)
        assert reply.statuses == self.oracle.reserve(blocks, life, reply)
        won = [b.hash for b, status in zip(blocks, reply.statuses, strict=True) if status == "W"]
        self.fences += [(hash_, reply.fence) for hash_ in won]
        return reply.fence, won

    @rule(node=nodes, owner=owners, priority=priorities, ttl=ttls)
    def write(self, node: int, owner: bytes, priority: int, ttl: int | None) -> None:
        fence, won = self.try_to_reserve(blocks_to(node, 100, owner, priority, ttl), 10_000)
        assert self.store.calls.commit(fence, won) == self.oracle.commit(fence, won)

    @rule(node=nodes, skip=st.integers(0, 2), owner=owners, priority=priorities, ttl=ttls,
          life=st.sampled_from([5, 100, 10_000]), size=st.sampled_from([100, 250]))  # fmt: skip
    def reserve(
        self, node: int, skip: int, owner: bytes, priority: int, ttl: int | None, life: int, size: int
    ) -> None:
        blocks = blocks_to(node, size, owner, priority, ttl)
        self.pending.append(self.try_to_reserve(blocks[skip:] or blocks, life))

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), keep=st.booleans())
    def commit_or_a_part_of_it(self, data: st.DataObject, keep: bool) -> None:
        self.tick()
        at = data.draw(st.integers(0, len(self.pending) - 1))
        fence, hashes = self.pending[at] if keep else self.pending.pop(at)
        some = hashes[: data.draw(st.integers(0, len(hashes)))]
        assert self.store.calls.commit(fence, some) == self.oracle.commit(fence, some)

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.tick()
        fence, hashes = self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1)))
        self.store.calls.abort(fence, hashes)
        self.oracle.abort(fence, hashes)

    @precondition(lambda self: self.pending)
    @rule()
    def a_writer_dies(self) -> None:
        self.pending.clear()

    @rule(node=nodes, owner=owners, lease=st.sampled_from([0, 20, 500]))
    def lookup(self, node: int, owner: bytes, lease: int) -> None:
        self.tick()
        hashes = [NODES[i] for i in path(node)]
        assert self.store.calls.peek(hashes) == len(self.oracle.run(hashes))
        fences = self.store.calls.lookup(hashes, owner, lease)
        assert fences == self.oracle.lookup(hashes, owner, lease)
        if fences and lease:
            self.leases.append((hashes[len(fences) - 1], fences[-1]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.tick()
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.store.calls.release(*lease)
        self.oracle.release(*lease)

    @rule(total=st.sampled_from([0, 300, 500, 700]))
    def evict(self, total: int) -> None:
        self.tick()
        dropped, left, more = self.store.calls.evict(total)
        self.oracle.evict(total, dropped)
        assert (left, more) == (self.oracle.total(), False)

    @precondition(lambda self: self.fences)
    @rule(data=st.data(), taints=st.booleans())
    def a_reader_finds_a_bad_payload(self, data: st.DataObject, taints: bool) -> None:
        self.tick()
        hash_, fence = data.draw(st.sampled_from(self.fences))
        self.store.calls.quarantine(hash_, fence, "crc", taints)
        self.oracle.quarantine(hash_, fence, taints)

    @rule(node=nodes)
    def condemn(self, node: int) -> None:
        self.tick()
        assert self.store.calls.condemn(NODES[node]) == self.oracle.condemn(NODES[node])

    @rule(some=st.lists(nodes, min_size=1, max_size=4, unique=True))
    def drop_what_follows_a_condemned_block_or_a_part_of_it(self, some: list[int]) -> None:
        self.tick()
        blocks = [NODES[i] for i in sorted(some, reverse=True)]  # children before parents
        waiting, _ = self.store.calls.drop(blocks)
        assert waiting == self.oracle.drop(blocks)

    @rule()
    def delete_what_is_doomed(self) -> None:
        self.tick()
        Deletion(self.store.calls, lambda names: None).step()
        self.oracle.delete_doomed()

    @rule(
        lasts=st.lists(nodes, min_size=1, max_size=2),
        owner=owners,
        ttl=st.sampled_from([0, 50, 1000]),
        most=st.sampled_from([0, 250, 1000]),
        priority=st.sampled_from([80, PINNED, PINNED]),
    )
    def pin(self, lasts: list[int], owner: bytes, ttl: int, most: int, priority: int) -> None:
        self.upkeep()  # before, what has ended may count as pinned still
        blocks = [NODES[i] for i in lasts]
        expected = self.oracle.pin(blocks, owner, ttl, most, priority)
        if isinstance(expected, tuple):
            assert self.store.calls.pin(blocks, owner, ttl, most, priority) == expected
        else:
            with pytest.raises(PinRefused, match=REFUSALS[expected]):
                self.store.calls.pin(blocks, owner, ttl, most, priority)

    @rule()
    def margin(self) -> None:
        self.upkeep()
        margin, head = self.store.calls.margin(), self.oracle.head()
        assert (margin.total, margin.capacity) == (self.oracle.total(), self.oracle.capacity)
        assert margin.density == (self.oracle.worth(head) if head and self.oracle.learned() else None)

    @rule(node=nodes, owner=owners, priority=priorities, ttl=ttls)
    def retain(self, node: int, owner: bytes, priority: int, ttl: int | None) -> None:
        self.tick()
        hashes = [NODES[i] for i in path(node)]
        known = self.store.calls.retain(hashes, owner, priority, ttl)
        assert known == self.oracle.retain(hashes, owner, priority, ttl)

    @rule(
        node=nodes, owner=owners, priority=st.sampled_from([10, 80, PINNED]), ttl=st.sampled_from([50, 1000])
    )
    def retain_for_a_time(self, node: int, owner: bytes, priority: int, ttl: int) -> None:
        self.retain(node, owner, priority, ttl)

    @rule(
        owner=owners,
        quota=st.sampled_from([None, None, 200, 400]),
        floor=st.sampled_from([None, None, 100, 200]),
    )
    def govern(self, owner: bytes, quota: int | None, floor: int | None) -> None:
        self.store.calls.govern(owner, quota=quota, floor=floor)
        for bounds, value in ((self.oracle.quotas, quota), (self.oracle.floors, floor)):
            bounds.pop(owner, None)
            if value is not None:
                bounds[owner] = value

    @rule(seed=st.integers(0, 1000))
    def learn(self, seed: int) -> None:
        self.tick()
        random = Random(seed)
        weights = Weights(tuple(random.random() for _ in range(CLASSES * AGES)))
        calls = self.store.calls
        learning = calls.events()
        assert calls.learn(learning, b"", weights.to_bytes())
        assert not calls.learn(learning, b"", weights.to_bytes()), "somebody learned in the meantime"
        assert calls.events().counts == {}
        self.oracle.learn(weights)

    @rule(ms=st.sampled_from([3, 40, 200, 2000, 600_000, 2_000_000]))
    def time_passes(self, ms: int) -> None:
        self.tick(ms)

    @rule()
    def upkeep(self) -> None:
        self.tick()
        self.store.calls.upkeep(100)
        self.oracle.upkeep()

    @invariant()
    def server_and_model_agree(self) -> None:
        if not hasattr(self, "store"):
            return
        records, oracle, key = self.store.records(), self.oracle, self.store.calls.key
        assert records.keys() == oracle.blocks.keys()
        for hash_, record in records.items():
            block = oracle.blocks[hash_]
            assert (record.state, record.size, record.parent) == (block.state, block.size, block.parent)
            assert (record.lease, record.readers, record.fence) == (block.lease, block.readers, block.fence)
            assert record.children == len(oracle.children(block))
            assert record.parent == ROOT or record.parent in records
            assert record.children or record.state != LOST
            assert record.state == LOST or record.uses == block.uses
            assert record.condemned == block.condemned
            if not oracle.overdue(block):
                assert (record.priority, record.tier) == (oracle.priority(block), oracle.tier(block))
        leaves = {block.hash: block for block in oracle.blocks.values() if oracle.is_leaf(block)}
        scores = dict(self.client.zrange(key["leaves"], 0, -1, withscores=True))
        assert scores.keys() == leaves.keys()
        for hash_, score in scores.items():
            record = records[hash_]
            group = record.priority * CLASSES + value_class(record.tier, record.uses)
            assert score == group * 2**42 + leaves[hash_].queued
        assert set(self.client.zrange(key["owned"], 0, -1)) == {
            leaves[hash_].owner + int(score).to_bytes(7, "big") + hash_ for hash_, score in scores.items()
        }
        assert dict(self.client.zrange(key["writing"], 0, -1, withscores=True)) == {
            block.hash: block.deadline for block in oracle.blocks.values() if block.state == WRITING
        }
        assert self.client.smembers(key["dropped"]) == oracle.dropped
        assert dict(self.client.zrange(key["lost"], 0, -1, withscores=True)) == {
            block.hash: block.waits_until for block in oracle.blocks.values() if block.state == LOST
        }
        assert self.store.calls.doomed() == oracle.doomed()
        assert self.store.calls.condemned() == oracle.doomed()[0]
        usage = self.store.calls.usage()
        assert usage.total == oracle.total() <= oracle.capacity
        assert usage.pinned == sum(r.size for r in records.values() if r.priority == PINNED)
        assert usage.owners == {
            owner: size
            for owner in (ALICE, BOB)
            if (size := sum(block.size for block in oracle.blocks.values() if block.owner == owner))
        }
        retained = {block.hash for block in oracle.blocks.values() if block.retentions}
        assert set(self.client.hkeys(key["retained"])) == retained
        assert set(self.client.zrange(key["expiring"], 0, -1)) <= retained


@pytest.mark.slow
def test_any_sequence_of_calls_keeps_the_invariants_and_agrees_with_the_model(any_server: LocalRedis) -> None:
    with Redis.from_url(any_server.socket_url) as client:
        machine = type("Machine", (StoreMachine,), {"client": client})
        run_machine(
            machine,
            settings=settings(
                max_examples=100,
                stateful_step_count=50,
                deadline=None,
                phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )

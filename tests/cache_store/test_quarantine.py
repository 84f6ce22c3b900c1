"""What becomes of the blocks that follow a bad one: some wait for it, some go (frames.BadFrame.taints)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from redis import Redis

from services.cache_store.client import BlockStore, Outcome
from services.cache_store.deletion import Deletion
from services.cache_store.embedded import LocalRedis
from services.cache_store.frames import BadFrame
from services.cache_store.functions import StoreFunctions
from tests.cache_store.harness import ALICE, BOB, Store, chain
from tests.cache_store.oracle import LOST
from tests.cache_store.test_client import FORMAT, payload_of, read_all, to_write

TRUNK = chain("trunk", 3)
BRANCHES = [TRUNK + chain(f"{i}", 4) for i in range(5)]
LOST_LIFE_MS = 600_000


@pytest.fixture
def store(redis: Redis) -> Store:
    """With the branches in it, and room for as many blocks again."""
    store = Store(redis, capacity=10_000)
    for branch in BRANCHES:
        store.store(branch, priority=90)
    return store


def quarantine(store: Store, block: bytes, reason: BadFrame) -> None:
    store.turn_clock()
    store.calls.quarantine(block, store.records()[block].fence, reason, reason.taints)


def upkeep(store: Store) -> list[bytes]:
    """Hashes of the blocks that the service's next round deletes."""
    gone: list[bytes] = []
    store.calls.upkeep(100)
    Deletion(store.calls, gone.extend).step()
    return [name[:16] for name in gone]


# ---- lost or damaged in the store -----------------------------------------------------------------------


def test_what_follows_a_damaged_block_is_found_again_when_the_block_is_written_in_time(store: Store) -> None:
    quarantine(store, TRUNK[1], BadFrame.CRC)
    assert [store.length(branch) for branch in BRANCHES] == [1] * 5
    store.turn_clock(LOST_LIFE_MS - 2)
    assert upkeep(store) == []
    assert store.store(BRANCHES[0]) == "HWHHHHH"
    assert [store.length(branch) for branch in BRANCHES] == [7] * 5
    store.turn_clock(LOST_LIFE_MS)
    assert upkeep(store) == []
    assert store.calls.usage().lost == 0


def test_what_follows_a_damaged_block_goes_when_nobody_has_written_the_block_in_ten_minutes(
    store: Store,
) -> None:
    quarantine(store, TRUNK[1], BadFrame.MISSING)
    assert store.calls.usage().lost == 1
    store.turn_clock(LOST_LIFE_MS)
    assert set(upkeep(store)) == {block for branch in BRANCHES for block in branch[2:]}
    assert store.records().keys() == {TRUNK[0]}
    usage = store.calls.usage()
    assert (usage.total, usage.lost, usage.leaves) == (100, 0, 1)
    assert store.store(BRANCHES[0]) == "HWWWWWW"


def test_the_same_for_a_block_that_never_came_to_be_before_those_that_follow_it(store: Store) -> None:
    blocks = chain("half", 3)
    reserved = store.reserve(blocks)
    store.calls.commit(reserved.fence, blocks[2:])  # Redis had no memory for the other two
    store.calls.abort(reserved.fence, blocks[:2])
    assert [store.records()[block].state for block in blocks[:2]] == [LOST, LOST]
    store.turn_clock(LOST_LIFE_MS)
    assert upkeep(store) == [blocks[2]]
    assert not store.records().keys() & set(blocks)


def test_a_reader_that_still_holds_a_lease_behind_a_damaged_block_is_waited_for(store: Store) -> None:
    quarantine(store, TRUNK[1], BadFrame.CRC)
    store.turn_clock(LOST_LIFE_MS - 10)
    leased = BRANCHES[0]
    store.store(TRUNK)
    store.calls.lookup(leased, ALICE, 5_000)
    quarantine(store, TRUNK[1], BadFrame.CRC)
    store.turn_clock(LOST_LIFE_MS - 1)
    assert upkeep(store) == [], "another ten minutes"
    store.calls.retain(leased, BOB, 90, None)
    store.turn_clock(1)
    assert len(upkeep(store)) == 21


def test_who_writes_a_damaged_block_while_what_follows_is_being_deleted_keeps_the_block(store: Store) -> None:
    quarantine(store, TRUNK[1], BadFrame.CRC)
    store.turn_clock(LOST_LIFE_MS)
    drop = store.calls.drop

    def drop_after_a_writer(blocks: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        assert store.store(TRUNK) == "HWH"
        return drop(blocks)

    store.calls.drop = drop_after_a_writer  # type: ignore[method-assign]
    assert len(upkeep(store)) == 21
    assert store.records().keys() == set(TRUNK[:2])
    assert store.length(TRUNK) == 2


def test_without_a_service_what_follows_goes_by_its_rank_and_the_damaged_block_with_the_last_of_it(
    store: Store,
) -> None:
    quarantine(store, TRUNK[0], BadFrame.CRC)
    store.turn_clock(LOST_LIFE_MS)
    for i in range(30):
        store.store(chain(f"other {i}", 4), priority=90)
    assert not store.records().keys() & {block for branch in BRANCHES for block in branch}
    assert store.calls.usage().lost == 0


# ---- wrong at the writer --------------------------------------------------------------------------------


def test_what_follows_wrong_values_is_gone_for_good_whoever_writes_the_block_again(store: Store) -> None:
    quarantine(store, TRUNK[1], BadFrame.SCALES)
    assert [store.length(branch) for branch in BRANCHES] == [1] * 5
    assert store.store(BRANCHES[0])[:2] == "HF", "the block is not written before all of it has gone"
    assert store.store([*TRUNK[:2], *chain("another", 1)]) == "HFO"
    assert store.calls.lookup(BRANCHES[0], ALICE, 0) == [store.records()[TRUNK[0]].fence]
    assert set(upkeep(store)) == {block for branch in BRANCHES for block in branch[2:]}
    assert store.records().keys() == {TRUNK[0]}
    assert store.calls.doomed() == (set(), set())
    assert store.store(BRANCHES[0]) == "HWWWWWW", "not one of the old ones"


def test_a_writer_below_wrong_values_that_commits_late_brings_nothing_back(store: Store) -> None:
    late = chain("late", 2)
    reserved = store.reserve(TRUNK + late)
    assert reserved.statuses == ["H", "H", "H", "W", "W"]
    quarantine(store, TRUNK[2], BadFrame.SCALES)
    store.calls.commit(reserved.fence, late)
    assert store.length(TRUNK + late) == 2
    assert set(late) <= set(upkeep(store))
    assert store.records().keys() == set(TRUNK[:2])


def test_wrong_values_that_nothing_follows_can_be_written_anew_at_once(store: Store) -> None:
    last = BRANCHES[0][-1]
    quarantine(store, last, BadFrame.SCALES)
    assert store.calls.doomed() == (set(), set())
    assert store.store(BRANCHES[0]) == "HHHHHHW"


def test_more_blocks_of_wrong_values_than_operators_may_delete_at_once_all_go(redis: Redis) -> None:
    store = Store(redis, capacity=100_000)
    prefixes = [chain(f"{i}", 2) for i in range(100)]
    for prefix in prefixes:
        store.store(prefix)
        quarantine(store, prefix[0], BadFrame.SCALES)
    assert len(store.calls.condemned()) == 100
    assert len(upkeep(store)) == 100
    assert store.records() == {}


# ---- as readers see it ----------------------------------------------------------------------------------


@pytest.fixture
def client(redis_server: LocalRedis) -> Iterator[BlockStore]:
    client = BlockStore(redis_server.socket_url, FORMAT, capacity=64 << 20)
    yield client
    client.close()


@pytest.mark.parametrize("reason", BadFrame)
def test_only_what_the_writer_had_wrong_takes_what_follows_with_it(
    client: BlockStore, redis: Redis, reason: BadFrame
) -> None:
    blocks = chain("a", 4)
    client.write(to_write(blocks))
    found = client.lookup(blocks, "t")
    assert found is not None
    client.quarantine(found, 1, reason)
    client.release(found)
    outcomes = client.write(to_write(blocks)).outcomes
    if reason is BadFrame.SCALES:
        assert outcomes[blocks[1]] is Outcome.FOLLOWED
        assert len(read_all(client, blocks)) == 1
        Deletion(StoreFunctions(redis), lambda names: None).step()
        assert set(client.write(to_write(blocks)).outcomes.values()) == {Outcome.HAD, Outcome.STORED}
    else:
        assert list(outcomes.values()).count(Outcome.HAD) == 3
    assert read_all(client, blocks) == [bytes(payload_of(block)) for block in blocks]

"""What operators may ask: lists, pins and deletions, on a real server. Over HTTP: test_operators_http.py."""

from __future__ import annotations

import struct
from random import Random

import pytest
from redis import Redis

from services.cache_store.deletion import Deletion, deepest_first
from services.cache_store.functions import PINNED, Prefix, StoreFunctions, TooManyDeletions
from services.cache_store.operators import (
    MOST_PINNED,
    NotStored,
    Operators,
    Refused,
    Server,
    Unreachable,
)
from tests.cache_store.harness import ALICE, BOB, Store, block_hash, chain, new_blocks


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, capacity=100_000)


@pytest.fixture
def operators(store: Store) -> Operators:
    return Operators({"here": Server(store.calls, 100_000)})


def pinned_bytes(store: Store) -> int:
    """As the records say."""
    return sum(record.size for record in store.records().values() if record.priority == PINNED)


# ---- the list ---------------------------------------------------------------------------------------------


def test_a_prefix_says_what_it_holds_who_has_it_and_what_others_share(store: Store) -> None:
    trunk = chain("trunk", 3)
    first, second = trunk + chain("a", 2), trunk + chain("b", 4)
    store.store(first)
    store.store(second, owner=BOB, priority=80)
    store.calls.lookup(second, BOB, 5_000)
    store.turn_clock(700)
    prefixes, more = store.calls.prefixes(10)
    assert not more
    high, plain = prefixes
    assert (high.last, high.first, high.blocks, high.size) == (second[-1], trunk[0], 7, 700)
    assert (high.shared_last, high.shared_blocks, high.shared_size) == (trunk[-1], 3, 300)
    assert (high.priority, high.tier, high.uses, high.owner) == (80, 3, 2, BOB)
    assert (high.idle_ms, high.leased_ms, high.pinned_ms, high.whole) == (700, 4_300, 0, True)
    assert (plain.last, plain.blocks, plain.uses, plain.owner) == (first[-1], 5, 1, ALICE)
    assert (plain.priority, plain.tier, plain.leased_ms) == (35, 1, 0)


def test_pages_hold_every_prefix_once_the_highest_ranks_first(store: Store) -> None:
    random = Random(1)
    lasts = set()
    for i in range(57):
        blocks = chain(f"{i}", random.randint(1, 5))
        store.store(blocks, priority=random.choice([20, 35, 80]))
        lasts.add(blocks[-1])
    whole, _ = store.calls.prefixes(100)
    assert {prefix.last for prefix in whole} == lasts
    assert [p.score for p in whole] == sorted((p.score for p in whole), reverse=True)
    pages: list[Prefix] = []
    after, more = None, True
    while more:
        page, more = store.calls.prefixes(10, after)
        pages += page
        after = page[-1].score, page[-1].last
    assert pages == whole


def test_pages_go_on_where_the_last_prefix_has_gone(store: Store) -> None:
    for i in range(20):
        store.store(chain(f"{i}", 1))
    page, _ = store.calls.prefixes(10)
    store.calls.condemn(page[-1].last)
    store.calls.drop([page[-1].last])
    rest, more = store.calls.prefixes(10, (page[-1].score, page[-1].last))
    assert (len(rest), more) == (10, False)
    assert not {p.last for p in rest} & {p.last for p in page}


def test_a_call_reads_a_bounded_number_of_records(store: Store) -> None:
    store.calls.configure(10_000_000)
    for name in "abcdef":
        blocks = chain(name, 2_000)
        for start in range(0, 2_000, 500):
            parents = new_blocks(blocks[: start + 500])[start:]
            store.turn_clock()
            reserved = store.calls.reserve(parents, 10_000)
            assert all(store.calls.commit(reserved.fence, [block.hash for block in parents]))
    page, more = store.calls.prefixes(6)
    assert (len(page), more) == (2, True), "2,000 records each, 4,096 a call"
    assert [prefix.blocks for prefix in page] == [2_000, 2_000]


def test_a_prefix_longer_than_a_call_may_read_is_listed_without_its_sums(store: Store) -> None:
    store.calls.configure(10_000_000)
    blocks = chain("long", 5_000)
    for start in range(0, 5_000, 500):
        reserved = store.calls.reserve(new_blocks(blocks[: start + 500])[start:], 10_000)
        store.calls.commit(reserved.fence, blocks[start : start + 500])
    (prefix,), more = store.calls.prefixes(10)
    assert (prefix.last, prefix.first, prefix.blocks, prefix.whole, more) == (
        blocks[-1],
        None,
        0,
        False,
        False,
    )


def test_a_list_over_several_servers_is_in_one_order_and_skips_one_that_is_down(redis: Redis) -> None:
    first, second = Store(redis), Store(redis)
    second.calls = StoreFunctions(redis, shard=1)
    first.calls = StoreFunctions(redis)
    random = Random(2)
    for store in (first, second):
        store.calls.configure(100_000)
    lasts = set()
    for i in range(45):
        blocks = chain(f"{i}", 2)
        calls = random.choice([first, second]).calls
        calls.commit(
            calls.reserve(new_blocks(blocks, priority=random.choice([20, 35, 80])), 1000).fence, blocks
        )
        lasts.add(blocks[-1])
    down = Server(first.calls, 100_000, lambda: False)
    operators = Operators({"a": Server(first.calls, 1), "b": Server(second.calls, 1), "c": down})
    after, seen = None, []
    for _ in range(20):
        page = operators.prefixes(7, after)
        seen += page.prefixes
        assert page.unreachable == (["c"] if after is None else [])
        after = page.position
        if not page.has_more:
            break
    assert {prefix.last for _, prefix in seen} == lasts
    assert len(seen) == 45
    scores = [prefix.score for _, prefix in seen]
    assert scores == sorted(scores, reverse=True)


# ---- pins -------------------------------------------------------------------------------------------------


def test_a_pinned_prefix_outlives_every_eviction_until_its_time_is_over(
    store: Store, operators: Operators
) -> None:
    kept, other = chain("kept", 4), chain("other", 4)
    store.store(kept)
    store.store(other)
    pinned = operators.pin([kept[-1]], ttl_s=10)
    assert (pinned.server, pinned.blocks, pinned.bytes, pinned.pinned_bytes) == ("here", 4, 400, 400)
    store.calls.evict(0)
    assert (store.length(kept), store.length(other)) == (4, 0)
    (prefix,), _ = store.calls.prefixes(10)
    assert (prefix.priority, prefix.pinned_ms) == (PINNED, 10_000)
    assert store.calls.usage().pinned == pinned_bytes(store) == 400
    store.turn_clock(10_001)
    store.calls.upkeep(100)
    assert store.calls.usage().pinned == 0
    store.calls.evict(0)
    assert store.length(kept) == 0


def test_a_pin_can_be_taken_back_and_leaves_what_others_asked_for(store: Store, operators: Operators) -> None:
    blocks = chain("a", 3)
    store.store(blocks, priority=80)
    operators.pin([blocks[-1]], ttl_s=100)
    operators.pin([blocks[-1]], ttl_s=0)
    assert {record.priority for record in store.records().values()} == {80}
    assert store.calls.usage().pinned == 0


def test_operators_can_also_raise_a_priority_for_a_time(store: Store, operators: Operators) -> None:
    blocks = chain("a", 3)
    store.store(blocks)
    assert operators.pin([blocks[1]], ttl_s=1, priority=90).pinned_bytes == 0
    records = store.records()
    assert [records[block].priority for block in blocks] == [90, 90, 35]
    store.turn_clock(1_001)
    store.calls.upkeep(100)
    assert {record.priority for record in store.records().values()} == {35}


def test_more_than_a_part_of_the_capacity_is_not_pinned_and_then_nothing_is(
    store: Store, operators: Operators
) -> None:
    limit = int(MOST_PINNED * 100_000)
    full = chain("a", limit // 1000)
    store.store(full, size=1000)
    other = chain("b", 2)
    store.store(other, size=1000)
    operators.pin([full[-1]], ttl_s=100)
    assert operators.pin([full[-1]], ttl_s=100).pinned_bytes == limit, "pinned twice is pinned once"
    with pytest.raises(Refused, match=f"{limit + 2000} bytes would be pinned, {limit} may be"):
        operators.pin([other[-1]], ttl_s=100)
    assert {store.records()[block].priority for block in other} == {35}


def test_of_several_prefixes_all_are_pinned_or_none(store: Store, operators: Operators) -> None:
    stored = chain("a", 3)
    store.store(stored)
    half = chain("b", 3)
    reserved = store.reserve(half)
    store.calls.commit(reserved.fence, half[:2])
    with pytest.raises(Refused, match=f"{half[-1].hex()}: the prefix is not stored as a whole"):
        operators.pin([stored[-1], half[-1]], ttl_s=100)
    with pytest.raises(NotStored, match=block_hash("never").hex()):
        operators.pin([stored[-1], block_hash("never")], ttl_s=100)
    assert pinned_bytes(store) == store.calls.usage().pinned == 0


def test_the_books_of_pinned_bytes_survive_loss_rewriting_and_deletion(
    store: Store, operators: Operators
) -> None:
    blocks = chain("a", 4)
    store.store(blocks)
    operators.pin([blocks[-1]], ttl_s=100)
    fence = store.records()[blocks[1]].fence
    store.calls.quarantine(blocks[1], fence, "crc")
    assert store.calls.usage().pinned == pinned_bytes(store) == 300
    store.store(blocks)
    assert store.calls.usage().pinned == pinned_bytes(store) == 400
    operators.delete(blocks[0])
    Deletion(store.calls, lambda names: None).step()
    usage = store.calls.usage()
    assert (usage.pinned, usage.total, usage.owners, usage.blocks) == (0, 0, {}, 0)


# ---- deletions --------------------------------------------------------------------------------------------


def test_a_deleted_prefix_is_not_found_at_once_and_goes_with_all_that_follows_it(
    store: Store, operators: Operators
) -> None:
    trunk = chain("trunk", 3)
    branches = [trunk + chain(f"{i}", 5) for i in range(40)]
    for branch in branches:
        store.store(branch)
    apart = trunk[:1] + chain("apart", 2)
    store.store(apart)
    assert operators.delete(trunk[1]) == "here"
    assert store.length(branches[7]) == 1
    assert len(store.calls.lookup(branches[7], ALICE, 0)) == 1
    assert operators.prefixes(100).deleting == [trunk[1]]
    unlinked: list[bytes] = []
    Deletion(store.calls, unlinked.extend).step()
    assert store.records().keys() == {*apart}
    assert len(unlinked) == len(set(unlinked)) == 2 + 40 * 5
    assert operators.prefixes(100).deleting == []
    assert store.calls.usage().counts["deleted"] == 202
    assert store.calls.usage().ghosts == 0, "nothing of it is remembered"
    assert store.store(branches[0]) == "HWWWWWWW"


def test_what_is_leased_waits_and_nobody_can_lease_it_again(store: Store, operators: Operators) -> None:
    blocks = chain("a", 6)
    store.store(blocks)
    store.calls.lookup(blocks[:4], ALICE, 5_000)
    operators.delete(blocks[0])
    deletion = Deletion(store.calls, lambda names: None)
    deletion.step()
    assert store.records().keys() == set(blocks[:4])
    assert store.calls.lookup(blocks, ALICE, 5_000) == []
    store.turn_clock(4_000)
    deletion.step()
    assert store.records().keys() == set(blocks[:4])
    store.turn_clock(1_001)
    deletion.step()
    assert store.records() == {}


def test_a_writer_neither_revives_what_is_being_deleted_nor_adds_to_it(
    store: Store, operators: Operators
) -> None:
    blocks = chain("a", 2)
    store.store(blocks)
    store.calls.lookup(blocks, ALICE, 5_000)
    operators.delete(blocks[1])
    assert store.store(blocks + chain("more", 1)) == "HFO"
    with pytest.raises(Refused, match="being deleted"):
        operators.pin([blocks[1]], ttl_s=1)


def test_what_was_written_under_it_while_it_was_read_goes_too(store: Store, operators: Operators) -> None:
    blocks = chain("a", 3)
    store.store(blocks)
    operators.delete(blocks[0])
    now = 0.0
    deletion = Deletion(store.calls, lambda names: None, lambda: now)
    parents = store.calls.parents
    late = chain("late", 1)

    def parents_and_then_a_writer(cursor: int, count: int) -> tuple[int, dict[bytes, bytes]]:
        read = parents(cursor, count)
        new = new_blocks([blocks[2], late[0]])[1:]
        reserved = store.calls.reserve(new, 10_000)
        store.calls.commit(reserved.fence, late)
        return read

    store.calls.parents = parents_and_then_a_writer  # type: ignore[method-assign]
    deletion.step()
    assert store.records().keys() == {*blocks, *late}
    store.calls.parents = parents  # type: ignore[method-assign]
    now = 6.0
    deletion.step()
    assert store.records() == {}


def test_another_service_goes_on_where_one_died(store: Store, operators: Operators) -> None:
    blocks = chain("a", 300)
    for start in range(0, 300, 100):
        reserved = store.calls.reserve(new_blocks(blocks[: start + 100])[start:], 10_000)
        store.calls.commit(reserved.fence, blocks[start : start + 100])
    operators.delete(blocks[10])
    store.calls.drop(list(reversed(blocks[200:])))  # and dies
    Deletion(store.calls, lambda names: None).step()
    assert store.records().keys() == set(blocks[:10])
    assert store.calls.condemned() == set()


def test_deletions_are_bounded_in_number(store: Store, operators: Operators) -> None:
    blocks = [chain(f"{i}", 1)[0] for i in range(65)]
    for block in blocks:
        store.store([block])
    for block in blocks[:64]:
        operators.delete(block)
    operators.delete(blocks[0])
    with pytest.raises(TooManyDeletions):
        store.calls.condemn(blocks[64])
    with pytest.raises(Refused, match="too many"):
        operators.delete(blocks[64])


def test_a_block_that_may_be_on_a_server_that_is_down_is_not_said_to_be_missing(store: Store) -> None:
    down = Server(store.calls, 1, lambda: False)
    operators = Operators({"here": Server(store.calls, 1), "away": down})
    with pytest.raises(Unreachable, match="away"):
        operators.delete(block_hash("somewhere"))


def test_children_come_before_parents_also_where_one_condemned_block_follows_another() -> None:
    random = Random(3)
    names = [struct.pack(">16s", str(i).encode()) for i in range(500)]
    parents = {names[i]: names[random.randrange(i)] for i in range(1, 500)}
    condemned = [names[3], names[40], names[0]]
    order = deepest_first(condemned, parents)
    assert sorted(order) == sorted(names)
    place = {block: i for i, block in enumerate(order)}
    assert all(place[block] < place[parent] for block, parent in parents.items())

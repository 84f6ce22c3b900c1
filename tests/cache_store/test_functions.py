"""What the Redis Functions promise, on a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from services.cache_store.functions import (
    MAX_BLOCKS,
    PINNED,
    ROOT,
    SOURCE,
    NewBlock,
    StoreFunctions,
    Unconfigured,
    owner_digest,
)
from services.cache_store.learning import learn
from services.cache_store.worth import AGES, CLASSES, Weights, age_bucket, value_class
from tests.cache_store.harness import ALICE, BOB, CLOCK_KEY, Record, Store, block_hash, chain, new_blocks
from tests.cache_store.oracle import MAX_RETENTIONS


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis)


# ---- who may write ------------------------------------------------------------------------------------


def test_of_two_writers_of_one_block_one_writes_and_the_other_follows(store: Store) -> None:
    blocks = chain("a", 3)
    first, second = store.reserve(blocks), store.reserve(blocks)
    assert first.statuses == ["W", "W", "W"]
    assert second.statuses == ["F", "F", "F"]
    assert store.calls.commit(second.fence, blocks) == [False] * 3
    assert store.calls.commit(first.fence, blocks) == [True] * 3
    assert store.store(blocks) == "HHH"


def test_a_block_being_written_is_not_found(store: Store) -> None:
    blocks = chain("a", 3)
    reserved = store.reserve(blocks)
    assert store.calls.lookup(blocks, ALICE, 0) == []
    store.calls.commit(reserved.fence, blocks[:2])
    assert store.calls.lookup(blocks, ALICE, 0) == [reserved.fence] * 2


def test_a_commit_under_an_old_fence_changes_nothing(store: Store) -> None:
    blocks = chain("a", 2)
    slow = store.reserve(blocks, life_ms=50)
    store.turn_clock(100)
    quick = store.reserve(blocks)
    assert quick.statuses == ["W", "W"]
    assert quick.dropped == [blocks[0] + slow.fence, blocks[1] + slow.fence]
    before = store.records()
    assert store.calls.commit(slow.fence, blocks) == [False, False]
    assert store.calls.abort(slow.fence, blocks) == []
    assert store.records() == before
    assert store.calls.commit(quick.fence, blocks) == [True, True]


def test_a_commit_may_be_repeated_because_its_answer_can_get_lost(store: Store) -> None:
    blocks = chain("a", 2)
    reserved = store.reserve(blocks)
    assert store.calls.commit(reserved.fence, blocks) == [True, True]
    assert store.calls.commit(reserved.fence, blocks) == [True, True]
    assert store.calls.usage().counts["committed"] == 2


@pytest.mark.parametrize("committed", [0, 1, 2, 3])
def test_a_writer_that_dies_between_two_calls_leaves_nothing_behind_after_its_deadline(
    store: Store, committed: int
) -> None:
    blocks = chain("a", 4)
    reserved = store.reserve(blocks, life_ms=1000)
    store.calls.commit(reserved.fence, blocks[:committed])
    store.turn_clock(999)
    assert store.calls.upkeep(100)[0] == 0
    store.turn_clock(1)
    reaped, _, dropped = store.calls.upkeep(100)
    assert reaped == 4 - committed
    assert set(dropped) == {block + reserved.fence for block in blocks[committed:]}
    assert store.length(blocks) == committed
    usage = store.calls.usage()
    assert (usage.blocks, usage.total, usage.reservations) == (committed, 100 * committed, 0)


def test_a_block_whose_parent_is_not_stored_is_refused(store: Store) -> None:
    blocks = chain("a", 3)
    reserved = store.calls.reserve(new_blocks(blocks)[1:], 1000)
    assert reserved.statuses == ["O", "O"]
    assert store.calls.usage().total == 0


def test_a_bad_payload_hides_its_block_and_all_that_follows_until_it_is_written_again(store: Store) -> None:
    blocks = chain("a", 5)
    store.store(blocks)
    fences = store.calls.lookup(blocks, ALICE, 0)
    assert store.calls.quarantine(blocks[2], fences[2], "crc") == [blocks[2] + fences[2]]
    assert store.length(blocks) == 2
    assert store.calls.usage().counts["quarantined:crc"] == 1
    assert store.calls.usage().total == 400
    assert store.calls.quarantine(blocks[2], fences[2], "crc") == [], "a second reader is too late"
    assert store.store(blocks) == "HHWHH"
    assert store.length(blocks) == 5


# ---- time -----------------------------------------------------------------------------------------------


def test_time_comes_from_redis_and_not_from_workers(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = StoreFunctions(redis)
    calls.configure(1000)
    monkeypatch.setattr("time.time", lambda: 1.0)
    blocks = chain("a", 1)
    before = server_time_ms(redis)
    calls.commit(calls.reserve(new_blocks(blocks), 1000).fence, blocks)
    after = server_time_ms(redis)
    packed = redis.hget(calls.key["blocks"], blocks[0])
    assert before <= Record.unpack(packed).last <= after


def server_time_ms(redis: Redis) -> int:
    seconds, microseconds = redis.time()
    return seconds * 1000 + microseconds // 1000


def test_fences_never_repeat_even_after_the_store_was_emptied(store: Store) -> None:
    fences = [store.reserve(chain(f"{i}", 1)).fence for i in range(3)]
    store.client.flushall()
    store.calls.configure(1000)
    store.turn_clock(2000)
    fences.append(store.reserve(chain("a", 1)).fence)
    assert fences == sorted(set(fences))


def test_a_replica_that_never_heard_of_the_latest_fences_gives_none_of_them_again(store: Store) -> None:
    store.reserve(chain("a", 1))
    heard = store.client.hget(store.calls.key["config"], "fence")
    latest = [store.reserve(chain(f"{i}", 1)).fence for i in range(5)]
    store.client.hset(store.calls.key["config"], "fence", heard)  # the replica takes over,
    store.turn_clock()  # after a millisecond at least
    assert store.reserve(chain("b", 1)).fence > max(latest)


# ---- leases ---------------------------------------------------------------------------------------------


def test_a_leased_run_outlives_everything_else_until_it_is_released(store: Store) -> None:
    blocks, others = chain("a", 3), chain("b", 3)
    store.store(blocks)
    store.store(others)
    store.turn_clock()
    fences = store.calls.lookup(blocks, ALICE, 10_000)
    store.turn_clock()
    store.calls.lookup(others, ALICE, 0)  # used later than the leased ones
    assert store.calls.evict(0)[1] == 300
    assert store.length(blocks) == 3
    store.calls.release(blocks[-1], fences[-1])
    assert store.calls.evict(0)[1] == 0


def test_a_lease_ends_by_itself_after_30_seconds_at_most(store: Store) -> None:
    blocks = chain("a", 3)
    store.store(blocks)
    store.calls.lookup(blocks, ALICE, 1_000_000)
    store.turn_clock(29_999)
    assert store.calls.evict(0)[1] == 300
    store.turn_clock(1)
    assert store.calls.evict(0)[1] == 0


def test_one_reader_s_release_does_not_end_another_s_lease(store: Store) -> None:
    blocks = chain("a", 2)
    store.store(blocks)
    fences = store.calls.lookup(blocks, ALICE, 10_000)
    store.calls.lookup(blocks, BOB, 10_000)
    store.calls.release(blocks[-1], fences[-1])
    assert store.calls.evict(0)[1] == 200
    store.calls.release(blocks[-1], fences[-1])
    assert store.calls.evict(0)[1] == 0


# ---- what is kept ---------------------------------------------------------------------------------------


def test_leaves_go_first_and_the_least_recently_used_of_them(store: Store) -> None:
    old, new = chain("old", 3), chain("new", 3)
    store.store(old)
    store.store(new)
    store.turn_clock()
    store.calls.lookup(old[:2], ALICE, 0)  # its first two blocks are now the newest
    order = [name[:16] for _ in range(6) for name in store.calls.evict(store.calls.usage().total - 1)[0]]
    assert order == [old[2], *reversed(new), *reversed(old[:2])]


def test_a_parent_that_ranks_below_a_leased_block_is_next_when_its_child_has_gone(store: Store) -> None:
    parent, child = chain("a", 2)
    (leased,) = chain("leased", 1)
    store.store([parent], priority=10)
    store.store([leased], priority=20)
    reserved = store.calls.reserve([NewBlock(child, parent, 100, ALICE, priority=30)], 1000)
    store.calls.commit(reserved.fence, [child])
    store.store(chain("precious", 1), priority=40)
    store.calls.lookup([leased], ALICE, 10_000)
    dropped, _, _ = store.calls.evict(200)
    assert [name[:16] for name in dropped] == [child, parent]


def test_a_block_never_pushes_out_one_of_higher_priority(store: Store) -> None:
    precious = chain("precious", 10)
    assert store.store(precious, priority=90) == "W" * 10
    assert store.store(chain("plain", 1)) == "N"
    assert store.length(precious) == 10
    assert store.store(chain("equal", 1), priority=90) == "W"
    assert store.length(precious) == 9


def test_a_reservation_never_evicts_the_prefix_that_it_extends(store: Store) -> None:
    blocks = chain("a", 12)
    assert store.store(blocks[:10]) == "W" * 10
    reserved = store.reserve(blocks)
    assert reserved.statuses == ["H"] * 10 + ["N", "O"]
    assert store.length(blocks) == 10


def test_a_call_evicts_at_most_64_blocks_and_says_that_more_is_possible(store: Store) -> None:
    for i in range(100):
        store.store(chain(f"{i}", 1), size=10)
    reserved = store.reserve(chain("big", 1), size=900)
    assert (reserved.statuses, len(reserved.dropped), reserved.more_room) == (["N"], 65, True)
    reserved = store.reserve(chain("big", 1), size=900)
    assert (reserved.statuses, reserved.more_room) == (["W"], False)
    dropped, total, more = store.calls.evict(0)
    assert (len(dropped), total, more) == (100 - 64 - 26, 900, False)


def test_the_total_never_exceeds_the_capacity(store: Store) -> None:
    for i in range(200):
        store.store(chain(f"{i}", 3), size=70)
        assert store.calls.usage().total <= 1000


def test_the_highest_live_priority_counts_and_a_use_at_a_lower_one_never_demotes(store: Store) -> None:
    (block,) = chain("a", 1)
    store.store([block], owner=ALICE, priority=80)
    for owner, priority in ((BOB, 10), (ALICE, 10), (ALICE, 35), (BOB, 0)):
        store.store([block], owner=owner, priority=priority)
        store.calls.retain([block], owner, priority, None)
        store.calls.lookup([block], owner, 0)
        assert store.records()[block].priority == 80
    store.calls.retain([block], BOB, 90, None)
    assert store.records()[block].priority == 90


def test_a_low_priority_applies_only_while_nobody_wants_more(store: Store) -> None:
    (block,) = chain("a", 1)
    store.store([block], owner=ALICE, priority=5)
    assert store.records()[block].priority == 5
    store.store([block], owner=BOB)  # the default, for good
    assert store.records()[block].priority == 35


def test_a_priority_falls_back_and_the_order_with_it_when_its_time_is_over(store: Store) -> None:
    kept, plain = chain("kept", 1), chain("plain", 1)
    store.store(kept, priority=90, ttl_ms=1000)
    store.store(plain)
    store.turn_clock(997)
    assert store.calls.upkeep(10)[1] == 0
    assert store.records()[kept[0]].priority == 90
    store.turn_clock(3)
    assert store.calls.upkeep(10)[1] == 1
    assert store.records()[kept[0]].priority == 35
    assert [name[:16] for name in store.calls.evict(100)[0]] == kept, "it is the older of two equals now"


def test_a_use_by_the_owner_starts_the_time_anew_and_nobody_ends_or_extends_it(store: Store) -> None:
    (block,) = chain("a", 1)
    store.store([block], owner=ALICE, priority=90, ttl_ms=1000)
    store.turn_clock(600)
    store.calls.lookup([block], ALICE, 0)
    store.turn_clock(600)
    store.calls.upkeep(10)
    assert store.records()[block].priority == 90, "600 ms after the owner's use"
    store.calls.lookup([block], BOB, 0)
    store.store([block], owner=BOB)  # a millisecond
    store.turn_clock(398)
    store.calls.upkeep(10)
    assert store.records()[block].priority == 90, "999 ms after it"
    store.turn_clock(1)
    store.calls.upkeep(10)
    assert store.records()[block].priority == 35, "a use by another neither cancelled nor extended it"


def test_of_too_many_retentions_the_strongest_are_kept(store: Store) -> None:
    (block,) = chain("a", 1)
    store.store([block])
    for i in range(3 * MAX_RETENTIONS):
        store.calls.retain([block], owner_digest(f"tenant {i}"), 40 + i, 1000)
    assert len(store.client.hget(store.calls.key["retained"], block)) == 21 * MAX_RETENTIONS
    assert store.records()[block].priority == 40 + 3 * MAX_RETENTIONS - 1


# ---- what it is worth -----------------------------------------------------------------------------------


def learn_that(store: Store, worth: Callable[[int], float]) -> None:
    """Every block of a class is worth the same, whatever its age."""
    density = tuple(worth(c) for c in range(CLASSES) for _ in range(AGES))
    calls = store.calls
    assert calls.learn(calls.events(), b"", Weights(density).to_bytes())


def evict_all(store: Store) -> list[bytes]:
    """In order, one a call."""
    return [
        name[:16] for _ in range(99) for name in store.calls.evict(max(0, store.calls.usage().total - 1))[0]
    ]


def test_the_class_that_is_worth_least_goes_first_whatever_was_used_last_or_asked_for(store: Store) -> None:
    (once,), (often,), (wished,) = chain("once", 1), chain("often", 1), chain("wished", 1)
    store.store([often])
    for _ in range(3):
        store.calls.lookup([often], ALICE, 0)
    store.store([once])
    store.store([wished], priority=90)
    worth = {value_class(1, 4): 3.0, value_class(1, 1): 2.0, value_class(3, 1): 1.0}
    learn_that(store, lambda c: worth.get(c, 9.0))
    assert evict_all(store) == [wished, once, often]


def test_ten_minutes_after_anybody_learned_plain_priorities_hold_again(store: Store) -> None:
    (low,), (high,) = chain("low", 1), chain("high", 1)
    store.store([high], priority=90)
    store.store([low], priority=10)
    learn_that(store, lambda c: -c)  # the higher, the sooner
    store.turn_clock(600_000)
    assert evict_all(store) == [low, high]


def test_a_wrong_priority_cannot_keep_newcomers_out_once_it_is_learned(store: Store) -> None:
    store.store(chain("precious", 10), priority=90)
    assert store.store(chain("a", 1)) == "N"
    learn_that(store, lambda c: 1.0)
    assert store.store(chain("a", 1)) == "W"


def test_what_a_user_asks_for_last_counts_for_the_worth_and_not_for_the_priority(store: Store) -> None:
    (block,) = chain("a", 1)
    store.store([block], owner=ALICE, priority=80)
    assert store.records()[block].tier == 3
    store.calls.retain([block], BOB, 10, None)
    assert store.records()[block].tier == 3, "another's word lowers nothing"
    store.calls.retain([block], BOB, 50, None)
    store.calls.retain([block], ALICE, 10, None)
    assert (store.records()[block].tier, store.records()[block].priority) == (2, 80), "BOB's last word"
    store.calls.retain([block], ALICE, 80, None)
    assert store.records()[block].tier == 3


def test_a_block_that_comes_back_is_counted_as_before_until_its_ghost_dies(store: Store) -> None:
    for wait_ms, uses in ((1000, 4), (1_900_000, 1)):
        (block,) = chain(f"{wait_ms}", 1)
        store.store([block])
        for _ in range(2):
            store.calls.lookup([block], ALICE, 0)
        assert store.records()[block].uses == 3
        store.calls.evict(0)
        assert store.calls.usage().ghosts == 1
        store.turn_clock(wait_ms)
        store.store([block])
        assert store.records()[block].uses == uses
        assert store.calls.usage().ghosts == 0
        store.calls.quarantine(block, store.calls.lookup([block], ALICE, 0)[0], "crc")


def test_hits_and_deaths_are_counted_by_class_and_age_until_somebody_learns(store: Store) -> None:
    used, forgotten = chain("used", 5), chain("forgotten", 2)
    store.store(used)
    store.store(forgotten)
    store.turn_clock(60_000)
    store.calls.lookup(used, ALICE, 0)
    store.calls.evict(0)
    store.turn_clock(1_900_000)
    store.calls.upkeep(10)
    events = store.calls.events().events()
    assert events.lookups == 1
    assert events.hits == {(value_class(1, 1), age_bucket(60_001)): 5}
    assert events.deaths == {
        (value_class(1, 1), age_bucket(1_960_000)): 2,
        (value_class(1, 2), age_bucket(1_900_000)): 5,
    }
    learn_that(store, lambda c: 1.0)
    assert store.calls.events().counts == {}


def test_of_two_that_learn_from_the_same_one_is_too_late_and_changes_nothing(store: Store) -> None:
    store.store(chain("a", 3))
    store.calls.lookup(chain("a", 3), ALICE, 0)
    first, second = store.calls.events(), store.calls.events()
    assert learn(store.calls, first)
    store.calls.lookup(chain("a", 3), ALICE, 0)
    assert not learn(store.calls, second)
    assert store.calls.events().lookups == 1


def test_a_pinned_block_outlives_all_worth_until_its_time_is_over(store: Store) -> None:
    (pinned,) = chain("pinned", 1)
    store.store([pinned], owner=ALICE)
    store.calls.retain([pinned], BOB, PINNED, 60_000)
    learn_that(store, lambda c: 1.0 if c < 12 else 0.0)
    for i in range(20):
        assert store.store(chain(f"{i}", 1), priority=100) == "W"
    store.calls.evict(0)
    assert set(store.records()) == {pinned}
    store.turn_clock(60_000)
    store.calls.evict(0)
    assert store.records() == {}


# ---- tenants --------------------------------------------------------------------------------------------


def test_an_owner_at_its_quota_makes_room_among_its_own_blocks(store: Store) -> None:
    store.store(chain("bob", 3), owner=BOB)
    store.calls.govern(ALICE, quota=300)
    for i in range(5):
        assert store.store(chain(f"{i}", 1), owner=ALICE) == "W"
    assert store.calls.usage().owners == {ALICE: 300, BOB: 300}
    assert [store.length(chain(f"{i}", 1)) for i in range(5)] == [0, 0, 1, 1, 1]
    assert store.store(chain("long", 4), owner=ALICE) == "WWWN", "its own prefix is no victim"
    store.calls.govern(ALICE)
    assert store.store(chain("more", 4), owner=ALICE) == "WWWW"


def test_a_quota_holds_for_blocks_stored_before_it_was_set(store: Store) -> None:
    for i in range(8):
        store.store(chain(f"{i}", 1), owner=ALICE)
    store.calls.govern(ALICE, quota=300)
    assert store.store(chain("new", 1), owner=ALICE) == "W"
    assert store.calls.usage().owners == {ALICE: 300}


def test_what_an_owner_has_under_its_floor_goes_for_nobody_but_itself(store: Store) -> None:
    for i in range(4):
        store.store(chain(f"alice {i}", 1), owner=ALICE)
    store.calls.govern(ALICE, floor=200)
    for i in range(20):
        assert store.store(chain(f"bob {i}", 1), owner=BOB) == "W"
        assert store.calls.usage().owners[ALICE] >= 200
    store.calls.evict(0)
    assert store.calls.usage().owners == {ALICE: 200}
    store.calls.govern(ALICE, floor=200, quota=200)
    assert store.store(chain("alice again", 2), owner=ALICE) == "WW"
    assert store.calls.usage().owners == {ALICE: 200}


def test_thousands_of_blocks_under_a_floor_do_not_hide_those_behind_them(store: Store) -> None:
    store.calls.configure(1_000_000)
    store.calls.govern(ALICE, floor=1_000_000)
    for i in range(30):
        blocks = [NewBlock(block_hash(f"{i}/{j}"), ROOT, 1, ALICE) for j in range(100)]
        store.calls.commit(store.calls.reserve(blocks, 1000).fence, [block.hash for block in blocks])
        store.turn_clock()
    store.store(chain("bob", 1), owner=BOB, size=1)
    for _ in range(4):
        store.calls.evict(0)
    assert store.calls.usage().owners == {ALICE: 3000}


# ---- the library ----------------------------------------------------------------------------------------


def test_functions_are_loaded_when_the_server_has_lost_them(store: Store) -> None:
    store.client.function_flush()
    assert store.store(chain("a", 2)) == "WW"


def test_two_releases_live_side_by_side(redis: Redis) -> None:
    old, new = StoreFunctions(redis), StoreFunctions(redis, source=SOURCE + "\n-- a later release\n")
    old.configure(1000)
    blocks = chain("a", 2)
    for _ in range(2):
        for calls in (old, new):
            calls.commit(calls.reserve(new_blocks(blocks), 1000).fence, blocks)
            assert calls.peek(blocks) == 2
    assert len(redis.function_list()) == 2


def test_all_that_the_functions_touch_is_declared_and_in_one_cluster_slot(store: Store) -> None:
    store.store(chain("a", 3), priority=80, ttl_ms=1000)
    store.calls.evict(200)
    touched = set(store.client.keys()) - {CLOCK_KEY.encode()}
    assert touched <= set(store.calls.key.values())
    assert all(b":{s0}:" in key for key in touched)


@pytest.mark.parametrize(
    "key", ["blocks", "leaves", "writing", "retained", "expiring", "bytes", "dropped", "owned"]
)
def test_a_store_that_loses_one_of_its_keys_goes_on_at_worst_from_empty(store: Store, key: str) -> None:
    identity = store.calls.attach(None)
    for i in range(8):
        store.store(chain(f"old {i}", 1), priority=i, ttl_ms=1000 if i % 2 else None)
    store.client.delete(store.calls.key[key])
    store.turn_clock(2000)
    store.calls.upkeep(100)
    for i in range(30):
        assert store.store(chain(f"new {i}", 3), priority=90) == "WWW"
    usage = store.calls.usage()
    assert usage.total == sum(record.size for record in store.records().values()) <= 1000
    assert usage.blocks == len(store.records())
    assert usage.leaves == sum(record.children == 0 for record in store.records().values())
    if key in ("blocks", "leaves", "bytes"):
        assert usage.counts["begun_anew"] == 1
        assert store.calls.attach(None) != identity, "so that workers forget what they believe"


def test_a_store_without_a_capacity_refuses_and_says_why(redis: Redis) -> None:
    with pytest.raises(Unconfigured, match="no capacity"):
        StoreFunctions(redis).reserve(new_blocks(chain("a", 1)), 1000)


def test_attach_sets_a_capacity_only_where_none_is_and_names_the_contents(redis: Redis) -> None:
    calls = StoreFunctions(redis)
    identity = calls.attach(500)
    assert calls.attach(900) == identity
    assert calls.usage().capacity == 500
    redis.flushall()
    assert calls.attach(900) != identity
    assert calls.usage().capacity == 900


def test_peek_and_lookup_of_nothing_are_nothing(store: Store) -> None:
    assert (store.calls.peek([]), store.calls.lookup([], ALICE, 0)) == (0, [])
    assert store.calls.reserve([], 1000).statuses == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda calls: calls.peek([bytes(16)] * (MAX_BLOCKS + 1)), "at most 1024 blocks in a call, got 1025"),
        (lambda calls: calls.retain([bytes(16)], ALICE, 102, None), "priority must be 0 to 100, got 102"),
        (lambda calls: calls.retain([bytes(16)], ALICE, PINNED, None), "a pinned block needs a time to live"),
        (lambda calls: calls.govern(ALICE, quota=-1), "quota must be 0 bytes or more, .* got -1"),
        (lambda calls: calls.govern(ALICE, quota=5, floor=6), "a floor at most the quota, got 6"),
        (lambda calls: calls.configure(0), "capacity must be positive, got 0"),
        (lambda calls: NewBlock(bytes(16), ROOT, 1 << 32, ALICE), "size must be 1 to 4294967295 bytes, got"),
        (lambda calls: NewBlock(bytes(16), ROOT, 1, ALICE, priority=-1), "priority must be 0 to 100, got -1"),
    ],
)
def test_what_the_functions_cannot_take_is_refused_by_name(store: Store, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(store.calls)

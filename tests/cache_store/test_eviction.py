"""The policy without a server, and that the Redis Functions follow it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from benchmarks.eviction import ThroughRedis
from benchmarks.eviction_policies import LeafFirst, Ours, replay
from benchmarks.eviction_workloads import GENERATORS, Request, hints, unique_blocks
from services.cache_store.embedded import LocalRedis
from services.cache_store.eviction import ValuePolicy
from services.cache_store.worth import GHOST_LIFE_MS, History


def chat_and_once(seed: int, requests: int) -> list[Request]:
    """Prompts that come back, some often, among as many that never do."""
    random = Random(seed)
    ids = iter(range(10**9))
    sessions = [[next(ids) for _ in range(random.randint(1, 6))] for _ in range(60)]
    found = []
    for number in range(requests):
        session = sessions[min(int(random.expovariate(0.1)), 59)]
        if number % 2:
            session = [next(ids) for _ in range(random.randint(1, 8))]
        elif random.random() < 0.3:
            session.append(next(ids))
        found.append(Request(number * 700, tuple(session)))
    return found


# ---- the pure policy -------------------------------------------------------------------------------------


def test_the_least_recently_used_leaf_goes_while_nothing_is_known() -> None:
    policy = ValuePolicy(4, None)
    policy.write([1, 2], None, 0)
    policy.write([3, 4], None, 1)
    policy.lookup([1, 2], 2)
    policy.write([5], None, 3)
    assert [id in policy for id in (1, 2, 3, 4, 5)] == [True, True, True, False, True]


def test_a_run_does_not_evict_its_own_prefix() -> None:
    policy = ValuePolicy(3, None)
    assert policy.write([1, 2, 3, 4, 5], None, 0) == 3
    assert policy.lookup([1, 2, 3, 4, 5], 1) == 3


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(5, 60), st.booleans())
def test_it_never_holds_more_than_its_capacity_nor_a_block_without_the_one_before_it(
    seed: int, capacity: int, learns: bool
) -> None:
    policy = ValuePolicy(capacity, History() if learns else None)
    parents: dict[int, int | None] = {}
    for number, request in enumerate(chat_and_once(seed, 80)):
        found = policy.lookup(request.ids, request.at_ms)
        policy.write(request.ids[found:], request.ids[found - 1] if found else None, request.at_ms)
        parents.update(zip(request.ids, (None, *request.ids), strict=False))
        if number % 20 == 0:
            policy.fold()
        assert len(policy) <= capacity
        stored = [id for id in parents if id in policy]
        assert all(parents[id] is None or parents[id] in policy for id in stored)


def test_a_policy_that_never_learned_is_leaf_first_lru() -> None:
    requests = chat_and_once(3, 600)
    policy, lru = ValuePolicy(60, None), LeafFirst(60)
    for request in requests:
        found = policy.lookup(request.ids, request.at_ms)
        policy.write(request.ids[found:], request.ids[found - 1] if found else None, request.at_ms)
        assert found == lru.request(request, None)


def test_a_block_that_comes_back_goes_on_counting_its_uses_unless_its_ghost_has_died() -> None:
    for wait_ms, uses in ((1000, 4), (GHOST_LIFE_MS + 10_000, 1)):
        policy = ValuePolicy(1, History())
        policy.write([1], None, 0)
        policy.lookup([1], 1)
        policy.lookup([1], 2)
        policy.write([2], None, 3)
        assert 1 not in policy
        policy.write([1], None, 3 + wait_ms)
        assert policy.uses(1) == uses


@pytest.mark.slow
@pytest.mark.parametrize("workload", sorted(GENERATORS))
def test_hints_that_are_always_wrong_never_cost_more_than_a_hundredth_of_lru(workload: str) -> None:
    requests = GENERATORS[workload](5)
    said = hints(requests, 0.0, 5)
    for share in (0.01, 0.05, 0.2):
        capacity = int(share * unique_blocks(requests))
        lru = replay(LeafFirst(capacity), requests, None)
        assert replay(Ours(capacity), requests, said) >= 0.99 * lru


def test_who_leaves_is_told_with_its_worth_and_the_margin_is_the_next_ones() -> None:
    left: list[tuple[int, float]] = []
    policy = ValuePolicy(3, History(), lambda id, worth: left.append((id, worth)))
    policy.fold()
    policy.write([1], None, 0)
    policy.write([2], None, 1000)
    assert policy.margin(2000) == 0.0, "there is room"
    policy.write([3], None, 2000)
    margin = policy.margin(60_000)
    assert margin > 0
    policy.write([4], None, 60_000)
    assert left == [(1, margin)]


# ---- in Redis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [None, 0.8])
def test_redis_keeps_the_same_blocks_as_the_pure_policy(any_server: LocalRedis, right: float | None) -> None:
    requests = chat_and_once(1, 1000)
    said = hints(requests, right, 1) if right is not None else [None] * len(requests)
    with Redis.from_url(any_server.socket_url) as redis:
        for capacity in (40, 200):
            pure, real = Ours(capacity), ThroughRedis(redis, capacity)
            for number, (request, hint) in enumerate(zip(requests, said, strict=True)):
                assert pure.request(request, hint) == real.request(request, hint), f"request {number}"
            assert real.evicted() > 500


def test_redis_says_how_full_it_is_and_what_goes_next_is_worth(any_server: LocalRedis) -> None:
    requests = chat_and_once(1, 300)
    with Redis.from_url(any_server.socket_url) as redis:
        pure, real = Ours(40), ThroughRedis(redis, 40)
        for request in requests:
            pure.request(request, None)
            real.request(request, None)
            margin = real.margin()
            assert margin.total == len(pure) <= margin.capacity == 40
            if margin.total == 40:
                assert margin.density == pure.margin(request.at_ms)
        assert margin.total == 40

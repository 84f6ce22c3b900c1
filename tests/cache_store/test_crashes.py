"""Writers, readers and evictors whose commands interleave in any order; each may die between any two of them.
Payloads are SET and UNLINKed by them, as by the client, in commands of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from services.cache_store.embedded import LocalRedis
from services.cache_store.functions import ROOT
from tests.cache_store.harness import ALICE, BOB, Store, chain, new_blocks
from tests.cache_store.oracle import LOST, READY, WRITING

PREFIX = "test:payload:"
#: Two prompts with the first two blocks in common, and one apart. There is room for seven blocks.
SHARED = chain("shared", 2)
PROMPTS = [[*SHARED, *chain("one", 2)], [*SHARED, *chain("two", 2)], chain("apart", 4)]
CAPACITY = 700
#: Names of payloads that were written after their reservation had ended: if their writer dies before it sees
#: that, nothing but the backstop of a day takes them away.
TOO_LATE = "test:too late"

Actor = Iterator[None]


def key(name: bytes) -> bytes:
    return PREFIX.encode() + name


def unlink(store: Store, names: list[bytes]) -> Actor:
    if names:
        store.client.unlink(*map(key, names))
        yield
        store.calls.unlinked(names)


def writer(store: Store, hashes: list[bytes], owner: bytes) -> Actor:
    reserved = store.calls.reserve(new_blocks(hashes, owner=owner), 1000)
    yield
    yield from unlink(store, reserved.dropped)
    won = [hash_ for hash_, status in zip(hashes, reserved.statuses, strict=True) if status == "W"]
    for hash_ in won:
        store.client.set(key(hash_ + reserved.fence), hash_ + reserved.fence)
        record = store.records().get(hash_)
        if record is None or record.fence != reserved.fence:
            store.client.sadd(TOO_LATE, hash_ + reserved.fence)
        yield
    done = store.calls.commit(reserved.fence, won)
    yield
    late = [hash_ + reserved.fence for hash_, mine in zip(won, done, strict=True) if not mine]
    if late:
        store.client.unlink(*map(key, late))


def reader(store: Store, hashes: list[bytes], owner: bytes) -> Actor:
    fences = store.calls.lookup(hashes, owner, 500)
    until = store.now + 500
    yield
    for hash_, fence in zip(hashes, fences, strict=False):
        payload = store.client.get(key(hash_ + fence))
        assert payload == hash_ + fence or store.now >= until, "a leased block has its own payload"
        yield
    if fences:
        store.calls.release(hashes[len(fences) - 1], fences[-1])


def evictor(store: Store, target: int) -> Actor:
    dropped, _, _ = store.calls.evict(target)
    yield
    yield from unlink(store, dropped)


def start(store: Store, kind: int, prompt: int, owner: bytes) -> Actor:
    if kind == 0:
        return reader(store, PROMPTS[prompt], owner)
    if kind == 1:
        return evictor(store, 100 * prompt)
    return writer(store, PROMPTS[prompt], owner)


def check_books(store: Store, capacity: int = CAPACITY) -> None:
    records = store.records()
    for hash_, record in records.items():
        assert record.parent == ROOT or record.parent in records
        assert record.children == sum(other.parent == hash_ for other in records.values())
        assert record.children or record.state != LOST
    leaves = {hash_ for hash_, record in records.items() if record.state == READY and not record.children}
    assert set(store.client.zrange(store.calls.key["leaves"], 0, -1)) == leaves
    assert store.client.zcard(store.calls.key["owned"]) == len(leaves)
    lost = {hash_ for hash_, record in records.items() if record.state == LOST}
    assert set(store.client.zrange(store.calls.key["lost"], 0, -1)) == lost
    usage = store.calls.usage()
    assert usage.total == sum(usage.owners.values()) == sum(record.size for record in records.values())
    assert usage.total <= capacity


def check_payloads(store: Store) -> None:
    """Nothing missing; what is left over is known by name."""
    there = {name.removeprefix(PREFIX.encode()) for name in store.client.keys(PREFIX + "*")}
    records = store.records()
    ready = {hash_ + record.fence for hash_, record in records.items() if record.state == READY}
    assert ready <= there
    known = store.client.sunion(store.calls.key["dropped"], TOO_LATE)
    assert there - ready <= known


#: Start an actor, let the n-th go on by a command, kill it, or let time pass.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(0, 4), st.integers(0, 2), st.sampled_from([ALICE, BOB])),
        st.tuples(st.just("go"), st.integers(0, 5)),
        st.tuples(st.just("go"), st.integers(0, 5)),
        st.tuples(st.just("go"), st.integers(0, 5)),
        st.tuples(st.just("kill"), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.sampled_from([1, 100, 600])),
    ),
    max_size=60,
)


@pytest.mark.slow
def test_whoever_dies_wherever_the_books_add_up_and_every_ready_block_has_its_payload(
    any_server: LocalRedis,
) -> None:
    with Redis.from_url(any_server.socket_url) as client:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(steps)
        def any_order(plan: list[tuple]) -> None:  # type: ignore[type-arg]
            store = Store(client, CAPACITY)
            actors: list[Actor] = []
            for what, *arguments in plan:
                store.turn_clock()
                if what == "start":
                    actors.append(start(store, *arguments))
                elif what == "wait":
                    store.turn_clock(arguments[0])
                elif actors:
                    at = arguments[0] % len(actors)
                    if what == "kill" or next(actors[at], "done") == "done":
                        del actors[at]
                check_books(store)
            store.turn_clock(60_000)  # all are dead
            store.calls.upkeep(100)
            check_books(store)
            assert not any(record.state == WRITING for record in store.records().values())
            check_payloads(store)
            store.calls.evict(0)
            assert store.records() == {}
            assert store.calls.usage().total == 0, "no byte is leaked"

        any_order()


@pytest.mark.parametrize("survives", range(8))
def test_a_writer_that_dies_after_any_command_leaves_what_it_committed_or_nothing(
    redis: Redis, survives: int
) -> None:
    store = Store(redis, CAPACITY)
    dying = writer(store, PROMPTS[0], ALICE)
    for _ in range(survives):
        next(dying, None)
    rival = writer(store, PROMPTS[1], BOB)
    for _ in rival:
        pass
    store.turn_clock(2000)
    for _ in writer(store, PROMPTS[1], BOB):
        pass
    check_books(store)
    check_payloads(store)
    assert store.length(PROMPTS[1]) == 4, "the other writer wrote what the dead one had reserved"
    assert store.length(PROMPTS[0]) == (4 if survives >= 6 else 2)

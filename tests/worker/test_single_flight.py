"""Several engines in one process and a real Redis: a prompt that comes to all of them is computed by one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from redis import Redis

from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.functions import ROOT, NewBlock, StoreFunctions
from services.worker.store_tier import RedisStoreTier
from tests.worker.requests import make_request, prompt
from tests.worker.test_engine import wait_for
from tests.worker.test_engine_loads import Running, running

LENGTH = 3900  # of a prompt: 31 steps
WORKERS = 3

#: What the workers believe of themselves, about a quarter of the truth: how long one waits follows from it,
#: and here it should not be the machine's other work that ends a flight.
TOKENS_PER_S = 1500

#: An answer that comes later than the engine waits for it has cost the steps that it computed meanwhile.
SOME = 600


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LocalRedis]:
    server = start_redis(find_server(), max_memory=512 << 20)
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: LocalRedis) -> LocalRedis:
    with Redis.from_url(shared_server.socket_url) as client:
        client.flushall()
    return shared_server


@pytest.fixture
def redis(server: LocalRedis) -> Iterator[Redis]:
    with Redis.from_url(server.socket_url) as client:
        yield client


@pytest.fixture
def workers(server: LocalRedis) -> Iterator[list[Running]]:
    """In the end nothing is held and no thread is left."""
    started = [Running(server.socket_url) for _ in range(WORKERS)]
    yield started
    for worker in started:
        assert not worker.engine._loads
        assert worker.engine._pool.referenced == 0
    for worker in started:
        worker.engine.stop()
        tier_of(worker).close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("store-")]


@pytest.fixture(scope="module")
def cold() -> list[int]:
    with running(None) as alone:
        submit(alone)
        wait_for(lambda: alone.engine.idle)
        return alone.tokens["a"]


def submit(
    worker: Running,
    length: int = LENGTH,
    seed: int = 1,
    key: str = "a",
    tokens_per_s: float = TOKENS_PER_S,
) -> None:
    worker.engine._rates.prefill_tokens_per_s = tokens_per_s
    worker.engine.submit(make_request(key, prompt(length, seed), max_tokens=6, ignore_eos=True))


def computed(*workers: Running) -> int:
    return sum(worker.engine.counters.prefill_tokens for worker in workers)


def counted(workers: list[Running], what: str) -> int:
    return sum(tier_of(worker).counts().get(what, 0) for worker in workers)


def tier_of(worker: Running) -> RedisStoreTier:
    assert worker.tier is not None
    return worker.tier


def end(*workers: Running) -> None:
    wait_for(lambda: all(worker.engine.idle for worker in workers))


def claims(redis: Redis) -> list[bytes]:
    keys: list[bytes] = redis.keys("*:claim*")  # type: ignore[assignment]
    assert all(redis.pttl(key) != -1 for key in keys), "a claim ends by itself"
    return keys


def winner(workers: list[Running]) -> Running:
    """The worker that computes, once others follow it and have got something of it."""
    followers = [worker for worker in workers if counted([worker], "followed_blocks")]
    wait_for(lambda: counted(workers, "follows") == len(workers) - 1)
    wait_for(lambda: counted(workers, "followed_blocks") > 0)
    (one,) = [worker for worker in workers if counted([worker], "claims")]
    assert one not in followers
    return one


def test_a_prompt_that_comes_to_all_is_computed_once(
    workers: list[Running], redis: Redis, cold: list[int]
) -> None:
    for worker in workers:
        submit(worker)
    end(*workers)
    assert LENGTH <= computed(*workers) <= LENGTH + SOME
    assert counted(workers, "follows") == WORKERS - 1
    assert counted(workers, "follows_recomputed") == 0
    assert [worker.tokens["a"] for worker in workers] == [cold] * WORKERS
    wait_for(lambda: not claims(redis))


def test_who_comes_in_the_middle_loads_what_is_there_and_follows_for_the_rest(
    workers: list[Running], cold: list[int]
) -> None:
    first, second, _ = workers
    submit(first)
    wait_for(lambda: counted([first], "written:stored") >= 60)
    submit(second)
    end(*workers)
    # What the store has is computed from the front while it comes from the back.
    assert computed(*workers) <= LENGTH + 60 * 16 + SOME
    assert second.starts["a"].store_tokens >= LENGTH - 60 * 16 - SOME
    assert counted([second], "follows") == 1
    assert second.tokens["a"] == cold


def test_prompts_that_part_in_the_middle_share_what_they_can(workers: list[Running]) -> None:
    first, second, _ = workers
    submit(first)
    tokens = prompt(LENGTH, 1)[: LENGTH // 2] + prompt(LENGTH // 4, 2)
    second.engine._rates.prefill_tokens_per_s = TOKENS_PER_S
    second.engine.submit(make_request("a", tokens, max_tokens=6, ignore_eos=True))
    end(*workers)
    assert computed(*workers) <= LENGTH + LENGTH // 4 + SOME


def test_when_who_computes_is_cancelled_one_of_the_others_goes_on_from_there(
    workers: list[Running], redis: Redis, cold: list[int]
) -> None:
    for worker in workers:
        submit(worker)
    one = winner(workers)
    one.engine.cancel("a")
    others = [worker for worker in workers if worker is not one]
    end(*workers)
    assert [worker.tokens["a"] for worker in others] == [cold] * 2
    assert computed(*others) <= LENGTH + SOME, "not both"
    assert computed(*workers) <= LENGTH + 2 * SOME
    wait_for(lambda: not claims(redis))


def test_when_who_computes_falls_silent_its_claim_ends_and_another_goes_on(
    workers: list[Running], redis: Redis, cold: list[int]
) -> None:
    for worker in workers:
        submit(worker)
    one = winner(workers)
    (shard,) = tier_of(one)._shards  # as a killed one's, its threads end where they are
    shard.writer.stop()
    shard.reader.flights.stop()
    others = [worker for worker in workers if worker is not one]
    end(*workers)
    assert [worker.tokens["a"] for worker in others] == [cold] * 2
    assert computed(*others) <= LENGTH + SOME
    wait_for(lambda: not claims(redis))


def test_a_block_that_a_dead_writer_has_reserved_ends_the_claim_before_the_reservation(
    workers: list[Running], redis: Redis, cold: list[int]
) -> None:
    """What is stored behind it cannot be found, so nobody should wait for that."""
    reserved = 50
    functions = StoreFunctions(redis)
    functions.configure(128 << 20)
    hashes = make_request("a", prompt(LENGTH, 1)).hashes
    blocks = [
        NewBlock(block, parent, 100, b"nobody 1")
        for block, parent in zip(hashes[: reserved + 1], [ROOT, *hashes], strict=False)
    ]
    held = functions.reserve(blocks, life_ms=60_000)
    functions.abort(held.fence, hashes[:reserved])
    submit(workers[0])
    submit(workers[1])
    winner(workers[:2])
    began_s = time.monotonic()
    wait_for(lambda: counted(workers, "claims_followed") and not claims(redis))
    assert time.monotonic() - began_s < 8, "a second, and some for a busy machine; not sixty"
    end(*workers)
    assert counted(workers, "follows_recomputed") == 1
    assert [worker.tokens["a"] for worker in workers[:2]] == [cold] * 2


def test_a_claim_is_held_until_all_is_stored_and_not_longer(workers: list[Running], redis: Redis) -> None:
    one = workers[0]
    submit(one)
    wait_for(lambda: claims(redis))
    wait_for(lambda: not claims(redis))
    assert counted([one], "written:stored") >= LENGTH // 16
    end(one)


def test_a_prompt_that_is_computed_in_no_time_is_not_claimed(workers: list[Running], redis: Redis) -> None:
    for worker in workers:
        submit(worker, length=50)
    end(*workers)
    assert counted(workers, "loads") == WORKERS
    assert counted(workers, "claims") == counted(workers, "follows") == 0


def test_who_is_free_does_not_wait_for_one_with_a_queue(workers: list[Running], cold: list[int]) -> None:
    """And takes the claim over, so that the one with the queue has nothing left to compute."""
    busy, free, _ = workers
    submit(busy, seed=2, key="before")
    submit(busy)
    wait_for(lambda: counted([busy], "claims") == 2)
    submit(free)
    end(free)
    assert not busy.engine.idle
    end(busy)
    assert computed(busy) <= LENGTH + SOME
    assert counted([busy], "follows") == 1
    assert free.tokens["a"] == busy.tokens["a"] == cold


def test_who_is_overtaken_by_a_faster_worker_follows_it_from_where_it_is(
    workers: list[Running], cold: list[int]
) -> None:
    slow, fast, _ = workers
    submit(slow, tokens_per_s=TOKENS_PER_S / 4)
    wait_for(lambda: counted([slow], "claims") == 1)
    submit(fast)
    end(*workers)
    assert counted([fast], "claims") == counted([slow], "follows") == 1
    assert slow.tokens["a"] == fast.tokens["a"] == cold


def test_a_store_that_freezes_costs_a_second_and_no_token(cold: list[int]) -> None:
    server = start_redis(find_server(), max_memory=256 << 20)
    one, other = Running(server.url), Running(server.url)
    try:
        for worker in (one, other):
            submit(worker)
        computing = winner([one, other])
        follower = other if computing is one else one
        server.process.send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        before = computed(follower)
        wait_for(lambda: computed(follower) > before)
        assert time.monotonic() - frozen_s < 3, "a second, and a step on a busy machine"
        end(one, other)
        assert one.tokens["a"] == other.tokens["a"] == cold
    finally:
        server.process.send_signal(signal.SIGCONT)
        for worker in (one, other):
            worker.engine.stop()
            tier_of(worker).close()
        server.stop()

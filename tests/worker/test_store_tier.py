"""The Redis store tier as the engine uses it: start, poll, offer, and never a surprise."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from redis import Redis

from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.functions import LAYOUT, StoreFunctions
from services.worker.store_tier import RedisStoreTier, StoreTierConfig
from services.worker.tiers import Load, LoadResult, OfferedBlock
from tests.cache_store.harness import chain
from tests.cache_store.proxy import SlowProxy

SHAPE = (2, 2, 2, 16, 64)
CAPACITY = 64 << 20
SLOW_COMPUTE_S = 1.0  # a block: any load is worth it
FAST_COMPUTE_S = 1e-7  # a block: no load is


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LocalRedis]:
    server = start_redis(find_server(), max_memory=256 << 20)
    yield server
    server.stop()


@pytest.fixture
def redis(shared_server: LocalRedis) -> Iterator[Redis]:
    with Redis.from_url(shared_server.socket_url) as client:
        client.flushall()
        yield client


@pytest.fixture
def redis_server(shared_server: LocalRedis, redis: Redis) -> LocalRedis:
    """A running, empty server. A test that stops it starts its own: `server`."""
    return shared_server


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    server = start_redis(find_server(), max_memory=256 << 20)
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGCONT)
    server.stop()


@pytest.fixture
def tiers() -> Iterator[Callable[..., RedisStoreTier]]:
    """Makes tiers and closes them; afterwards none of their threads is left."""
    made: list[RedisStoreTier] = []

    def make(url: str, dtype: torch.dtype = torch.float32, **changes: object) -> RedisStoreTier:
        settings = {"fingerprint": b"f" * 16, "block_shape": SHAPE, "capacity": CAPACITY, **changes}
        made.append(RedisStoreTier(StoreTierConfig(url=url, dtype=dtype, **settings)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for tier in made:
        tier.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("store-")]


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def result_of(load: Load | None, timeout_s: float = 20.0) -> LoadResult:
    assert load is not None
    results: list[LoadResult] = []

    def done() -> bool:
        result = load.poll()
        if result is not None:
            results.append(result)
        return result is not None

    wait_until(done, timeout_s)
    return results[0]


def costs(count: int, each_s: float = SLOW_COMPUTE_S) -> list[float]:
    return [each_s * (i + 1) for i in range(count)]


def offers(hashes: list[bytes], dtype: torch.dtype = torch.float32, priority: int = 35) -> list[OfferedBlock]:
    root = b"r" * 16
    generator = torch.Generator().manual_seed(hashes[0][0])
    return [
        OfferedBlock(
            hash=hash_,
            parent=parent,
            depth=depth,
            kv=torch.randn(SHAPE, generator=generator).to(dtype),
            priority=priority,
            ttl_s=None,
            tenant="t",
        )
        for depth, (hash_, parent) in enumerate(zip(hashes, [root, *hashes], strict=False))
    ]


def store_all(tier: RedisStoreTier, blocks: list[OfferedBlock]) -> None:
    assert tier.offer(blocks) == len(blocks)
    stored: set[bytes] = set()

    def all_stored() -> bool:
        stored.update(tier.take_events()[0])
        return stored >= {block.hash for block in blocks}

    wait_until(all_stored)


def written(tier: RedisStoreTier) -> int:
    """Blocks that the tier is done with, whatever became of them."""
    return sum(count for name, count in tier.counts().items() if name.startswith("written:"))


def port_of(server: LocalRedis) -> int:
    return int(server.url.split(":")[2].split("/")[0])


# ---- sharing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_of_one_worker_come_to_another_bit_by_bit(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier], dtype: torch.dtype
) -> None:
    one, other = tiers(redis_server.url, dtype), tiers(redis_server.socket_url, dtype)
    hashes = chain("a", 40)
    blocks = offers(hashes, dtype)
    store_all(one, blocks)
    result = result_of(other.start_load(hashes, costs(40), "t"))
    assert len(result.blocks) == 40
    assert result.seconds > 0
    assert all(torch.equal(got, block.kv) for got, block in zip(result.blocks, blocks, strict=True))
    assert result.blocks[0].dtype == dtype
    assert other.counts()["loaded_blocks"] == 40


def test_a_load_gives_the_leading_run_and_tells_what_it_learned(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    one, other = tiers(redis_server.url), tiers(redis_server.url)
    hashes = chain("a", 10)
    store_all(one, offers(hashes)[:6])
    assert len(result_of(other.start_load(hashes, costs(10), "t")).blocks) == 6
    assert other.take_events() == (hashes[:6], [])
    assert list(other.wants(hashes)) == [False] * 6 + [True] * 4


def test_a_suffix_of_a_prefix_can_be_loaded_alone(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 10)
    blocks = offers(hashes)
    store_all(tier, blocks)
    result = result_of(tier.start_load(hashes[4:], costs(6), "t"))
    assert [torch.equal(got, b.kv) for got, b in zip(result.blocks, blocks[4:], strict=True)] == [True] * 6


def test_nothing_is_loaded_for_nothing(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    assert tier.start_load([], [], "t") is None
    assert result_of(tier.start_load(chain("a", 3), costs(3), "t")).blocks == []


def test_a_flipped_byte_ends_the_run_before_it_and_is_counted(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 8)
    blocks = offers(hashes)
    store_all(tier, blocks)
    key = min((key for key in redis.keys(f"reprise{LAYOUT}:{{p0}}:*") if hashes[5] in key), key=len)
    redis.setrange(key, 5000, bytes([redis.getrange(key, 5000, 5000)[0] ^ 1]))
    result = result_of(tier.start_load(hashes, costs(8), "t"))
    assert len(result.blocks) == 5
    assert tier.counts()["quarantined:crc"] == 1
    assert tier.take_events() == ([], [hashes[5]])
    assert list(tier.wants(hashes)) == [False] * 5 + [True] + [False] * 2
    store_all(tier, blocks[5:6])
    assert len(result_of(tier.start_load(hashes, costs(8), "t")).blocks) == 8


def test_a_retention_reaches_blocks_that_are_stored_already(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 3)
    store_all(tier, offers(hashes))
    tier.retain(hashes, 90, 60.0, "t")
    wait_until(lambda: redis.hlen(StoreFunctions(redis).key["retained"]) == 3)


# ---- writing behind -------------------------------------------------------------------------------------


def test_what_is_stored_or_on_its_way_is_not_wanted(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 5)
    assert list(tier.wants(hashes)) == [True] * 5
    blocks = offers(hashes)
    assert tier.offer(blocks) == 5
    assert list(tier.wants(hashes)) == [False] * 5
    assert tier.offer(blocks) == 5, "taken, and not written twice"
    store_all(tier, offers(chain("b", 1)))
    assert StoreFunctions(redis).usage().counts["committed"] == 6


def test_offers_beyond_the_bound_are_refused_and_not_wanted(
    server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 64 * 4
    tier = tiers(server.url, max_queued_bytes=3 * block_bytes)
    wait_until(lambda: tier.tokens_per_s() > 0)
    server.process.send_signal(signal.SIGSTOP)
    hashes = chain("a", 10)
    assert sum(tier.wants(hashes)) == 3
    assert tier.offer(offers(hashes)) == 3
    assert sum(tier.wants(hashes[3:])) == 0
    server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: sum(tier.wants(hashes[3:])) == 3)


def test_blocks_evicted_for_its_own_writes_are_reported_removed(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url, capacity=20 * 35_000)
    held: set[bytes] = set()
    for i in range(10):
        assert tier.offer(offers(chain(f"{i}", 5))) == 5
        wait_until(lambda done=5 * (i + 1): written(tier) == done)
        stored, removed = tier.take_events()
        assert set(removed) <= held
        held = held - set(removed) | set(stored)
    assert 5 <= len(held) <= 20
    other = tiers(redis_server.url)
    assert all(len(result_of(other.start_load([block], costs(1), "t")).blocks) == 1 for block in held)


def test_a_block_whose_parent_was_evicted_makes_the_parent_wanted_again(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 4)
    blocks = offers(hashes)
    store_all(tier, blocks[:3])
    StoreFunctions(redis).evict(0)  # by somebody else, unheard
    assert not any(tier.wants(hashes[:3]))
    assert tier.offer(blocks[3:]) == 1
    wait_until(lambda: list(tier.wants(hashes)) == [False, False, True, True])


# ---- load or compute ------------------------------------------------------------------------------------


def test_the_gate_closes_on_a_slow_link_and_opens_on_a_fast_one(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    hashes = chain("a", 20)
    store_all(tiers(redis_server.url), offers(hashes))
    proxy = SlowProxy(port_of(redis_server), bytes_per_s=2e6)
    slow, fast = tiers(proxy.url), tiers(redis_server.url)
    compute = costs(20, each_s=0.002)  # 32 KiB in 2 ms: worth it above 16 MB/s
    for tier in (slow, fast):
        result_of(tier.start_load(hashes, costs(20), "t"))  # optimistic, then measured
    assert slow.start_load(hashes, compute, "t") is None
    assert slow.counts()["gate_closed"] == 1
    assert 0 < slow.tokens_per_s() < fast.tokens_per_s()
    assert len(result_of(fast.start_load(hashes, compute, "t")).blocks) > 0
    assert slow.start_load(hashes, costs(20), "t") is not None, "slow computing makes a slow link worth it"
    proxy.close()


def test_what_is_computed_in_no_time_is_never_loaded(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    assert tier.start_load(chain("a", 20), costs(20, FAST_COMPUTE_S), "t") is None
    assert tier.counts() == {"gate_closed": 1}


def test_a_load_that_takes_longer_than_computing_is_given_up_with_what_it_has(
    server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(server.url)
    hashes = chain("a", 4)
    store_all(tier, offers(hashes))
    server.process.send_signal(signal.SIGSTOP)
    load = tier.start_load(hashes, costs(4, each_s=0.05), "t")
    result = result_of(load)
    assert result.blocks == []
    assert 0.2 < result.seconds < 1.0, "the 200 ms of computing, not the timeout of the socket"
    server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: tier.counts().get("given_up") == 1)
    assert len(result_of(tier.start_load(hashes, costs(4), "t")).blocks) == 4


# ---- cancel, kill, close --------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.01, 0.1, 0.3])
def test_a_cancelled_load_holds_nothing_and_no_lease(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier], after_s: float
) -> None:
    hashes = chain("a", 20)
    store_all(tiers(redis_server.url), offers(hashes))
    proxy = SlowProxy(port_of(redis_server), bytes_per_s=5e6)
    tier = tiers(proxy.url)
    load = tier.start_load(hashes, costs(20), "t")
    assert load is not None
    time.sleep(after_s)  # the moment of the cancel, not a wait for anything
    load.cancel()
    load.cancel()
    result = load.poll()
    assert result is not None
    assert result.blocks == []
    functions = StoreFunctions(redis)
    wait_until(lambda: functions.evict(0)[1] == 0)
    proxy.close()


def test_redis_killed_in_the_middle_of_loads_and_writes_costs_misses_and_nothing_else(
    tiers: Callable[..., RedisStoreTier],
) -> None:
    server = start_redis(find_server(), max_memory=256 << 20)
    port = port_of(server)
    tier = tiers(server.url)
    hashes = chain("a", 200)
    blocks = offers(hashes)
    store_all(tier, blocks)
    loads = [tier.start_load(hashes, costs(200), "t") for _ in range(8)]
    tier.offer(offers(chain("b", 100)))
    server.process.kill()
    server.stop()
    results = [result_of(load) for load in loads if load is not None]
    for result in results:
        assert all(torch.equal(got, b.kv) for got, b in zip(result.blocks, blocks, strict=False))
    wait_until(lambda: tier.tokens_per_s() == 0)
    assert tier.start_load(hashes, costs(200), "t") is None
    assert not any(tier.wants(chain("c", 3)))

    server = start_redis(find_server(), port=port, max_memory=256 << 20)
    try:
        removed: set[bytes] = set()

        def emptied() -> bool:
            removed.update(tier.take_events()[1])
            return removed >= set(hashes)

        wait_until(emptied)
        assert all(tier.wants(hashes))
        store_all(tier, blocks)
        assert len(result_of(tier.start_load(hashes, costs(200), "t")).blocks) == 200
    finally:
        server.stop()


def test_a_store_that_was_never_there_is_asked_little_and_says_so(
    tiers: Callable[..., RedisStoreTier],
) -> None:
    tier = tiers("redis://127.0.0.1:1/0")
    assert tier.tokens_per_s() == 0
    for i in range(10):
        load = tier.start_load(chain(f"{i}", 3), costs(3), "t")
        assert load is None or result_of(load).blocks == []
    wait_until(lambda: tier.start_load(chain("a", 3), costs(3), "t") is None)
    tier.offer(offers(chain("a", 3)))
    assert tier.take_events() == ([], [])


@pytest.mark.parametrize(
    ("url", "capacity", "message"),
    [("localhost", None, "scheme"), ("redis://127.0.0.1:1", 0, "capacity must be positive, got 0 bytes")],
)
def test_settings_that_make_no_sense_are_refused_at_once(
    url: str, capacity: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RedisStoreTier(StoreTierConfig(url, b"f" * 16, SHAPE, torch.float32, capacity))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("store-")]


def test_close_does_not_wait_for_a_store_that_hangs(
    server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(server.url)
    hashes = chain("a", 4)
    store_all(tier, offers(hashes))
    server.process.send_signal(signal.SIGSTOP)
    loads = [tier.start_load(hashes, costs(4), "t") for _ in range(5)]
    tier.offer(offers(chain("b", 4)))
    tier.close()
    assert [load.poll() is not None for load in loads if load is not None] == [True] * 5
    assert tier.start_load(hashes, costs(4), "t") is None
    assert tier.offer(offers(chain("c", 4))) == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("store-")]
    tier.close()

"""The Redis store tier as the engine uses it: start, poll, offer, and never a surprise."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from redis import Redis

from kernels.kv_codec import encode
from kernels.kv_payload import Codec
from services.cache_store.address import Address
from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.functions import LAYOUT, StoreFunctions
from services.cache_store.learning import learn
from services.cache_store.shards import Rendezvous
from services.worker.store_tier import RedisStoreTier, StoreTierConfig
from services.worker.tiers import EncodedBlock, Load, OfferedBlock
from tests.cache_store.harness import chain
from tests.cache_store.proxy import SlowProxy

SHAPE = (2, 2, 2, 16, 64)
FIRST = b"1" * 16  # says which of several servers; the tests of one server do not care
PAGES = (2, 2, 1, 2, 16, 64)  # the same as the KV cache has it
CAPACITY = 64 << 20
SLOW_COMPUTE_S = 1.0  # a block: any load is worth it
FAST_COMPUTE_S = 1e-7  # a block: no load is
MOST = 1000  # blocks of a load


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


def loaded(load: Load | None, timeout_s: float = 20.0) -> list[EncodedBlock]:
    """What a load brings in all, the first block first."""
    assert load is not None
    blocks: list[EncodedBlock] = []

    def done() -> bool:
        over = load.over
        blocks.extend(load.take())
        return over

    wait_until(done, timeout_s)
    assert len(blocks) <= (load.found or 0)
    return blocks[::-1]


def start(tier: RedisStoreTier, hashes: list[bytes], costs: list[float], first: bytes = FIRST) -> Load | None:
    return tier.start_load(hashes, costs, "t", first, MOST)


def costs(count: int, each_s: float = SLOW_COMPUTE_S) -> list[float]:
    return [each_s * (i + 1) for i in range(count)]


def offers(
    hashes: list[bytes],
    dtype: torch.dtype = torch.float32,
    priority: int = 35,
    codec: Codec = Codec.NONE,
    first: bytes = FIRST,
) -> list[OfferedBlock]:
    root = b"r" * 16
    generator = torch.Generator().manual_seed(hashes[0][0])
    return [
        OfferedBlock(
            hash=hash_,
            parent=parent,
            first=first,
            depth=depth,
            kv=EncodedBlock(codec, encode(torch.randn(PAGES, generator=generator).to(dtype), [0], codec)[0]),
            priority=priority,
            ttl_s=None,
            tenant="t",
        )
        for depth, (hash_, parent) in enumerate(zip(hashes, [root, *hashes], strict=False))
    ]


def same(got: EncodedBlock, expected: EncodedBlock) -> bool:
    return got.codec is expected.codec and torch.equal(got.payload, expected.payload)


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
    result = loaded(start(other, hashes, costs(40)))
    assert len(result) == 40
    assert all(same(got, block.kv) for got, block in zip(result, blocks, strict=True))
    assert result[0].payload.nbytes == 2 * 2 * 2 * 16 * 64 * dtype.itemsize
    assert other.counts()["loaded_blocks"] == 40


def test_a_load_gives_the_leading_run_and_tells_what_it_learned(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    one, other = tiers(redis_server.url), tiers(redis_server.url)
    hashes = chain("a", 10)
    store_all(one, offers(hashes)[:6])
    assert len(loaded(start(other, hashes, costs(10)))) == 6
    assert other.take_events() == (hashes[:6], [])
    assert list(other.wants(hashes, FIRST)) == [False] * 6 + [True] * 4


def test_a_suffix_of_a_prefix_can_be_loaded_alone(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 10)
    blocks = offers(hashes)
    store_all(tier, blocks)
    result = loaded(start(tier, hashes[4:], costs(6)))
    assert [same(got, b.kv) for got, b in zip(result, blocks[4:], strict=True)] == [True] * 6


def test_nothing_is_loaded_for_nothing(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    assert start(tier, [], []) is None
    assert loaded(start(tier, chain("a", 3), costs(3))) == []


def test_a_flipped_byte_ends_the_load_behind_it_and_is_counted(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 8)
    blocks = offers(hashes)
    store_all(tier, blocks)
    key = min((key for key in redis.keys(f"reprise{LAYOUT}:{{p0}}:*") if hashes[5] in key), key=len)
    redis.setrange(key, 5000, bytes([redis.getrange(key, 5000, 5000)[0] ^ 1]))
    result = loaded(start(tier, hashes, costs(8)))
    assert [same(got, block.kv) for got, block in zip(result, blocks[6:], strict=True)] == [True] * 2
    assert tier.counts()["quarantined:crc"] == 1
    assert tier.take_events() == ([], [hashes[5]])
    assert list(tier.wants(hashes, FIRST)) == [False] * 5 + [True] + [False] * 2
    store_all(tier, blocks[5:6])
    assert len(loaded(start(tier, hashes, costs(8)))) == 8


def test_a_retention_reaches_blocks_that_are_stored_already(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 3)
    store_all(tier, offers(hashes))
    tier.retain(hashes, 90, 60.0, "t", FIRST)
    wait_until(lambda: redis.hlen(StoreFunctions(redis).key["retained"]) == 3)


def test_a_block_must_be_worth_something_once_the_store_is_full_and_has_learned(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 64 * 4
    tier = tiers(redis_server.url, capacity=12 * block_bytes)
    store_all(tier, offers(chain("a", 2)))
    functions = StoreFunctions(redis)
    assert learn(functions, functions.events())
    checked_s = time.monotonic()
    wait_until(lambda: time.monotonic() - checked_s > 1.2)  # a heartbeat later
    assert tier.threshold(FIRST) == 0.0, "there is room"
    store_all(tier, offers(chain("b", 8)))
    wait_until(lambda: tier.threshold(FIRST) > 0)
    assert tier.threshold(FIRST) == pytest.approx(functions.margin().density, rel=0.5)


# ---- codecs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(Codec))
def test_payloads_of_every_codec_come_to_another_worker_bit_by_bit(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier], codec: Codec
) -> None:
    one, other = tiers(redis_server.url, codec=codec), tiers(redis_server.url, codec=codec)
    hashes = chain("a", 40)
    blocks = offers(hashes, codec=codec)
    store_all(one, blocks)
    result = loaded(start(other, hashes, costs(40)))
    assert all(same(got, block.kv) for got, block in zip(result, blocks, strict=True))


def test_frames_of_more_exact_codecs_are_read_and_of_coarser_ones_replaced(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    """A fleet in the middle of a change, whichever way."""
    hashes = chain("a", 4)
    workers = {codec: tiers(redis_server.url, codec=codec) for codec in Codec}
    for block, codec in zip(range(4), Codec, strict=True):  # one block each, the most exact first
        store_all(workers[codec], offers(hashes, codec=codec)[block : block + 1])
    for reader, tier in workers.items():
        result = loaded(start(tier, hashes[:1], costs(1)))
        assert [block.codec for block in result] == [Codec.NONE], reader
    result = loaded(start(workers[Codec.K8V4], hashes, costs(4)))
    assert [block.codec for block in result] == list(Codec)

    int8 = workers[Codec.INT8]
    for block in (3, 2):
        assert loaded(start(int8, hashes, costs(4))) == [], "block 3 is coarser, then block 2 without it"
        wait_until(lambda block=block: int8.wants(hashes, FIRST)[block])
    assert int8.counts()["quarantined:coarser"] == 2
    assert int8.offer(offers(hashes, codec=Codec.INT8)[2:]) == 2
    wait_until(lambda: written(int8) == 3)
    result = loaded(start(workers[Codec.K8V4], hashes, costs(4)))
    assert [block.codec for block in result] == [Codec.NONE, Codec.INT8, Codec.INT8, Codec.INT8]


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.FP8, Codec.K8V4])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80 - (1 << 16), 0x7FC0], ids=["inf", "-inf", "nan"])
def test_scales_that_are_not_finite_end_the_load_and_are_counted(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier], codec: Codec, bits: int
) -> None:
    tier = tiers(redis_server.url, codec=codec)
    hashes = chain("a", 8)
    blocks = offers(hashes, codec=codec)
    blocks[5].kv.payload.view(torch.int16)[-1] = bits
    store_all(tier, blocks)
    assert len(loaded(start(tier, hashes, costs(8)))) == 2
    assert tier.counts()["quarantined:scales"] == 1
    assert len(loaded(start(tier, hashes, costs(8)))) == 5, "it has left the store"


def test_an_fp8_code_that_is_nan_ends_the_load_too(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url, codec=Codec.FP8)
    hashes = chain("a", 2)
    blocks = offers(hashes, codec=Codec.FP8)
    blocks[1].kv.payload[7] = 0xFF
    store_all(tier, blocks)
    assert loaded(start(tier, hashes, costs(2))) == []
    assert tier.counts()["quarantined:scales"] == 1


# ---- writing behind -------------------------------------------------------------------------------------


def test_what_is_stored_or_on_its_way_is_not_wanted(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 5)
    assert list(tier.wants(hashes, FIRST)) == [True] * 5
    blocks = offers(hashes)
    assert tier.offer(blocks) == 5
    assert list(tier.wants(hashes, FIRST)) == [False] * 5
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
    assert sum(tier.wants(hashes, FIRST)) == 3
    assert tier.offer(offers(hashes)) == 3
    assert sum(tier.wants(hashes[3:], FIRST)) == 0
    server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: sum(tier.wants(hashes[3:], FIRST)) == 3)


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
    assert all(len(loaded(start(other, [block], costs(1)))) == 1 for block in held)


def test_a_block_whose_parent_was_evicted_makes_the_parent_wanted_again(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 4)
    blocks = offers(hashes)
    store_all(tier, blocks[:3])
    StoreFunctions(redis).evict(0)  # by somebody else, unheard
    assert not any(tier.wants(hashes[:3], FIRST))
    assert tier.offer(blocks[3:]) == 1
    wait_until(lambda: list(tier.wants(hashes, FIRST)) == [False, False, True, True])


# ---- load or compute ------------------------------------------------------------------------------------


def test_the_gate_closes_on_a_slow_link_and_opens_on_a_fast_one(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    hashes = chain("a", 20)
    store_all(tiers(redis_server.url), offers(hashes))
    proxy = SlowProxy(port_of(redis_server), bytes_per_s=2e6)
    slow, fast = tiers(proxy.url), tiers(redis_server.url)
    compute = costs(20, each_s=0.0005)  # what 2 MB/s bring meanwhile saves 3 %
    for tier in (slow, fast):
        loaded(start(tier, hashes, costs(20)))  # optimistic, then measured
    assert start(slow, hashes, compute) is None
    assert slow.counts()["gate_closed"] == 1
    assert 0 < slow.tokens_per_s() < fast.tokens_per_s()
    assert loaded(start(fast, hashes, compute))
    assert start(slow, hashes, costs(20)) is not None, "it computes slowly too"
    proxy.close()


def test_what_is_computed_in_no_time_is_never_loaded(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    assert start(tier, chain("a", 20), costs(20, FAST_COMPUTE_S)) is None
    assert tier.counts() == {"gate_closed": 1}


def test_a_load_comes_from_the_back_and_brings_no_more_than_it_may(
    redis_server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(redis_server.url)
    hashes = chain("a", 10)
    blocks = offers(hashes)
    store_all(tier, blocks)
    load = tier.start_load(hashes, costs(10), "t", FIRST, 4)
    result = loaded(load)
    assert load is not None
    assert load.found == 10
    assert [same(got, block.kv) for got, block in zip(result, blocks[6:], strict=True)] == [True] * 4


def test_a_load_that_stands_still_is_expected_later_and_later(
    server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(server.url)
    hashes = chain("a", 4)
    store_all(tier, offers(hashes))
    server.process.send_signal(signal.SIGSTOP)
    load = start(tier, hashes, costs(4))
    assert load is not None
    first_s = load.expected_s(4)
    wait_until(lambda: load.expected_s(4) > 10 * first_s)
    assert load.take() == []
    load.cancel()
    assert load.over
    server.process.send_signal(signal.SIGCONT)
    assert len(loaded(start(tier, hashes, costs(4)))) == 4


def test_loads_in_the_queue_make_the_next_one_later(
    server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(server.url)
    hashes = chain("a", 400)
    store_all(tier, offers(hashes[:4]))
    server.process.send_signal(signal.SIGSTOP)
    loads = [start(tier, hashes, costs(400)) for _ in range(8)]
    expected_s = [load.expected_s(400) for load in loads if load is not None]
    assert len(expected_s) == 8
    assert expected_s[-1] > 2 * expected_s[0]
    assert start(tier, hashes, costs(400, 2e-5)) is None, "computing is done before its turn comes"
    for load in loads:
        assert load is not None
        load.cancel()
    assert start(tier, hashes, costs(400, 2e-4)) is not None, "nothing is queued any more"
    server.process.send_signal(signal.SIGCONT)


# ---- cancel, kill, close --------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.01, 0.1, 0.3])
def test_a_cancelled_load_holds_nothing_and_no_lease(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier], after_s: float
) -> None:
    hashes = chain("a", 20)
    store_all(tiers(redis_server.url), offers(hashes))
    proxy = SlowProxy(port_of(redis_server), bytes_per_s=5e6)
    tier = tiers(proxy.url)
    load = start(tier, hashes, costs(20))
    assert load is not None
    time.sleep(after_s)  # the moment of the cancel, not a wait for anything
    load.cancel()
    load.cancel()
    assert load.over
    assert load.take() == []
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
    loads = [start(tier, hashes, costs(200)) for _ in range(8)]
    tier.offer(offers(chain("b", 100)))
    server.process.kill()
    server.stop()
    results = [loaded(load) for load in loads if load is not None]
    for result in results:
        assert all(same(got, b.kv) for got, b in zip(reversed(result), reversed(blocks), strict=False))
    wait_until(lambda: tier.tokens_per_s() == 0)
    assert start(tier, hashes, costs(200)) is None
    assert not any(tier.wants(chain("c", 3), FIRST))

    server = start_redis(find_server(), port=port, max_memory=256 << 20)
    try:
        removed: set[bytes] = set()

        def emptied() -> bool:
            removed.update(tier.take_events()[1])
            return removed >= set(hashes)

        wait_until(emptied)
        assert all(tier.wants(hashes, FIRST))
        store_all(tier, blocks)
        assert len(loaded(start(tier, hashes, costs(200)))) == 200
    finally:
        server.stop()


def test_a_store_that_was_never_there_is_asked_little_and_says_so(
    tiers: Callable[..., RedisStoreTier],
) -> None:
    tier = tiers("redis://127.0.0.1:1/0")
    assert tier.tokens_per_s() == 0
    for i in range(10):
        load = start(tier, chain(f"{i}", 3), costs(3))
        assert load is None or loaded(load) == []
    wait_until(lambda: start(tier, chain("a", 3), costs(3)) is None)
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
    loads = [start(tier, hashes, costs(4)) for _ in range(5)]
    tier.offer(offers(chain("b", 4)))
    tier.close()
    assert [load.over for load in loads if load is not None] == [True] * 5
    assert start(tier, hashes, costs(4)) is None
    assert tier.offer(offers(chain("c", 4))) == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("store-")]
    tier.close()


# ---- several servers ------------------------------------------------------------------------------------


def test_prefixes_spread_over_servers_and_each_is_whole_on_one(
    redis_server: LocalRedis, redis: Redis, tiers: Callable[..., RedisStoreTier]
) -> None:
    urls = [redis_server.url.replace("/0", f"/{db}") for db in range(3)]
    one, other = tiers(",".join(urls)), tiers(",".join(reversed(urls)), capacity=None)
    prefixes = [chain(f"{i}", 5) for i in range(30)]
    for hashes in prefixes:
        store_all(one, offers(hashes, first=hashes[0]))
    for hashes in prefixes:
        assert len(loaded(start(other, hashes, costs(5), hashes[0]))) == 5
        assert len(loaded(start(other, hashes[2:], costs(3), hashes[0]))) == 3
        assert not any(one.wants(hashes, hashes[0]))
    assert set(other.take_events()[0]) == {block for hashes in prefixes for block in hashes}
    sizes = []
    for url in urls:
        with Redis.from_url(url) as client:
            usage = StoreFunctions(client).usage()
            assert usage.capacity == CAPACITY // 3
            assert usage.blocks % 5 == 0
            sizes.append(usage.blocks)
    assert sum(sizes) == 150
    assert min(sizes) > 0


def test_a_server_that_is_down_costs_hits_of_its_own_prefixes_and_no_others(
    redis_server: LocalRedis, server: LocalRedis, tiers: Callable[..., RedisStoreTier]
) -> None:
    tier = tiers(f"{redis_server.url},{server.url}")
    rendezvous = Rendezvous([Address.from_url(url).name for url in (redis_server.url, server.url)])
    prefixes = [chain(f"{i}", 3) for i in range(20)]
    on_it = [hashes for hashes in prefixes if rendezvous.choose(hashes[0]) == 1]
    elsewhere = [hashes for hashes in prefixes if rendezvous.choose(hashes[0]) == 0]
    assert min(len(on_it), len(elsewhere)) > 2
    for hashes in prefixes:
        store_all(tier, offers(hashes, first=hashes[0]))
    both = tier.tokens_per_s()
    server.process.kill()
    wait_until(lambda: start(tier, on_it[0], costs(3), on_it[0][0]) is None)
    for hashes in elsewhere:
        assert len(loaded(start(tier, hashes, costs(3), hashes[0]))) == 3
    for hashes in on_it:
        assert start(tier, hashes, costs(3), hashes[0]) is None
        assert not any(tier.wants(chain("new", 2), hashes[0]))
    assert all(tier.wants(chain("new", 2), elsewhere[0][0]))
    assert 0 < tier.tokens_per_s() < both * 2

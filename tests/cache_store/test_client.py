"""BlockStore on a real server: round trips, corruption, faults."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from redis import Redis

from services.cache_store.allocation import stored_bytes
from services.cache_store.client import BlockStore, Outcome, WriteBlock
from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.frames import FrameFormat, frame_header
from services.cache_store.functions import LAYOUT, ROOT, StoreFunctions, owner_digest
from services.cache_store.payloads import Payloads
from tests.cache_store.harness import chain

PAYLOAD_BYTES = 4096
FORMAT = FrameFormat(fingerprint=b"f" * 16, layers=2, tokens=16, payload_bytes=PAYLOAD_BYTES)
BLOCK_BYTES = stored_bytes(FORMAT.frame_bytes)


def payload_of(block: bytes, size: int = PAYLOAD_BYTES) -> memoryview:
    return memoryview((block * (size // 16 + 1))[:size])


def to_write(hashes: list[bytes], size: int = PAYLOAD_BYTES, **changes: object) -> list[WriteBlock]:
    """A chain of blocks whose payloads can be told apart."""
    return [
        WriteBlock(**{
            "hash": hash_, "parent": parent, "tenant": "t", "priority": 35, "ttl_s": None,
            "payload": payload_of(hash_, size), **changes,
        })
        for hash_, parent in zip(hashes, [ROOT, *hashes], strict=False)
    ]  # fmt: skip


def read_all(store: BlockStore, hashes: list[bytes]) -> list[bytes]:
    """Payloads of the leading run that the store gives back."""
    found = store.lookup(hashes, "t")
    assert found is not None
    payloads: list[bytes] = []
    for start in range(0, len(found.hashes), store.batch):
        stop = min(len(found.hashes), start + store.batch)
        payloads += [bytes(payload.data) for payload in store.read(found, start, stop)]
        if len(payloads) < stop:
            break
    store.release(found)
    return payloads


@pytest.fixture
def store(redis_server: LocalRedis) -> Iterator[BlockStore]:
    store = BlockStore(redis_server.socket_url, FORMAT, capacity=64 << 20)
    yield store
    store.close()


def payload_keys(redis: Redis) -> list[bytes]:
    return sorted(redis.keys(f"reprise{LAYOUT}:{{p0}}:*"))


# ---- round trips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tcp", "unix socket"])
def test_what_one_client_writes_another_reads(redis_server: LocalRedis, over: str) -> None:
    url = redis_server.url if over == "tcp" else redis_server.socket_url
    writer, reader = BlockStore(url, FORMAT, capacity=64 << 20), BlockStore(url, FORMAT)
    blocks = chain("a", 20)
    report = writer.write(to_write(blocks))
    assert report.outcomes == dict.fromkeys(blocks, Outcome.STORED)
    assert report.dropped == []
    assert read_all(reader, [*blocks, *chain("unknown", 2)]) == [bytes(payload_of(block)) for block in blocks]
    writer.close()
    reader.close()


def test_a_block_of_two_pieces_and_more_than_one_batch_come_back_whole(redis_server: LocalRedis) -> None:
    size = 1 << 20
    store = BlockStore(redis_server.socket_url, FrameFormat(b"f" * 16, 2, 16, size), capacity=64 << 20)
    blocks = chain("a", 2 * store.batch + 3)
    assert len(blocks) > 16
    report = store.write(to_write(blocks, size))
    assert set(report.outcomes.values()) == {Outcome.STORED}
    with Redis.from_url(redis_server.socket_url) as redis:
        assert len(payload_keys(redis)) == 2 * len(blocks)
    assert read_all(store, blocks) == [bytes(payload_of(block, size)) for block in blocks]
    store.close()


def test_a_run_longer_than_one_call_takes_is_found_whole_and_released_whole(
    store: BlockStore, redis: Redis
) -> None:
    functions = StoreFunctions(redis)
    functions.configure(64 << 20)
    blocks = chain("a", 2500)
    for start in range(0, len(blocks), 500):
        store.write(to_write(blocks)[start : start + 500])
    found = store.lookup(blocks, "t")
    assert found is not None
    assert len(found.hashes) == 2500
    assert functions.evict(0)[0] == []
    store.release(found)
    assert len(functions.evict(0)[0]) == 64


def test_writing_again_costs_no_payload(store: BlockStore, redis: Redis) -> None:
    blocks = chain("a", 5)
    store.write(to_write(blocks))
    keys = payload_keys(redis)
    assert store.write(to_write(blocks)).outcomes == dict.fromkeys(blocks, Outcome.HAD)
    assert payload_keys(redis) == keys


def test_payloads_of_evicted_blocks_are_deleted_by_the_writer_that_evicted_them(
    redis_server: LocalRedis, redis: Redis
) -> None:
    store = BlockStore(redis_server.socket_url, FORMAT, capacity=20 * BLOCK_BYTES)
    for i in range(50):
        store.write(to_write(chain(f"{i}", 3)))
    usage = StoreFunctions(redis).usage()
    assert usage.dropped == 0
    assert len(payload_keys(redis)) == usage.blocks == 20
    assert usage.evicted("room") == 150 - usage.blocks
    store.close()


def test_blocks_of_two_models_share_a_store_and_evict_each_other_completely(
    redis_server: LocalRedis, redis: Redis
) -> None:
    large = 512 << 10  # stored in two pieces
    big = BlockStore(redis_server.socket_url, FrameFormat(b"g" * 16, 2, 16, large), capacity=2_000_000)
    small = BlockStore(redis_server.socket_url, FORMAT)
    big.write(to_write(chain("big", 3), large))
    assert len(payload_keys(redis)) == 6
    for i in range(500):
        small.write(to_write(chain(f"{i}", 1)))
    assert all(redis.strlen(key) < large for key in payload_keys(redis))
    assert len(payload_keys(redis)) == StoreFunctions(redis).usage().blocks
    big.close()
    small.close()


# ---- priority -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("priority", "kept"), [(90, 20), (35, 0)])
def test_a_system_prompt_of_priority_90_outlives_1000_one_shot_blocks_and_one_of_equal_priority_does_not(
    redis_server: LocalRedis, priority: int, kept: int
) -> None:
    store = BlockStore(redis_server.socket_url, FORMAT, capacity=100 * BLOCK_BYTES)
    system_prompt = chain("system prompt", 20)
    store.write(to_write(system_prompt, priority=priority))
    streamed = 0
    for i in range(101):
        report = store.write(to_write(chain(f"one-shot {i}", 10)))
        streamed += list(report.outcomes.values()).count(Outcome.STORED)
    assert streamed == 1010
    assert len(read_all(store, system_prompt)) == kept
    store.close()


def test_a_retention_told_later_counts_as_much(redis_server: LocalRedis) -> None:
    store = BlockStore(redis_server.socket_url, FORMAT, capacity=100 * BLOCK_BYTES)
    system_prompt = chain("system prompt", 20)
    store.write(to_write(system_prompt))
    store.retain(system_prompt, "t", 90, 3600.0)
    for i in range(30):
        store.write(to_write(chain(f"one-shot {i}", 10)))
    assert len(read_all(store, system_prompt)) == 20
    store.close()


# ---- corruption -----------------------------------------------------------------------------------------


def corrupt(redis: Redis, key: bytes, at: int) -> None:
    value = bytearray(redis.get(key))
    value[at] ^= 0x10
    redis.set(key, bytes(value))


FIELDS = {
    "magic": 0, "version": 4, "codec": 5, "shape": 6, "fingerprint": 12, "block": 20, "crc": 36,
    "missing": None, "truncated": None,
}  # fmt: skip


@pytest.mark.parametrize(("reason", "at"), FIELDS.items())
def test_a_bad_payload_is_a_miss_and_a_counter_and_never_data(
    store: BlockStore, redis: Redis, reason: str, at: int | None
) -> None:
    blocks = chain("a", 5)
    store.write(to_write(blocks))
    key = next(key for key in payload_keys(redis) if blocks[2] in key)
    if at is not None:
        corrupt(redis, key, at)
    elif reason == "missing":
        redis.delete(key)
    else:
        redis.set(key, redis.get(key)[:-1])
    assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks[:2]]
    assert store.counts()[f"quarantined:{reason}"] == 1
    assert StoreFunctions(redis).usage().counts[f"quarantined:{reason}"] == 1
    found = store.lookup(blocks, "t")
    assert found is not None
    assert len(found.hashes) == 2, "nobody finds it again"
    assert store.write(to_write(blocks)).outcomes[blocks[2]] is Outcome.STORED
    assert len(read_all(store, blocks)) == 5, "one write heals it"


def test_a_flipped_byte_of_the_second_piece_is_noticed(redis_server: LocalRedis, redis: Redis) -> None:
    size = 512 << 10
    store = BlockStore(redis_server.socket_url, FrameFormat(b"f" * 16, 2, 16, size), capacity=64 << 20)
    blocks = chain("a", 3)
    store.write(to_write(blocks, size))
    corrupt(redis, next(key for key in payload_keys(redis) if blocks[1] in key and key.endswith(b"+")), 5)
    assert len(read_all(store, blocks)) == 1
    assert store.counts()["quarantined:crc"] == 1
    store.close()


def test_a_model_with_another_fingerprint_never_reads_a_block(
    store: BlockStore, redis_server: LocalRedis
) -> None:
    blocks = chain("a", 3)
    store.write(to_write(blocks))
    other = BlockStore(redis_server.socket_url, FrameFormat(b"x" * 16, 2, 16, PAYLOAD_BYTES))
    assert read_all(other, blocks) == []
    assert other.counts()["quarantined:fingerprint"] == 1
    other.close()


def test_a_fleet_changes_its_codec_worker_by_worker(redis_server: LocalRedis) -> None:
    """Workers of the new codec read what the old ones wrote; old ones have what they cannot take replaced."""
    sizes = {"none": 2 << 20, "int8": (1 << 20) + 4096}  # two pieces, and one
    old_format = FrameFormat(b"f" * 16, 2, 16, sizes["none"])
    new_format = FrameFormat(b"f" * 16, 2, 16, sizes["int8"], "int8", {"none": sizes["none"]}, sizes["none"])
    old = BlockStore(redis_server.socket_url, old_format, capacity=64 << 20)
    new = BlockStore(redis_server.socket_url, new_format)
    blocks = chain("a", 3)
    old.write(to_write(blocks[:2], sizes["none"]))
    assert set(new.write(to_write(blocks[:2], sizes["int8"])).outcomes.values()) == {Outcome.HAD}
    new.write(to_write(blocks[2:], sizes["int8"]))
    written = [
        bytes(payload_of(block, sizes[codec]))
        for block, codec in zip(blocks, ("none", "none", "int8"), strict=True)
    ]
    assert read_all(new, blocks) == written

    assert read_all(old, blocks) == written[:2]
    assert old.counts()["quarantined:coarser"] == 1
    assert old.write(to_write(blocks, sizes["none"])).outcomes[blocks[2]] is Outcome.STORED
    whole = [bytes(payload_of(block, sizes["none"])) for block in blocks]
    assert read_all(old, blocks) == read_all(new, blocks) == whole
    assert not any(name.startswith("quarantined") for name in new.counts())
    old.close()
    new.close()


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        ("another block", "block"),
        ("another model", "fingerprint"),
        ("another codec", "coarser"),
        ("another shape", "shape"),
    ],
)
def test_a_sound_frame_put_in_the_place_of_another_is_a_miss(
    store: BlockStore, redis: Redis, of: str, reason: str
) -> None:
    blocks = chain("a", 3)
    store.write(to_write(blocks))
    keys = {block: key for key in payload_keys(redis) for block in blocks if block in key}
    payload = payload_of(blocks[1])
    formats = {
        "another model": FrameFormat(b"x" * 16, 2, 16, PAYLOAD_BYTES),
        "another codec": FrameFormat(b"f" * 16, 2, 16, PAYLOAD_BYTES, "int8"),
        "another shape": FrameFormat(b"f" * 16, 2, 32, PAYLOAD_BYTES),
    }
    if of == "another block":
        frame = redis.get(keys[blocks[2]])
    else:
        frame = frame_header(formats[of], blocks[1], blocks[0], payload) + bytes(payload)
    redis.set(keys[blocks[1]], frame)
    assert read_all(store, blocks) == [bytes(payload_of(blocks[0]))]
    assert [name for name in store.counts() if name.startswith("quarantined")] == [f"quarantined:{reason}"]


def test_an_old_frame_of_a_block_put_back_under_the_new_name_is_the_same_block(
    store: BlockStore, redis: Redis
) -> None:
    """A replay: its name says what its values are of, so an old frame is as right as the one it replaces."""
    blocks = chain("a", 2)
    store.write(to_write(blocks))
    (old,) = (key for key in payload_keys(redis) if blocks[1] in key)
    frame = redis.get(old)
    StoreFunctions(redis).evict(0)
    store.write(to_write(blocks))
    (new,) = (key for key in payload_keys(redis) if blocks[1] in key and key != old)
    redis.set(new, frame)
    assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks]


def test_an_old_frame_put_back_under_its_old_name_is_found_by_nobody(store: BlockStore, redis: Redis) -> None:
    blocks = chain("a", 2)
    store.write(to_write(blocks))
    (old,) = (key for key in payload_keys(redis) if blocks[1] in key)
    frame = bytearray(redis.get(old))
    StoreFunctions(redis).evict(0)
    frame[-1] ^= 1
    redis.set(old, bytes(frame))
    assert read_all(store, blocks) == []
    store.write(to_write(blocks))
    redis.set(old, bytes(frame))  # a writer that comes too late
    assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks]


@pytest.mark.parametrize("value", [b"", b"x", b"RPKV"])
def test_a_value_too_short_for_a_header_is_a_miss(store: BlockStore, redis: Redis, value: bytes) -> None:
    blocks = chain("a", 2)
    store.write(to_write(blocks))
    redis.set(next(key for key in payload_keys(redis) if blocks[1] in key), value)
    assert len(read_all(store, blocks)) == 1
    assert store.counts()["quarantined:truncated"] == 1


# ---- writers that come too late -------------------------------------------------------------------------


def test_a_writer_whose_reservation_was_taken_over_spoils_nothing_and_leaves_nothing(
    store: BlockStore, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = chain("a", 4)
    functions, real_put = StoreFunctions(redis), Payloads.put

    def slow_put(self: Payloads, items: list) -> list[bool]:
        monkeypatch.setattr(Payloads, "put", real_put)
        redis.zadd(functions.key["writing"], dict.fromkeys(blocks, 0))  # its deadline passes
        assert set(store.write(to_write(blocks)).outcomes.values()) == {Outcome.STORED}
        return real_put(self, items)

    monkeypatch.setattr(Payloads, "put", slow_put)
    assert set(store.write(to_write(blocks)).outcomes.values()) == {Outcome.FAILED}
    assert len(payload_keys(redis)) == 4
    assert len(read_all(store, blocks)) == 4


def test_redis_out_of_memory_is_a_failed_write_that_makes_room(redis_server: LocalRedis) -> None:
    server = start_redis(find_server(), max_memory=64 << 20)
    try:
        size = 1 << 20
        store = BlockStore(server.socket_url, FrameFormat(b"f" * 16, 2, 16, size), capacity=1 << 30)
        outcomes = [
            outcome
            for i in range(20)
            for outcome in store.write(to_write(chain(f"{i}", 8), size)).outcomes.values()
        ]
        assert Outcome.FAILED in outcomes or len(outcomes) < 160
        with Redis.from_url(server.socket_url) as redis:
            usage = StoreFunctions(redis).usage()
            assert usage.evicted("memory") > 0
            assert usage.reservations == 0
        assert not store.is_down(), "a full server is not a dead one"
        last = [block for i in range(15, 20) for block in chain(f"{i}", 8)]
        assert sum(len(read_all(store, [block])) for block in last) > 10, "new blocks still get in"
        store.close()
    finally:
        server.stop()


# ---- faults ---------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_answers_every_call_with_nothing_and_soon_without_asking() -> None:
    now = [100.0]
    store = BlockStore("redis://127.0.0.1:1/0", FORMAT, capacity=1 << 20, clock=lambda: now[0])
    blocks = chain("a", 2)
    assert store.identity() is None
    assert store.lookup(blocks, "t") is None
    assert store.write(to_write(blocks)).outcomes == {}
    store.retain(blocks, "t", 90, None)
    assert not store.is_down()
    assert store.identity() is None
    assert store.is_down()
    errors = store.counts()["errors"]
    assert errors == 5
    for _ in range(100):
        assert store.lookup(blocks, "t") is None
    assert store.counts()["errors"] == errors, "nobody asked"
    now[0] += 2.0
    assert store.lookup(blocks, "t") is None
    assert store.counts()["errors"] == errors + 1, "one probe"
    store.close()


def test_redis_restarted_empty_is_used_again_and_has_another_identity(redis_server: LocalRedis) -> None:
    server = start_redis(find_server(), max_memory=64 << 20)
    port = int(server.url.split(":")[2].split("/")[0])
    store = BlockStore(server.url, FORMAT, capacity=16 << 20)
    blocks = chain("a", 4)
    try:
        store.write(to_write(blocks))
        identity = store.identity()
        assert identity is not None
        server.process.kill()
        server.stop()
        assert store.lookup(blocks, "t") is None
        server = start_redis(find_server(), port=port, max_memory=64 << 20)
        found = store.lookup(blocks, "t")
        assert found is not None
        assert found.hashes == []
        assert set(store.write(to_write(blocks)).outcomes.values()) == {Outcome.STORED}
        assert store.identity() not in (None, identity)
        assert len(read_all(store, blocks)) == 4
    finally:
        store.close()
        server.stop()


def test_a_server_that_accepts_and_never_answers_costs_a_timeout_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = BlockStore(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", FORMAT, timeout_s=0.05)
        for _ in range(5):
            assert store.lookup(chain("a", 1), "t") is None
        assert store.is_down()
        store.close()


def test_a_password_is_taken_from_the_url() -> None:
    server = start_redis(find_server(), max_memory=64 << 20)
    try:
        with Redis.from_url(server.socket_url) as client:
            client.config_set("requirepass", "secret")
        blocks = chain("a", 1)
        with_password = BlockStore(server.url.replace("//", "//:secret@"), FORMAT, capacity=1 << 20)
        without = BlockStore(server.url, FORMAT)
        assert with_password.write(to_write(blocks)).outcomes == {blocks[0]: Outcome.STORED}
        assert without.lookup(blocks, "t") is None
        with_password.close()
        without.close()
    finally:
        server.stop()


def test_whatever_is_found_can_be_read_while_others_write_and_evict(redis_server: LocalRedis) -> None:
    """A lookup under concurrent eviction: leased runs are whole to the last block."""
    capacity = 60 * BLOCK_BYTES
    stores = [BlockStore(redis_server.socket_url, FORMAT, capacity=capacity) for _ in range(4)]
    prompts = [chain(f"{i}", 10) for i in range(12)]
    deadline, reads, problems = time.monotonic() + 1.5, [], []

    def write(store: BlockStore) -> None:
        while time.monotonic() < deadline:
            store.write(to_write(prompts[os.urandom(1)[0] % len(prompts)]))

    def read(store: BlockStore) -> None:
        while time.monotonic() < deadline:
            blocks = prompts[os.urandom(1)[0] % len(prompts)]
            found = store.lookup(blocks, "t")
            if found is None or found.hashes != blocks[: len(found.hashes)]:
                problems.append(found)
                return
            got = store.read(found, 0, len(found.hashes)) if found.hashes else []
            if [bytes(payload.data) for payload in got] != [
                bytes(payload_of(block)) for block in found.hashes
            ]:
                problems.append(found)
            store.release(found)
            reads.append(len(got))

    threads = [threading.Thread(target=target, args=(store,)) for target, store in
               zip((write, write, read, read), stores, strict=True)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sum(reads) > 0
    assert not any(key.startswith("quarantined") for store in stores for key in store.counts())
    with Redis.from_url(redis_server.socket_url) as redis:
        usage = StoreFunctions(redis).usage()
        assert usage.evicted("room") > 0
        assert usage.total <= capacity
        assert usage.owners == {owner_digest("t"): usage.total}
    for store in stores:
        store.close()

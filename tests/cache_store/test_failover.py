"""A replica that takes over with less than the server had, and a server that takes no functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from services.cache_store.client import BlockStore, Outcome
from services.cache_store.deletion import Deletion
from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.functions import StoreFunctions
from services.cache_store.payloads import unlink_payloads
from tests.cache_store.conftest import SERVERS
from tests.cache_store.harness import chain
from tests.cache_store.test_client import FORMAT, payload_keys, payload_of, read_all, to_write
from tests.cache_store.test_client_faults import port_of


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


class Pair:
    """A server and its replica."""

    def __init__(self, binary: Path) -> None:
        self.server = start_redis(binary, max_memory=256 << 20)
        self.replica = start_redis(binary, max_memory=256 << 20)
        self.redis, self.other = Redis.from_url(self.server.url), Redis.from_url(self.replica.url)
        self.redis.config_set("repl-diskless-sync-delay", 0)
        self.other.replicaof("127.0.0.1", port_of(self.server))
        wait_until(lambda: self.other.info("replication")["master_link_status"] == "up")

    def catch_up(self) -> None:
        def offset(redis: Redis) -> int:
            return int(redis.info("replication")["master_repl_offset"])

        wait_until(lambda: offset(self.redis) == offset(self.other))

    def cut(self) -> None:
        """The replica hears no more, and takes over."""
        self.other.replicaof("NO", "ONE")

    def close(self) -> None:
        for redis, server in ((self.redis, self.server), (self.other, self.replica)):
            redis.close()
            server.stop()


@pytest.fixture(params=SERVERS, ids=lambda path: Path(path).name)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(Path(request.param))
    yield pair
    pair.close()


@pytest.fixture
def stores() -> Iterator[Callable[[str], BlockStore]]:
    made: list[BlockStore] = []

    def make(url: str) -> BlockStore:
        made.append(BlockStore(url, FORMAT, capacity=64 << 20, timeout_s=5.0))
        return made[-1]

    yield make
    for store in made:
        store.close()


def is_right(got: list[bytes], blocks: list[bytes]) -> bool:
    return got == [bytes(payload_of(block)) for block in blocks[: len(got)]]


# ---- a replica ------------------------------------------------------------------------------------------


def test_a_replica_takes_over_with_what_it_has_heard_and_the_rest_is_written_again(
    pair: Pair, stores: Callable[[str], BlockStore]
) -> None:
    before, after = stores(pair.server.url), stores(pair.replica.url)
    heard, missed = chain("a", 20), [*chain("a", 20), *chain("more", 10)]
    before.write(to_write(heard))
    pair.catch_up()
    assert read_all(before, heard) == [bytes(payload_of(block)) for block in heard]
    pair.cut()
    before.write(to_write(missed))
    got = read_all(after, missed)
    assert len(got) == 20
    assert is_right(got, missed)
    outcomes = after.write(to_write(missed)).outcomes
    assert [outcomes[block] for block in missed] == [Outcome.HAD] * 20 + [Outcome.STORED] * 10
    assert is_right(read_all(after, missed), missed)
    assert after.identity() == before.identity(), "the same store, as far as it had come"


def test_a_replica_answers_peeks_and_refuses_the_rest_as_a_miss(
    pair: Pair, stores: Callable[[str], BlockStore]
) -> None:
    blocks = chain("a", 5)
    stores(pair.server.url).write(to_write(blocks))
    pair.catch_up()
    assert StoreFunctions(pair.other).peek(blocks) == 5
    reader = stores(pair.replica.url)
    assert reader.lookup(blocks, "t") is None, "READONLY"
    assert reader.write(to_write(chain("b", 2))).outcomes == {}
    assert reader.counts()["errors"] == 2


def test_records_that_come_over_without_payloads_are_missed_once_and_heal(
    pair: Pair, stores: Callable[[str], BlockStore]
) -> None:
    blocks = chain("a", 8)
    stores(pair.server.url).write(to_write(blocks))
    pair.catch_up()
    pair.cut()
    store = stores(pair.replica.url)
    gone = [key for key in payload_keys(pair.other) if any(block in key for block in blocks[3:6])]
    assert len(gone) == 3
    pair.other.delete(*gone)
    assert len(read_all(store, blocks)) == 3
    for _ in range(3):  # each of them is found missing, at the latest when the one before it is back
        store.write(to_write(blocks))
        read_all(store, blocks)
    assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks]
    assert store.counts()["quarantined:missing"] == 3
    usage = StoreFunctions(pair.other).usage()
    assert (usage.blocks, usage.lost) == (8, 0)


def test_payloads_that_come_over_without_records_are_nobodys_data_and_end_by_themselves(
    pair: Pair, stores: Callable[[str], BlockStore]
) -> None:
    blocks = chain("a", 8)
    stores(pair.server.url).write(to_write(blocks))
    pair.catch_up()
    pair.cut()
    functions = StoreFunctions(pair.other)
    orphans = payload_keys(pair.other)
    pair.other.delete(*functions.key.values())
    store = stores(pair.replica.url)
    assert read_all(store, blocks) == []
    assert set(store.write(to_write(blocks)).outcomes.values()) == {Outcome.STORED}
    assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks]
    assert len(payload_keys(pair.other)) == 16, "new ones have new names"
    assert all(0 < pair.other.pttl(key) <= 24 * 3600 * 1000 for key in orphans)
    Deletion(functions, lambda names: unlink_payloads(pair.other, names)).step()
    assert functions.usage().blocks == 8


# ---- no functions ---------------------------------------------------------------------------------------


def test_a_server_that_takes_no_functions_costs_misses_until_it_does(
    stores: Callable[[str], BlockStore],
) -> None:
    server: LocalRedis = start_redis(find_server(), max_memory=64 << 20)
    try:
        with Redis.from_url(server.socket_url) as redis:
            store = stores(server.url)
            blocks = chain("a", 4)
            store.write(to_write(blocks))
            redis.function_flush()
            redis.acl_setuser("default", commands=["-function"])
            assert store.lookup(blocks, "t") is None
            assert store.write(to_write(blocks)).outcomes == {}
            store.retain(blocks, "t", 90, None)
            assert store.counts()["errors"] == 3
            assert store.counts().get("written:stored", 0) == 4, "those before"
            redis.acl_setuser("default", commands=["+function"])
            assert read_all(store, blocks) == [bytes(payload_of(block)) for block in blocks]
    finally:
        server.stop()

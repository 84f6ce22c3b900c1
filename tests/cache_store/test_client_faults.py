"""BlockStore on a server that is killed, frozen, full, emptied, protected, encrypted: misses, and no more."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

from services.cache_store.client import BlockStore, Outcome
from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.frames import FrameFormat
from services.cache_store.functions import StoreFunctions
from services.cache_store.lanes import Lane
from tests.cache_store.conftest import SERVERS
from tests.cache_store.harness import chain
from tests.cache_store.proxy import SlowProxy
from tests.cache_store.test_client import FORMAT, payload_of, read_all, to_write
from tests.cache_store.tls_proxy import TlsProxy

SIZE = 1 << 20
LARGE = FrameFormat(b"f" * 16, 2, 16, SIZE)
BLOCKS = chain("a", 40)


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    server = start_redis(find_server(), max_memory=256 << 20)
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGCONT)
    server.stop()


@pytest.fixture
def stores() -> Iterator[Callable[..., BlockStore]]:
    """Makes clients; afterwards none of them has a call, a turn or a connection left."""
    made: list[BlockStore] = []

    def make(url: str, format: FrameFormat = LARGE, **changes: object) -> BlockStore:
        made.append(BlockStore(url, format, **{"capacity": 200 << 20, **changes}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for store in made:
        assert store._lanes.under_way() == {}
        assert store._pool.open()[0] == 0
        store.close()
        assert store._pool.open() == (0, 0)


def port_of(server: LocalRedis) -> int:
    return int(server.url.split(":")[2].split("/")[0])


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def is_right(got: list[bytes], blocks: list[bytes]) -> bool:
    return got == [bytes(payload_of(block, SIZE)) for block in blocks[: len(got)]]


# ---- killed, frozen -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_ends_in_the_middle_of_a_read_gives_the_blocks_before_it(
    server: LocalRedis, stores: Callable[..., BlockStore], how: signal.Signals
) -> None:
    stores(server.socket_url).write(to_write(BLOCKS, SIZE))
    proxy = SlowProxy(port_of(server), bytes_per_s=2e7)  # 40 MiB take two seconds
    reader = stores(proxy.url, timeout_s=0.3)
    found = reader.lookup(BLOCKS, "t")
    assert found is not None
    assert found.hashes == BLOCKS
    read: list[list[bytes]] = []

    def read_batches() -> None:
        for start in range(0, len(BLOCKS), reader.batch):
            payloads = reader.read(found, start, min(len(BLOCKS), start + reader.batch))
            read.append([bytes(payload.data) for payload in payloads])

    thread = in_background(read_batches)
    deadline = time.monotonic() + 20
    while not read:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    server.process.send_signal(how)
    thread.join(30)
    assert not thread.is_alive()
    got = read[0]
    for batch in read[1:]:
        if len(got) % reader.batch:
            assert batch == [], "nothing comes after what is missing"
        got = got + batch
    assert is_right(got, BLOCKS)
    assert reader.batch <= len(got) < len(BLOCKS)
    assert reader.counts()["errors"] > 0
    assert not any(name.startswith("quarantined") for name in reader.counts()), "nothing was wrong with them"
    proxy.close()


def test_a_server_killed_in_the_middle_of_a_write_and_back_empty_takes_the_next_one(
    server: LocalRedis, stores: Callable[..., BlockStore]
) -> None:
    port = port_of(server)
    store = stores(server.url, timeout_s=0.5)
    assert set(store.write(to_write(BLOCKS[:1], SIZE)).outcomes.values()) == {Outcome.STORED}
    outcomes: dict[bytes, Outcome] = {}
    thread = in_background(lambda: outcomes.update(store.write(to_write(BLOCKS, SIZE)).outcomes))
    with Redis.from_url(server.socket_url) as redis, suppress(RedisError):
        while redis.info("memory")["used_memory"] < 12 << 20:
            pass
    server.process.kill()
    server.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert len(outcomes) < len(BLOCKS), "it was killed before the end"
    assert set(outcomes.values()) <= {Outcome.STORED, Outcome.HAD}
    again = start_redis(find_server(), port=port, max_memory=256 << 20)
    try:
        deadline = time.monotonic() + 20
        while set(store.write(to_write(BLOCKS[:8], SIZE)).outcomes.values()) != {Outcome.STORED}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert is_right(read_all(store, BLOCKS), BLOCKS)
    finally:
        again.stop()


def test_closing_while_others_read_and_write_answers_them_with_what_they_have(
    server: LocalRedis, stores: Callable[..., BlockStore]
) -> None:
    stores(server.socket_url).write(to_write(BLOCKS, SIZE))
    store = stores(server.socket_url)
    found = store.lookup(BLOCKS, "t")
    assert found is not None
    ends: list[bool] = []
    going = threading.Barrier(5)

    def read() -> None:
        going.wait()
        while payloads := store.read(found, 0, store.batch):
            assert is_right([bytes(payload.data) for payload in payloads], BLOCKS)
        ends.append(True)

    def write() -> None:
        going.wait()
        i = 0
        while store.write(to_write(chain(f"{(i := i + 1)}", 4), SIZE)).outcomes:
            pass
        ends.append(True)

    threads = [in_background(call) for call in (read, read, write, write)]
    going.wait()
    time.sleep(0.1)  # the moment of the close, not a wait for anything
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    started = time.monotonic()
    store.close()
    for thread in threads:
        thread.join(20)
    assert ends == [True] * 4
    assert time.monotonic() - started < 0.9, "not the timeout of a second"
    assert store.lookup(BLOCKS, "t") is None


# ---- full, emptied --------------------------------------------------------------------------------------


def test_flushed_under_a_reader_all_are_missing_and_the_next_write_is_found(
    server: LocalRedis, stores: Callable[..., BlockStore]
) -> None:
    store = stores(server.socket_url)
    store.write(to_write(BLOCKS[:8], SIZE))
    found = store.lookup(BLOCKS[:8], "t")
    assert found is not None
    with Redis.from_url(server.socket_url) as redis:
        redis.flushall()
        redis.function_flush()
    assert store.read(found, 0, store.batch) == []
    assert store.counts()["quarantined:missing"] == 1
    assert set(store.write(to_write(BLOCKS[:8], SIZE)).outcomes.values()) == {Outcome.STORED}
    assert len(read_all(store, BLOCKS)) == 8


def test_a_server_full_of_others_data_fails_the_writes_and_serves_the_reads(
    server: LocalRedis, stores: Callable[..., BlockStore]
) -> None:
    store = stores(server.socket_url)
    store.write(to_write(BLOCKS[:8], SIZE))
    with Redis.from_url(server.socket_url) as redis:
        redis.set("others", bytes(16 << 20))
        redis.config_set("maxmemory", 20 << 20)
        found = store.lookup(BLOCKS[:8], "t")  # leased: nothing of ours may go
        assert found is not None
        outcomes = store.write(to_write(chain("b", 4), SIZE)).outcomes
        assert Outcome.STORED not in outcomes.values()
        assert len(store.read(found, 0, 8)) == 8
        assert store.counts()["out_of_memory"] > 0
        assert not store.is_down()
        assert StoreFunctions(redis).usage().reservations == 0


def test_a_reader_ahead_of_a_slow_server_waits_for_its_turn_and_does_not_pile_up_bytes(
    server: LocalRedis, stores: Callable[..., BlockStore]
) -> None:
    stores(server.socket_url).write(to_write(BLOCKS, SIZE))
    proxy = SlowProxy(port_of(server), bytes_per_s=4e7)
    store = stores(proxy.url, timeout_s=5.0)
    found = store.lookup(BLOCKS, "t")
    assert found is not None
    most = [0]
    threads = [in_background(lambda: store.read(found, 0, store.batch)) for _ in range(8)]
    while any(thread.is_alive() for thread in threads):
        most[0] = max(most[0], sum(size for _, size in store._lanes.under_way().values()))
        time.sleep(0.001)
    assert 8 << 20 < most[0] <= 25 << 20
    proxy.close()


# ---- protected, encrypted -------------------------------------------------------------------------------


def test_users_and_passwords_and_databases_are_taken_from_the_url(
    server: LocalRedis, stores: Callable[..., BlockStore]
) -> None:
    with Redis.from_url(server.socket_url) as redis:
        redis.acl_setuser("worker", enabled=True, passwords=["+pass word"], keys=["*"], commands=["+@all"])
        redis.config_set("requirepass", "secret")
    worker = server.url.replace("//", "//worker:pass%20word@").replace("/0", "/3")
    right, wrong, none = (
        stores(worker, FORMAT),
        stores(worker.replace("word@", "wort@"), FORMAT),
        stores(server.url, FORMAT),
    )
    blocks = chain("a", 3)
    assert set(right.write(to_write(blocks)).outcomes.values()) == {Outcome.STORED}
    assert read_all(right, blocks) == [bytes(payload_of(block)) for block in blocks]
    for store in (wrong, none):
        assert store.lookup(blocks, "t") is None
        assert store.write(to_write(blocks)).outcomes == {}
        assert store.counts()["errors"] == 2
    found = right.lookup(blocks, "t")
    assert found is not None
    assert wrong.read(found, 0, 3) == none.read(found, 0, 3) == []
    with Redis.from_url(server.socket_url.replace("db=0", "db=3"), password="secret") as redis:
        assert redis.dbsize() > 3


@dataclass
class Tls:
    """A server that is reached by TLS, and `proxy` where it needs one for that."""

    server: LocalRedis
    port: int
    proxy: TlsProxy | None

    def url(self, options: str = "", user: str = "") -> str:
        return f"rediss://{user}127.0.0.1:{self.port}/0{options}"


def own_tls_port(server: LocalRedis, certificate: tuple[Path, Path]) -> int | None:
    """Where `server` speaks TLS itself from now on; None if it was built without. Valkey 8.1 dies of that."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    files = {"tls-cert-file": certificate[0], "tls-key-file": certificate[1], "tls-auth-clients": "no"}
    with Redis.from_url(server.socket_url) as redis:
        try:
            redis.config_set("tls-port", port, *(str(word) for pair in files.items() for word in pair))
        except RedisError:
            return None
    return port


def server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.fixture
def tls(server: LocalRedis, certificate: tuple[Path, Path]) -> Iterator[Tls]:
    """Behind a proxy, which can be closed and can ask for a certificate."""
    proxy = TlsProxy(port_of(server), server_context(certificate))
    yield Tls(server, proxy.port, proxy)
    proxy.close()


@pytest.fixture(params=SERVERS, ids=lambda path: Path(path).name)
def any_tls(request: pytest.FixtureRequest, certificate: tuple[Path, Path]) -> Iterator[Tls]:
    """Each kind of server with its own TLS where it has any, else behind a proxy."""
    server = start_redis(Path(request.param), max_memory=256 << 20)
    port = own_tls_port(server, certificate)
    if port is not None:
        yield Tls(server, port, None)
    else:
        server.stop()
        server = start_redis(Path(request.param), max_memory=256 << 20)
        proxy = TlsProxy(port_of(server), server_context(certificate))
        yield Tls(server, proxy.port, proxy)
        proxy.close()
    server.stop()


def test_payloads_travel_over_tls_to_a_server_whose_certificate_is_trusted_and_to_no_other(
    any_tls: Tls, certificate: tuple[Path, Path], stores: Callable[..., BlockStore]
) -> None:
    trusting = stores(any_tls.url(f"?ssl_ca_certs={certificate[0]}"), timeout_s=5.0)
    careless = stores(any_tls.url("?ssl_cert_reqs=none&ssl_check_hostname=false"), timeout_s=5.0)
    doubting = stores(any_tls.url())
    blocks = BLOCKS[:12]
    assert set(trusting.write(to_write(blocks, SIZE)).outcomes.values()) == {Outcome.STORED}
    for store in (trusting, careless):
        got = read_all(store, blocks)
        assert is_right(got, blocks)
        assert len(got) == 12
    found = trusting.lookup(blocks, "t")
    assert found is not None
    assert doubting.lookup(blocks, "t") is None
    assert doubting.read(found, 0, 4) == []
    assert doubting.counts()["errors"] == 2


def test_over_tls_a_password_is_needed_for_control_and_for_payloads(
    tls: Tls, certificate: tuple[Path, Path], stores: Callable[..., BlockStore]
) -> None:
    with Redis.from_url(tls.server.socket_url) as redis:
        redis.acl_setuser("worker", enabled=True, passwords=["+pass word"], keys=["*"], commands=["+@all"])
        redis.config_set("requirepass", "secret")
    trust = f"?ssl_ca_certs={certificate[0]}"
    right, wrong, none = (
        stores(tls.url(trust, user), timeout_s=5.0) for user in ("worker:pass%20word@", "worker:no@", "")
    )
    blocks = BLOCKS[:10]
    assert set(right.write(to_write(blocks, SIZE)).outcomes.values()) == {Outcome.STORED}
    found = right.lookup(blocks, "t")
    assert found is not None
    payloads = right.read(found, 0, right.batch)
    assert is_right([bytes(payload.data) for payload in payloads], blocks)
    assert len(payloads) == right.batch
    for store in (wrong, none):
        assert store.lookup(blocks, "t") is None
        assert store.read(found, 0, 4) == []
        assert store.write(to_write(blocks, SIZE)).outcomes == {}
        assert store.counts()["errors"] == 3


def test_a_server_that_wants_to_know_its_clients_serves_those_with_a_certificate_only(
    server: LocalRedis, certificate: tuple[Path, Path], stores: Callable[..., BlockStore]
) -> None:
    context = server_context(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificate[0])
    proxy = TlsProxy(port_of(server), context)
    trust = f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={certificate[0]}"
    known = stores(f"{trust}&ssl_certfile={certificate[0]}&ssl_keyfile={certificate[1]}", timeout_s=5.0)
    unknown = stores(trust, timeout_s=5.0)
    assert set(known.write(to_write(BLOCKS[:3], SIZE)).outcomes.values()) == {Outcome.STORED}
    found = known.lookup(BLOCKS[:3], "t")
    assert found is not None
    assert len(known.read(found, 0, 3)) == 3
    assert unknown.lookup(BLOCKS[:3], "t") is None
    assert unknown.read(found, 0, 3) == []
    proxy.close()


def test_a_read_over_tls_that_is_cut_goes_on_over_a_new_connection(
    tls: Tls, certificate: tuple[Path, Path], stores: Callable[..., BlockStore]
) -> None:
    store = stores(tls.url(f"?ssl_ca_certs={certificate[0]}"), timeout_s=5.0)
    store.write(to_write(BLOCKS[:8], SIZE))
    found = store.lookup(BLOCKS[:8], "t")
    assert found is not None
    assert tls.proxy is not None
    taken: list[int] = []

    def cut_after_the_third(index: int, frame: memoryview | None) -> bool:
        taken.append(index)
        if index == 2:
            tls.proxy.cut()
        return frame is not None

    memory = memoryview(bytearray(8 * store.slot_bytes))
    store._payloads.get(found.names[: store.batch], memory, Lane.GET, cut_after_the_third)
    assert taken == list(range(store.batch))
    got = read_all(store, BLOCKS[:8])
    assert is_right(got, BLOCKS)
    assert len(got) == 8
    assert "errors" not in store.counts()


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        BlockStore(f"rediss://127.0.0.1:1/0?ssl_ca_certs={tmp_path}/none.pem", FORMAT)

"""The upkeep service: in process for what a round does, as a process for what its user sees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from redis.exceptions import OutOfMemoryError

from services.cache_store.__main__ import main
from services.cache_store.address import Address
from services.cache_store.allocation import stored_bytes
from services.cache_store.client import BlockStore
from services.cache_store.embedded import LocalRedis, find_server, start_redis
from services.cache_store.functions import StoreFunctions
from services.cache_store.service import LEARN_EVERY, Upkeep
from services.cache_store.worth import History
from tests.cache_store.harness import ALICE, chain, new_blocks
from tests.cache_store.test_client import FORMAT, payload_keys, to_write

BLOCK_BYTES = stored_bytes(FORMAT.frame_bytes)
CAPACITY = 100 * BLOCK_BYTES


@pytest.fixture
def upkeep(redis_server: LocalRedis) -> Iterator[Upkeep]:
    upkeep = Upkeep(redis_server.socket_url, CAPACITY)
    yield upkeep
    upkeep.close()


@pytest.fixture
def store(redis_server: LocalRedis) -> Iterator[BlockStore]:
    store = BlockStore(redis_server.socket_url, FORMAT)
    yield store
    store.close()


def metrics_of(upkeep: Upkeep) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(upkeep)
    return parse(generate_latest(registry).decode())


def parse(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


# ---- a round --------------------------------------------------------------------------------------------


def test_a_round_sets_the_capacity_also_after_the_store_was_emptied(upkeep: Upkeep, redis: Redis) -> None:
    for _ in range(2):
        upkeep.round()
        assert StoreFunctions(redis).usage().capacity == CAPACITY
        redis.flushall()
        redis.function_flush()


def test_above_85_percent_it_evicts_to_80_percent_and_below_nothing(
    upkeep: Upkeep, store: BlockStore, redis: Redis
) -> None:
    upkeep.round()
    for i in range(85):
        store.write(to_write(chain(f"{i}", 1)))
    upkeep.round()
    assert StoreFunctions(redis).usage().blocks == 85
    store.write(to_write(chain("one more", 1)))
    upkeep.round()
    usage = StoreFunctions(redis).usage()
    assert (usage.blocks, usage.dropped, len(payload_keys(redis))) == (80, 0, 80)
    assert metrics_of(upkeep)["reprise_store_evicted_total[default][watermark]"] == 6


def test_it_does_its_rounds_also_where_redis_is_full_of_others_data() -> None:
    server = start_redis(find_server(), max_memory=64 << 20)
    upkeep = Upkeep(server.socket_url, CAPACITY)
    try:
        with Redis.from_url(server.socket_url) as redis:
            functions = StoreFunctions(redis)
            upkeep.round()
            blocks = chain("a", 90)
            reserved = functions.reserve(new_blocks(blocks, size=BLOCK_BYTES), 10_000)
            functions.commit(reserved.fence, blocks)
            redis.config_set("maxmemory", 1)
            with pytest.raises(OutOfMemoryError):
                redis.set("more", "data")
            upkeep.round()
            assert functions.usage().blocks == 80
    finally:
        upkeep.close()
        server.stop()


def test_it_reaps_what_dead_writers_reserved_and_deletes_what_they_wrote(
    upkeep: Upkeep, store: BlockStore, redis: Redis
) -> None:
    upkeep.round()
    functions = StoreFunctions(redis)
    for i in range(300):
        functions.reserve(new_blocks(chain(f"{i}", 1)), 0)
    upkeep.round()
    usage = functions.usage()
    assert (usage.blocks, usage.reservations, usage.dropped) == (0, 0, 0)
    assert metrics_of(upkeep)["reprise_store_reaped_reservations_total"] == 300


def test_payloads_whose_evictor_died_are_swept(upkeep: Upkeep, store: BlockStore, redis: Redis) -> None:
    upkeep.round()
    store.write(to_write(chain("a", 10)))
    StoreFunctions(redis).evict(0)  # and never unlinks
    assert len(payload_keys(redis)) == 10
    upkeep.round()
    assert payload_keys(redis) == []
    assert StoreFunctions(redis).usage().dropped == 0


def test_overdue_retentions_fall_back_in_a_round(upkeep: Upkeep, redis: Redis) -> None:
    upkeep.round()
    functions = StoreFunctions(redis)
    blocks = chain("a", 3)
    reserved = functions.reserve(new_blocks(blocks, priority=90, ttl_ms=1), 1000)
    functions.commit(reserved.fence, blocks)
    wait_until(lambda: upkeep.round() or redis.zcard(functions.key["expiring"]) == 0)
    assert metrics_of(upkeep)["reprise_store_expired_retentions_total"] == 3


def test_it_learns_from_lookups_for_everybody_and_again_in_time(
    upkeep: Upkeep, redis: Redis, redis_server: LocalRedis
) -> None:
    upkeep.round()
    functions = StoreFunctions(redis)
    blocks = chain("a", 5)
    functions.commit(functions.reserve(new_blocks(blocks), 1000).fence, blocks)
    for _ in range(LEARN_EVERY - 1):
        functions.lookup(blocks, ALICE, 0)
    upkeep.round()
    assert functions.events().version == 0, "until then plain priorities decide"
    functions.lookup(blocks, ALICE, 0)
    upkeep.round()
    learning = functions.events()
    assert (learning.version, learning.lookups) == (1, 0)
    assert sum(History.from_bytes(learning.history).hits) == pytest.approx(5 * LEARN_EVERY, rel=0.02)
    upkeep.round()
    assert functions.events().version == 1
    successor = Upkeep(redis_server.socket_url, CAPACITY)  # cannot know how old the weights are
    successor.round()
    successor.close()
    assert functions.events().version == 2


def test_metrics_say_what_the_store_holds_and_what_happened(
    upkeep: Upkeep, store: BlockStore, redis: Redis
) -> None:
    assert metrics_of(upkeep) == {"reprise_store_up": 0}
    upkeep.round()
    blocks = chain("a", 10)
    store.write(to_write(blocks))
    found = store.lookup([*blocks[:6], *chain("b", 2)], "t")
    assert found is not None
    store.release(found, 0.25)
    redis.set(next(key for key in payload_keys(redis) if blocks[3] in key), b"garbage")
    store.read(found, 0, 6)
    upkeep.round()
    metrics = metrics_of(upkeep)
    expected = {
        "reprise_store_up": 1,
        "reprise_store_capacity_bytes": CAPACITY,
        "reprise_store_bytes": 9 * BLOCK_BYTES,
        "reprise_store_pinned_bytes": 0,
        "reprise_store_blocks": 10,  # the bad one keeps its record while others build on it
        "reprise_store_leaves": 1,
        "reprise_store_reservations": 0,
        "reprise_store_dropped_payloads": 0,
        "reprise_store_lookups_total": 1,
        "reprise_store_lookup_blocks_total": 8,
        "reprise_store_hit_blocks_total": 6,
        "reprise_store_hits_total[default][1]": 6,
        "reprise_store_hit_blocks_at_twice_memory_total": 6,
        "reprise_store_saved_prefill_seconds_total": 0.25,
        "reprise_store_written_blocks_total": 10,
        "reprise_store_reaped_reservations_total": 0,
        "reprise_store_expired_retentions_total": 0,
        "reprise_store_deleted_blocks_total": 0,
        "reprise_store_quarantined_total[truncated]": 1,
    }
    assert {name: metrics[name] for name in expected} == expected


def test_it_goes_on_when_redis_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    server = start_redis(find_server(), max_memory=64 << 20)
    port = int(server.url.split(":")[2].split("/")[0])
    upkeep, stop = Upkeep(server.url, CAPACITY), threading.Event()
    thread = threading.Thread(target=upkeep.run, args=(stop, 0.01))
    thread.start()
    try:
        wait_until(lambda: upkeep.usage is not None)
        server.process.kill()
        server.stop()
        wait_until(lambda: upkeep.usage is None)
        server = start_redis(find_server(), port=port, max_memory=64 << 20)
        wait_until(lambda: upkeep.usage is not None and upkeep.usage.capacity == CAPACITY)
    finally:
        stop.set()
        thread.join()
        upkeep.close()
        server.stop()
    assert [record.message.split(":")[0] for record in caplog.records if "upkeep" in record.message] == [
        "no upkeep of the store"
    ]
    assert any("is back" in record.message for record in caplog.records)


def test_settings_of_redis_that_work_against_the_store_are_named(
    redis: Redis, redis_server: LocalRedis, caplog: pytest.LogCaptureFixture
) -> None:
    before = redis.config_get("maxmemory", "maxmemory-policy")
    redis.config_set("maxmemory-policy", "allkeys-lru")
    upkeep = Upkeep(redis_server.socket_url, 1 << 40)
    try:
        upkeep.round()
        assert "below the capacity" in caplog.text
        assert "maxmemory-policy is allkeys-lru" in caplog.text
    finally:
        upkeep.close()
        for name, value in before.items():
            redis.config_set(name, value)


# ---- the process ----------------------------------------------------------------------------------------


def test_the_process_serves_metrics_sets_the_capacity_and_ends_on_sigterm(redis_server: LocalRedis) -> None:
    command = [sys.executable, "-m", "services.cache_store", "--redis", redis_server.url,
               "--capacity", "1.5GiB", "--interval", "0.05"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"upkeep of {redis_server.url}, capacity 1.50 GiB" in line
        url = line.split()[-1]

        def ready() -> bool:
            with urllib.request.urlopen(url) as answer:
                metrics = parse(answer.read().decode())
            name = Address.from_url(redis_server.url).name
            return metrics.get(f"reprise_store_capacity_bytes[{name}]") == 1.5 * (1 << 30)

        wait_until(ready)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def test_the_process_serves_operators_who_have_a_key(redis_server: LocalRedis, tmp_path: Path) -> None:
    keys, tenants = tmp_path / "keys", tmp_path / "tenants.json"
    keys.write_text("one\ntwo\n")
    tenants.write_text('{"alice": {"quota": "1GiB"}}')
    command = [sys.executable, "-m", "services.cache_store", "--redis", redis_server.url,
               "--interval", "0.05", "--api-keys-file", str(keys), "--tenants", str(tenants),
               "--record", str(tmp_path / "trace.jsonl"), "--block-size", "16"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        metrics_url = process.stdout.readline().split()[-1]
        url = process.stdout.readline().split()[-1]

        def ask(method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
            headers = {"authorization": "Bearer two"}
            request = urllib.request.Request(url + path, body, headers, method=method)
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        wait_until(lambda: b'"unreachable":[]' in ask("GET", "/prefixes")[1])
        with Redis.from_url(redis_server.url) as redis:
            functions = StoreFunctions(redis)
            wait_until(lambda: functions.usage().quotas == {ALICE: 1 << 30})
            wait_until(lambda: redis.exists(functions.key["trace"]))
            blocks = chain("a", 30)
            functions.lookup(blocks, ALICE, 0)
            functions.commit(functions.reserve(new_blocks(blocks), 1000).fence, blocks)
            body = b'{"hashes": ["%s"], "ttl_s": 60}' % blocks[-1].hex().encode()
            assert ask("POST", "/pin", body)[0] == 200
            with urllib.request.urlopen(metrics_url) as answer:
                assert b"reprise_store_pinned_bytes" in answer.read(), "open, without a key"
            assert ask("DELETE", f"/prefixes/{blocks[3].hex()}")[0] == 202
            wait_until(lambda: functions.usage().blocks == 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        (line,) = (tmp_path / "trace.jsonl").read_text().splitlines()
        assert json.loads(line) == {
            "timestamp": 0, "input_length": 30 * 16, "output_length": 0, "hash_ids": list(range(30)),
        }  # fmt: skip
    finally:
        process.kill()
        process.wait()


def test_the_process_keeps_every_server_of_a_store_and_does_without_one_that_is_away(
    redis_server: LocalRedis,
) -> None:
    urls = [redis_server.url, redis_server.url.replace("/0", "/1"), "redis://127.0.0.1:1/0"]
    names = [Address.from_url(url).name for url in urls]
    command = [sys.executable, "-m", "services.cache_store", "--redis", ",".join(urls),
               "--capacity", "3GiB", "--interval", "0.05"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]

        def ready() -> bool:
            with urllib.request.urlopen(url) as answer:
                metrics = parse(answer.read().decode())
            up = [metrics[f"reprise_store_up[{name}]"] for name in names]
            capacities = [metrics.get(f"reprise_store_capacity_bytes[{name}]") for name in names]
            return up == [1, 1, 0] and capacities == [1 << 30, 1 << 30, None]

        wait_until(ready)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capacity", "0"], "must be a size above 0 such as 512MiB or 1.5GiB, got '0'"),
        (["--capacity", "4GB"], "got '4GB'"),
        (["--metrics-port", "70000"], "must be from 0 to 65535, got '70000'"),
        (["--interval", "0"], "must be a number of seconds above 0, got '0'"),
        (["--interval", "soon"], "got 'soon'"),
        (["--api-port", "-1"], "must be from 0 to 65535, got '-1'"),
        (["--api-keys-file", "/no/such"], "--api-keys-file /no/such: "),
        (["--api-keys-file", "/dev/null"], "--api-keys-file /dev/null: holds no key"),
        (["--tenants", "/no/such"], "--tenants /no/such: "),
        (["--record", "/no/such/file"], "--record /no/such/file: No such file or directory"),
        (["--block-size", "0"], "must be from 1 to 4096, got '0'"),
        (["--tenants", "/dev/null"], "--tenants /dev/null: "),
        (["--redis", "localhost"], "--redis localhost: Redis URL must specify one of the following schemes"),
    ],
)
def test_bad_options_are_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_taken_metrics_port_is_one_clear_line(
    redis_server: LocalRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    port = redis_server.url.split(":")[2].split("/")[0]
    assert main(["--redis", redis_server.url, "--metrics-port", port]) == 2
    assert capsys.readouterr().err == (
        f"cache store: --metrics-port {port} on 127.0.0.1: Address already in use\n"
    )

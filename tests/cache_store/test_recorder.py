"""The recorder: how calls become requests, what is in the file, and that it can be replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from benchmarks.eviction_policies import Ours, replay
from benchmarks.eviction_workloads import chat, read_trace
from services.cache_store import recorder as module
from services.cache_store.embedded import LocalRedis
from services.cache_store.functions import MAX_BLOCKS, ROOT, StoreFunctions
from services.cache_store.recorder import ID_BYTES, Recorder, Request, Requests, TraceFile
from tests.cache_store.harness import ALICE, Store, block_hash, chain, new_blocks

START = ROOT[:ID_BYTES]


def short(hashes: list[bytes]) -> list[bytes]:
    return [block[:ID_BYTES] for block in hashes]


def links(hashes: list[bytes], parent: bytes = START) -> list[tuple[bytes, bytes]]:
    return list(zip([parent, *hashes], hashes, strict=False))


def taken(requests: Requests) -> list[tuple[list[bytes], list[bytes]]]:
    return [(request.ids, request.written) for request in requests.take(2**62)]


A, B, C = (short(chain(name, 6)) for name in "abc")


# ---- calls to requests ------------------------------------------------------------------------------------


def test_what_is_written_behind_a_lookup_is_its_output() -> None:
    requests = Requests()
    requests.lookup(1, A)
    requests.write(2, links(A))  # the prompt itself
    requests.write(3, links(B[:2], A[-1]))
    requests.write(4, links(B[2:3], B[1]))
    assert taken(requests) == [(A, B[:3])]


def test_a_lookup_of_the_rest_is_joined_to_what_was_before() -> None:
    requests = Requests()
    requests.write(1, links(A))
    requests.lookup(2, B)
    requests.write(3, links(B, A[-1]))
    requests.lookup(4, [*B[3:], *C])
    assert [ids for ids, _ in taken(requests)] == [A, B, [*A, *B, *C]]


def test_writes_that_no_lookup_asked_for_are_a_request() -> None:
    requests = Requests()
    requests.write(1, links(A[:2]))
    requests.write(2, links(A[2:], A[1]))
    requests.write(3, links(B, A[3]))
    assert taken(requests) == [(A, []), ([*A[:4], *B], [])]


def test_the_parts_of_a_long_lookup_are_one_request() -> None:
    long = short(chain("long", MAX_BLOCKS + 10))
    requests = Requests()
    requests.lookup(1, long[:MAX_BLOCKS])
    requests.lookup(2, long[MAX_BLOCKS:])
    requests.write(3, links(A, long[-1]))
    requests.lookup(4, B)
    assert taken(requests) == [(long, A), (B, [])]


def test_a_request_is_held_until_it_is_old_or_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests()
    requests.lookup(100, A)
    requests.lookup(200, B)
    assert [request.ids for request in requests.take(150)] == [A]
    requests.write(300, links(C, A[-1]))
    assert [request.ids for request in requests.take(150)] == [], "what comes later is a request of its own"
    monkeypatch.setattr(module, "MAX_HELD", 20)
    assert [request.ids for request in requests.take(0)] == []
    requests.lookup(400, short(chain("d", 6)))
    assert [request.ids for request in requests.take(0)] == [B]


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 12)),
        max_size=30,
    )
)
def test_nothing_that_is_told_breaks_it_or_stays_behind(calls: list[tuple[bool, list[int], int]]) -> None:
    """Also not what no honest caller tells, cycles for one."""
    ids = [bytes([i]) * ID_BYTES for i in range(13)]  # 0 is the root
    requests = Requests()
    asked = 0
    for at, (is_lookup, blocks, parent) in enumerate(calls):
        if is_lookup:
            requests.lookup(at, [ids[i] for i in blocks])
            asked += 1
        else:
            requests.write(at, links([ids[i] for i in blocks], ids[parent]))
    everything = list(requests.take(2**62))
    assert sum(request.looked_up for request in everything) == asked
    assert [request.at_ms for request in everything] == sorted(request.at_ms for request in everything)
    assert (requests._blocks, requests._of_block, requests._of_end) == (0, {}, {})


# ---- the file ---------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_blocks_are_numbers_and_times_count_from_the_first(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceFile(path, 64)
    trace.write(Request(1_800_000_000_500, A[:3], B[:2]))
    trace.write(Request(1_800_000_000_900, [*A[:2], *C[:1]]))
    trace.close()
    assert lines(path) == [
        {"timestamp": 0, "input_length": 192, "output_length": 128, "hash_ids": [0, 1, 2]},
        {"timestamp": 400, "input_length": 192, "output_length": 0, "hash_ids": [0, 1, 3]},
    ]


def test_files_are_bounded_and_each_is_numbered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 300)
    monkeypatch.setattr(module, "FILES", 3)
    path = tmp_path / "trace.jsonl"
    trace = TraceFile(path, 64)
    for i in range(50):
        trace.write(Request(i, short(chain(f"{i}", 3))))
    trace.close()
    assert {file.name for file in tmp_path.iterdir()} == {"trace.jsonl", "trace.jsonl.1", "trace.jsonl.2"}
    for file in tmp_path.iterdir():
        assert lines(file)[0] == {
            "timestamp": 0,
            "input_length": 192,
            "output_length": 0,
            "hash_ids": [0, 1, 2],
        }
        assert file.stat().st_size < 400
    last = path.read_text()
    TraceFile(path, 64).close()
    assert (tmp_path / "trace.jsonl.1").read_text() == last, "a new service does not overwrite it"


def test_a_file_ends_when_it_has_too_many_blocks_to_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BLOCKS", 10)
    path = tmp_path / "trace.jsonl"
    trace = TraceFile(path, 64)
    for name in "abc":
        trace.write(Request(0, short(chain(name, 4))))
    trace.close()
    assert [len(lines(path)), len(lines(tmp_path / "trace.jsonl.1"))] == [1, 2]


# ---- with a server ----------------------------------------------------------------------------------------


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, capacity=100_000)


def test_without_a_recorder_nothing_is_written_down(store: Store, redis: Redis) -> None:
    store.store(chain("a", 3))
    store.calls.lookup(chain("a", 3), ALICE, 0)
    assert not redis.exists(store.calls.key["trace"])


def test_lookups_and_writes_are_recorded_without_a_trace_of_hashes(
    store: Store, redis: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceFile(path, 16)
    recorder = Recorder(StoreFunctions(redis), trace)
    recorder.read()
    first, second = chain("a", 3), chain("a", 3) + chain("b", 2)
    store.calls.lookup(first, ALICE, 0)
    store.store(first)
    store.store(second)  # an answer that became two blocks
    store.calls.lookup(second, ALICE, 0)
    recorder.read()
    recorder.end()
    trace.close()
    written = lines(path)
    assert [line["hash_ids"] for line in written] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert [(line["input_length"], line["output_length"]) for line in written] == [(48, 32), (80, 0)]
    assert (recorder.requests, recorder.lost) == (2, 0)
    text = path.read_text()
    for block in second:
        assert block[:4].hex() not in text
    assert not redis.exists(store.calls.key["trace"]), "and nobody writes any more"


def test_what_comes_too_fast_is_lost_counted_and_bounded(store: Store, redis: Redis, tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.jsonl", 16)
    recorder = Recorder(StoreFunctions(redis), trace)
    recorder.read()
    for i in range(6_000):
        store.calls.lookup([block_hash(f"{i}")], ALICE, 0)
    assert redis.xlen(store.calls.key["trace"]) < 4_500
    while recorder.read():
        pass
    recorder.end()
    trace.close()
    assert recorder.lost > 1_000
    assert recorder.requests + recorder.lost == 6_000


def test_a_recorder_that_dies_is_forgotten_and_a_flush_is_got_over(
    store: Store, redis: Redis, tmp_path: Path
) -> None:
    trace = TraceFile(tmp_path / "trace.jsonl", 16)
    recorder = Recorder(StoreFunctions(redis), trace)
    recorder.read()
    assert 0 < redis.ttl(store.calls.key["trace"]) <= module.STREAM_LIFE_S
    redis.delete(store.calls.key["trace"])
    recorder.read()
    store.calls.lookup(chain("a", 3), ALICE, 0)
    recorder.read()
    recorder.end()
    trace.close()
    assert (recorder.requests, recorder.lost) == (1, 0)


def test_a_full_disk_costs_lines_and_nothing_else(
    store: Store, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = TraceFile(tmp_path / "trace.jsonl", 16)
    recorder = Recorder(StoreFunctions(redis), trace)
    recorder.read()
    store.calls.lookup(chain("a", 3), ALICE, 0)

    def full(request: Request) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "write", full)
    recorder.read()
    recorder.end()
    trace.close()
    assert (recorder.requests, recorder.lost) == (0, 1)


def test_what_was_recorded_of_a_workload_replays_to_the_same_hits(
    redis_server: LocalRedis, redis: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceFile(path, 16)
    store = Store(redis, capacity=10**9)
    recorder = Recorder(store.calls, trace)
    recorder.read()
    workload = chat(1, seconds=600)
    for request in workload:
        hashes = [block_hash(f"{id}") for id in request.ids]
        found = len(store.calls.lookup(hashes, ALICE, 0))
        reserved = store.calls.reserve(new_blocks(hashes)[found:], 10_000)
        store.calls.commit(reserved.fence, hashes[found:])
        recorder.read()
    recorder.end()
    trace.close()
    recorded = read_trace(path)
    assert len(recorded) == len(workload) > 300
    for capacity in (200, 800):
        ours = [replay(Ours(capacity), requests, None) for requests in (workload, recorded)]
        # The calls took a second, the workload ten minutes: ages differ, the shape does not.
        assert ours[1] == pytest.approx(ours[0], rel=0.25)
    assert replay(Ours(10**6), recorded, None) == replay(Ours(10**6), workload, None)
    command = [sys.executable, "-m", "benchmarks.eviction", str(path), "--capacities", "5"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{len(workload)} requests" in answer.stdout
    assert "ours, no hints" in answer.stdout

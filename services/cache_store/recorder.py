"""A record of what workers look up and write, in the format of Mooncake's traces, one JSON object a line:

    {"timestamp": 27482, "input_length": 6144, "output_length": 512, "hash_ids": [46, 47, 48, 2101]}

`timestamp` is ms since the file's first request; `hash_ids` are the request's blocks from the root on, the
lengths are in tokens of whole blocks, `output_length` of what was written behind them later. Block hashes are
replaced by integers in the order of their first occurrence in the file: nothing of a prompt is in it, nothing
that another file or the store could be asked for, and no owner. `python -m benchmarks.eviction FILE` replays
it.

The functions tell it through a stream of bounded length that is there only while a recorder keeps it alive:
with none, a call pays one EXISTS. What comes faster than it is read is lost, and counted. A request here is a
lookup, or a run of writes that no lookup had asked for; a worker that has a prefix's beginning looks up only
the rest, which is joined to the blocks before it as far as they have been seen.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TextIO

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from services.cache_store.functions import MAX_BLOCKS, ROOT, StoreFunctions

log = logging.getLogger(__name__)

#: Of a block's hash in the stream: collisions among a billion blocks are as likely as 1 to 40.
ID_BYTES = 8
_ROOT = ROOT[:ID_BYTES]

#: The stream goes when no recorder has been there for so long.
STREAM_LIFE_S = 10

#: A request is written when it is so old: until then writes may follow it.
HOLD_MS = 30_000

#: Blocks of requests that are held, and blocks whose parent is known: some 100 bytes each.
MAX_HELD = 1 << 19
MAX_PARENTS = 1 << 19

#: A file is followed by a new one at so many bytes, or blocks to number; the oldest of so many files goes.
FILE_BYTES = 64 << 20
FILE_BLOCKS = 1 << 20
FILES = 8

_READ = 256  # entries at once
_PAUSE_S = 0.25


@dataclass
class Request:
    at_ms: int
    ids: list[bytes]
    written: list[bytes] = field(default_factory=list)  # behind them
    looked_up: bool = True

    @property
    def end(self) -> bytes:
        return self.written[-1] if self.written else self.ids[-1]


class Requests:
    """Puts lookups and writes together to requests. Times are ms and do not fall."""

    def __init__(self) -> None:
        self._held: deque[Request] = deque()
        self._blocks = 0  # of those
        self._of_block: dict[bytes, Request] = {}  # of a held request's ids, the latest one
        self._of_end: dict[bytes, Request] = {}
        self._parents: OrderedDict[bytes, bytes] = OrderedDict()

    def lookup(self, at_ms: int, ids: Sequence[bytes]) -> None:
        """A worker asked for a run of blocks, each the parent of the next one."""
        for parent, block in pairwise(ids):
            self._learn(block, parent)
        before = self._held[-1] if self._held else None
        continues = before and before.looked_up and not before.written and len(before.ids) % MAX_BLOCKS == 0
        if before and continues and self._parents.get(ids[0]) in (None, before.ids[-1]):
            self._learn(ids[0], before.ids[-1])  # a lookup of more blocks than a call takes
            self._extend(before, before.ids, ids)
            return
        self._hold(Request(at_ms, [*self._chain(self._parents.get(ids[0], _ROOT)), *ids]))

    def write(self, at_ms: int, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """A worker stores blocks: (parent, block), parents first."""
        for parent, block in pairs:
            self._learn(block, parent)
            if block in self._of_block:
                continue
            request = self._of_end.get(parent)
            if request is None:
                self._hold(Request(at_ms, [*self._chain(parent), block], looked_up=False))
            else:
                self._extend(request, request.written if request.looked_up else request.ids, [block])

    def take(self, before_ms: int) -> Iterator[Request]:
        """Requests older than that, the oldest first, and as many more as are too many."""
        while self._held and (self._held[0].at_ms < before_ms or self._blocks > MAX_HELD):
            request = self._held.popleft()
            self._blocks -= len(request.ids) + len(request.written)
            for block in (*request.ids, *request.written):
                if self._of_block.get(block) is request:
                    del self._of_block[block]
            if self._of_end.get(request.end) is request:
                del self._of_end[request.end]
            yield request

    def _hold(self, request: Request) -> None:
        self._held.append(request)
        self._blocks += len(request.ids)
        self._of_block.update(dict.fromkeys(request.ids, request))
        self._of_end[request.end] = request

    def _extend(self, request: Request, blocks: list[bytes], new: Sequence[bytes]) -> None:
        if self._of_end.get(request.end) is request:
            del self._of_end[request.end]
        blocks += new
        self._blocks += len(new)
        self._of_block.update(dict.fromkeys(new, request))
        self._of_end[request.end] = request

    def _learn(self, block: bytes, parent: bytes) -> None:
        self._parents[block] = parent
        self._parents.move_to_end(block)
        if len(self._parents) > MAX_PARENTS:
            self._parents.popitem(last=False)

    def _chain(self, block: bytes) -> list[bytes]:
        """From as near to the root as is known to `block`."""
        chain: dict[bytes, None] = {}
        while block != _ROOT and block not in chain:
            chain[block] = None
            block = self._parents.get(block, _ROOT)
        return list(reversed(chain))


class TraceFile:
    """The file of requests, and the ones before it: FILE, FILE.1, FILE.2 and so on. Thread-safe. Raises
    OSError where the first one cannot be opened."""

    def __init__(self, path: Path, block_size: int) -> None:
        """`block_size` in tokens."""
        self._path = path
        self._block_size = block_size
        self._lock = threading.Lock()
        self._numbers: dict[bytes, int] = {}
        self._began_ms: int | None = None
        self._size = 0
        self._file = self._open()

    def write(self, request: Request) -> None:
        """Raises OSError; then the line is lost."""
        with self._lock:
            full = len(self._numbers) + len(request.ids) > FILE_BLOCKS
            if self._size >= FILE_BYTES or (self._size and full):
                self._file.flush()
                full_file, self._file = self._file, self._open()
                full_file.close()
                self._numbers, self._began_ms, self._size = {}, None, 0
            if self._began_ms is None:
                self._began_ms = request.at_ms
            numbers = self._numbers
            line = json.dumps(
                {
                    "timestamp": max(0, request.at_ms - self._began_ms),
                    "input_length": len(request.ids) * self._block_size,
                    "output_length": len(request.written) * self._block_size,
                    "hash_ids": [numbers.setdefault(block, len(numbers)) for block in request.ids],
                }
            )
            self._size += self._file.write(line + "\n")

    def flush(self) -> None:
        with self._lock:
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _open(self) -> TextIO:
        """A new file: what is there is numbered otherwise."""
        if self._path.is_file() and self._path.stat().st_size:
            self._rotate()
        return self._path.open("w", encoding="utf-8")

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{i}") for i in range(1, FILES))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)


class Recorder(Collector):
    """Records what one server is asked, and is the collector of its metrics."""

    def __init__(self, functions: StoreFunctions, trace: TraceFile) -> None:
        self.requests = self.lost = 0
        self._redis = functions.redis
        self._key = functions.key["trace"]
        self._trace = trace
        self._assembly = Requests()
        self._position = b""
        self._added = 0  # entries of the stream that were there or have been read
        self._complained = False

    def run(self, stop: threading.Event) -> None:
        """Read until `stop`, then write all that is held."""
        while not stop.is_set():
            more = False
            try:
                more = self.read()
            except (RedisError, OSError) as error:
                self._complain(str(error))
            if not more:
                stop.wait(_PAUSE_S)
        self.end()

    def read(self) -> bool:
        """Take what was asked since the last time, and whether there may be more. Raises what redis-py
        raises."""
        if not self._position or not self._redis.expire(self._key, STREAM_LIFE_S):
            self._begin()
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.xrange(self._key, b"(" + self._position, count=_READ)
        pipeline.xinfo_stream(self._key)
        pipeline.time()
        entries, stream, (seconds, _) = pipeline.execute()
        for name, fields in entries:
            at_ms = int(name.split(b"-")[0])
            if b"l" in fields:
                self._assembly.lookup(at_ms, _ids(fields[b"l"]))
            elif b"w" in fields:
                ids = _ids(fields[b"w"])
                self._assembly.write(at_ms, zip(ids[::2], ids[1::2], strict=True))
            self._position = name
        self._added += len(entries)
        if len(entries) < _READ:  # all that is there: what was added besides has been dropped
            self.lost += stream["entries-added"] - self._added
            self._added = stream["entries-added"]
        self._write_out(seconds * 1000 - HOLD_MS)
        return len(entries) == _READ

    def end(self) -> None:
        """Read what is left, let nobody write to the stream any more, and write all into the file."""
        with suppress(RedisError, OSError):  # the stream goes by itself
            while self.read():
                pass
            self._redis.delete(self._key)
        self._write_out(2**62)

    def _write_out(self, before_ms: int) -> None:
        for request in self._assembly.take(before_ms):
            try:
                self._trace.write(request)
                self.requests += 1
            except OSError as error:
                self.lost += 1
                self._complain(str(error))
        try:
            self._trace.flush()
        except OSError as error:
            self._complain(str(error))

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily("reprise_store_recorded_requests", "Requests in the record.", self.requests)
        yield CounterMetricFamily(
            "reprise_store_record_lost", "Lookups and writes that came too fast for the record.", self.lost
        )

    def _begin(self) -> None:
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.xadd(self._key, {b"begin": b""})
        pipeline.expire(self._key, STREAM_LIFE_S)
        pipeline.xinfo_stream(self._key)
        self._position, _, stream = pipeline.execute()
        self._added = stream["entries-added"]

    def _complain(self, message: str) -> None:
        if not self._complained:
            log.warning("the record of lookups loses some: %s", message)
        self._complained = True


def _ids(joined: bytes) -> list[bytes]:
    return [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]

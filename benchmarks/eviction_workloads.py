"""Requests for `benchmarks.eviction`: traces in Mooncake's format, seeded generators of other shapes, hints.

A request is a time and the ids of its blocks, from the root on; a block's id stands for its whole prefix.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Request:
    at_ms: int
    ids: tuple[int, ...]


def read_trace(path: Path) -> list[Request]:
    """The requests of a JSONL file with `timestamp` (ms) and `hash_ids`, by time. Raises ValueError, which
    names the line, for anything else."""
    requests = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                at_ms, ids = int(entry["timestamp"]), tuple(entry["hash_ids"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected timestamp and hash_ids in an object, got {line[:60]!r}"
                ) from error
            if not all(isinstance(id, int) and id >= 0 for id in ids):
                raise ValueError(f"{path}, line {number}: hash_ids must be integers from 0 on")
            if ids:
                requests.append(Request(at_ms, ids))
    if not requests:
        raise ValueError(f"{path}: no requests")
    return sorted(requests, key=lambda request: request.at_ms)


def unique_blocks(requests: Sequence[Request]) -> int:
    return len({id for request in requests for id in request.ids})


def hints(requests: Sequence[Request], right: float, seed: int) -> list[bool]:
    """Whether each request is said to be continued, so many rightly: its last full block is used again."""
    last_use = {id: number for number, request in enumerate(requests) for id in request.ids}
    random = Random(seed)
    said = []
    for number, request in enumerate(requests):
        last_full = request.ids[-2] if len(request.ids) > 1 else request.ids[-1]
        truth = last_use[last_full] > number
        said.append(truth if random.random() < right else not truth)
    return said


# ---- generators ------------------------------------------------------------------------------------------

#: A session says when it sends what: seconds to wait, blocks of the request.
Session = Iterator[tuple[float, list[int]]]


class _Blocks:
    """New ids, and prompts that sessions share."""

    def __init__(self, random: Random) -> None:
        self._ids = count()
        self._random = random

    def new(self, least: int, most: int) -> list[int]:
        return [next(self._ids) for _ in range(self._random.randint(least, most))]


def _zipf(random: Random, items: Sequence[list[int]]) -> list[int]:
    return random.choices(items, [1 / rank for rank in range(1, len(items) + 1)])[0]


def _run(sessions: Callable[[], Session], arrivals: Iterator[float], seconds: float) -> list[Request]:
    """All requests of sessions that begin at `arrivals`, in order, until `seconds`."""
    numbers = count()
    waiting: list[tuple[float, int, Session, list[int]]] = []
    requests: list[Request] = []

    def push(at: float, session: Session) -> None:
        step = next(session, None)
        if step is not None:
            heapq.heappush(waiting, (at + step[0], next(numbers), session, step[1]))

    arrival = next(arrivals)
    while True:
        while not waiting or arrival <= waiting[0][0]:
            push(arrival, sessions())
            arrival = next(arrivals)
        at, _, session, ids = heapq.heappop(waiting)
        if at > seconds:
            return requests
        requests.append(Request(int(at * 1000), tuple(ids)))
        push(at, session)


def _poisson(random: Random, a_second: float) -> Iterator[float]:
    at = 0.0
    while True:
        at += random.expovariate(a_second)
        yield at


def chat(seed: int, seconds: float = 3600) -> list[Request]:
    """Conversations with people: shared system prompts, a minute between turns, two in five end with each."""
    random = Random(seed)
    blocks = _Blocks(random)
    prompts = [blocks.new(2, 6) for _ in range(20)]

    def session() -> Session:
        ids = list(_zipf(random, prompts))
        wait = 0.0
        while True:
            ids += blocks.new(1, 6)
            yield wait, list(ids)
            if random.random() < 0.4:
                return
            wait = random.lognormvariate(4.1, 1.0)  # median 60 s

    return _run(session, _poisson(random, 0.8), seconds)


def agents(seed: int, seconds: float = 3600) -> list[Request]:
    """Agents that call tools: long shared instructions, seconds between steps, now and then a slow tool."""
    random = Random(seed)
    blocks = _Blocks(random)
    prompts = [blocks.new(6, 16) for _ in range(8)]

    def session() -> Session:
        ids = list(_zipf(random, prompts)) + blocks.new(1, 4)
        wait = 0.0
        for _ in range(random.randint(3, 40)):
            yield wait, list(ids)
            ids += blocks.new(1, 3)
            slow = random.random() < 0.1
            wait = random.lognormvariate(5.3, 0.5) if slow else random.lognormvariate(1.6, 0.7)

    return _run(session, _poisson(random, 0.08), seconds)


def batch(seed: int, seconds: float = 3600) -> list[Request]:
    """Jobs of many short questions about one long document each, several at once, beside a little chat."""
    random = Random(seed)
    blocks = _Blocks(random)
    talk = chat(seed + 1, seconds)[::4]

    def session() -> Session:
        document = blocks.new(30, 80)
        for _ in range(random.randint(20, 200)):
            yield random.expovariate(1 / 8), document + blocks.new(1, 3)

    jobs = _run(session, _poisson(random, 0.012), seconds)
    return _merge(jobs, talk)


def scans(seed: int, seconds: float = 3600) -> list[Request]:
    """Chat, and bursts of long documents that are read once."""
    random = Random(seed)
    blocks = _Blocks(random)

    def session() -> Session:
        for _ in range(random.randint(5, 30)):
            yield random.expovariate(1 / 2), blocks.new(20, 120)

    return _merge(chat(seed + 1, seconds), _run(session, _poisson(random, 0.01), seconds))


def _merge(first: Sequence[Request], second: Sequence[Request]) -> list[Request]:
    """Both at once; they share no block."""
    apart = 1 + max(id for request in first for id in request.ids)
    moved = [Request(request.at_ms, tuple(id + apart for id in request.ids)) for request in second]
    return sorted([*first, *moved], key=lambda request: request.at_ms)


GENERATORS: dict[str, Callable[[int], list[Request]]] = {
    "chat": chat,
    "agents": agents,
    "batch": batch,
    "scans": scans,
}

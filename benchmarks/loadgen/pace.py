"""When requests are sent: on a schedule whatever the server does, or a fixed number at a time."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from .prompts import Prepared, Reply, RequestWriter
from .record import Record, Sender
from .workload import Session

Arrival = Literal["poisson", "fixed"]

#: Requests written before they are due: a trace's bursts leave together, although a long prompt takes a
#: millisecond to write.
LOOK_AHEAD = 64


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """`rate` sessions a second on average, at random (Poisson) or even distances; infinite: all at once.

    Users do not wait for each other: a server that falls behind is sent more all the same.
    """

    rate: float
    arrival: Arrival = "poisson"

    def arrivals(self, seed: int) -> Iterator[float]:
        """Seconds after the start of the run."""
        rng = Random(f"{seed}/arrivals")
        at_s = 0.0
        while True:
            yield at_s
            at_s += rng.expovariate(self.rate) if self.arrival == "poisson" else 1 / self.rate


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The trace's own times."""


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` sessions at a time: the next begins when one ends. Shows capacity, hides queueing."""

    concurrency: int


Pace = OpenLoop | Scheduled | ClosedLoop


@dataclass(slots=True)
class Run:
    """Plays sessions at a pace and keeps what happened; readable while it goes on.

    After `duration_s` no request is sent; those under way are waited for.
    """

    sender: Sender
    writer: RequestWriter
    seed: int = 0
    duration_s: float | None = None
    records: list[Record] = field(default_factory=list)
    turns_not_sent: int = 0  # of conversations that ended early
    in_flight: int = 0
    peak_in_flight: int = 0
    start_s: float = 0.0

    async def play(self, sessions: Iterator[Session], pace: Pace) -> None:
        """Returns when every request has ended. Cancelled: those under way are recorded as cancelled."""
        self.start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            match pace:
                case ClosedLoop(concurrency):
                    for _ in range(concurrency):
                        group.create_task(self._one_after_another(sessions))
                case OpenLoop():
                    await self._on_time(zip(pace.arrivals(self.seed), sessions, strict=False), group)
                case Scheduled():
                    await self._on_time(((session.start_s or 0.0, session) for session in sessions), group)

    async def _on_time(self, timed: Iterator[tuple[float, Session]], group: asyncio.TaskGroup) -> None:
        ahead = deque(self._written(itertools.islice(timed, LOOK_AHEAD)))
        more = self._written(timed)
        self.start_s = time.perf_counter()
        while ahead:
            at_s, session, prepared = ahead.popleft()
            due_s = self.start_s + at_s
            if self._over(max(due_s, time.perf_counter())):
                return
            await _until(due_s)
            group.create_task(self._session(session, prepared, due_s))
            while len(ahead) < LOOK_AHEAD and not (ahead and self._is_due(ahead[0][0])):
                await asyncio.sleep(0)
                written = next(more, None)
                if written is None:
                    break
                ahead.append(written)

    def _written(self, timed: Iterator[tuple[float, Session]]) -> Iterator[tuple[float, Session, Prepared]]:
        return ((at_s, session, self.writer.write(session, [])) for at_s, session in timed)

    def _is_due(self, at_s: float) -> bool:
        return time.perf_counter() >= self.start_s + at_s

    async def _one_after_another(self, sessions: Iterator[Session]) -> None:
        while not self._over(time.perf_counter()):
            session = next(sessions, None)
            if session is None:
                return
            first = self.writer.write(session, [])
            await self._session(session, first, time.perf_counter())

    async def _session(self, session: Session, prepared: Prepared, due_s: float) -> None:
        replies: list[Reply] = []
        while True:
            record = await self._request(Record(session.name, len(replies), due_s, due_s), prepared)
            replies.append(Reply(record.text, record.output_tokens))
            record.text = ""
            left = len(session.turns) - len(replies)
            if not left:
                return
            think_s = session.turns[len(replies)].think_s
            if record.outcome != "ok" or self._over(record.end_s + think_s):
                self.turns_not_sent += left
                return
            prepared = self.writer.write(session, replies)
            due_s = max(record.end_s + think_s, time.perf_counter())
            await _until(due_s)

    async def _request(self, record: Record, prepared: Prepared) -> Record:
        self.records.append(record)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        try:
            await self.sender.send(record, prepared)
        finally:
            self.in_flight -= 1
        return record

    def _over(self, at_s: float) -> bool:
        return self.duration_s is not None and at_s - self.start_s >= self.duration_s


async def _until(at_s: float) -> None:
    """Never returns early: uvloop's timers may fire most of a millisecond before their time."""
    while True:
        left_s = at_s - time.perf_counter()
        if left_s <= 0:
            return
        await asyncio.sleep(left_s)

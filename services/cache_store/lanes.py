"""Who may use the link to a server next: what requests wait for goes before what nobody waits for.

    PEEK      metadata calls: short, and every load begins with one
    PREFETCH  payloads that a queued request waits for
    GET       payloads that no request waits for yet
    PUT       payloads on their way to the store

A turn is the right to move some bytes. Turns are bounded in number and in bytes a lane, so a slow server
holds callers up instead of filling memory; of those that wait, the highest lane goes first, then who came
first. Turns under way are not interrupted, but GET and PUT give way between two values.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from itertools import count


class Lane(IntEnum):
    """Lower goes first."""

    PEEK = 0
    PREFETCH = 1
    GET = 2
    PUT = 3


@dataclass(frozen=True)
class Limit:
    """What may be under way in one lane. A turn larger than `size` bytes is let in when it is alone."""

    turns: int
    size: int


#: A turn of payloads is a connection and up to 8 MiB (payloads.BATCH_BYTES) in flight.
LIMITS: Mapping[Lane, Limit] = {
    Lane.PEEK: Limit(16, 1 << 20),
    Lane.PREFETCH: Limit(3, 24 << 20),
    Lane.GET: Limit(2, 16 << 20),
    Lane.PUT: Limit(2, 16 << 20),
}

#: Of both lanes of reads together: two keep a server busy while a third is being verified. Writes have turns
#: of their own, so no read ever waits for one to end.
_READ_TURNS = 3
_READS = (Lane.PREFETCH, Lane.GET)

#: A write waits for readers between two values for so long at most: its reservation must not run out.
_GIVE_WAY_S = 0.01


class LaneBusy(Exception):
    """No turn within the time. Says nothing about the server but that others use it."""


class Lanes:
    """The turns of one server. Thread-safe."""

    def __init__(self, limits: Mapping[Lane, Limit] = LIMITS) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._arrivals = count()
        self._waiting: list[tuple[Lane, int, int]] = []  # lane, arrival, bytes
        self._calls = [0] * len(Lane)  # by lane, waiting or in their turn
        self._turns: Counter[Lane] = Counter()
        self._bytes: Counter[Lane] = Counter()
        self._closed = False

    @contextmanager
    def turn(self, lane: Lane, size: int, timeout_s: float) -> Iterator[None]:
        """A turn to move `size` bytes. Raises LaneBusy after `timeout_s`, ConnectionError once closed."""
        self._begin(lane, size, timeout_s)
        try:
            yield
        finally:
            with self._changed:
                self._calls[lane] -= 1
                self._turns[lane] -= 1
                self._bytes[lane] -= size
                self._changed.notify_all()

    def give_way(self, lane: Lane) -> None:
        """Called in a turn, between two values: let higher lanes go first, for a while."""
        if self._is_wanted_above(lane):  # mostly not, which needs no lock to see
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._is_wanted_above(lane), _GIVE_WAY_S)

    def close(self) -> None:
        """Who waits for a turn gets ConnectionError, now and for ever."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def under_way(self) -> dict[Lane, tuple[int, int]]:
        """(turns, bytes) by lane, lanes without any left out."""
        with self._changed:
            return {lane: (turns, self._bytes[lane]) for lane, turns in self._turns.items() if turns}

    def _begin(self, lane: Lane, size: int, timeout_s: float) -> None:
        with self._changed:
            me = (lane, next(self._arrivals), size)
            self._waiting.append(me)
            self._calls[lane] += 1
            try:
                if not self._changed.wait_for(lambda: self._closed or self._may_go(me), timeout_s):
                    raise LaneBusy(f"no turn to {lane.name} within {timeout_s:g} s")
                if self._closed:
                    raise ConnectionAbortedError("the store's client is closed")
                self._turns[lane] += 1
                self._bytes[lane] += size
            except BaseException:
                self._calls[lane] -= 1
                raise
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()  # who came later may go now

    def _may_go(self, me: tuple[Lane, int, int]) -> bool:
        """Whether there is room for `me` and for nobody who goes before."""
        return self._has_room(me) and not any(other < me and self._has_room(other) for other in self._waiting)

    def _has_room(self, one: tuple[Lane, int, int]) -> bool:
        lane, _, size = one
        limit = self._limits[lane]
        if self._turns[lane] >= limit.turns:
            return False
        if self._bytes[lane] and self._bytes[lane] + size > limit.size:
            return False
        return lane not in _READS or sum(self._turns[read] for read in _READS) < _READ_TURNS

    def _is_wanted_above(self, lane: Lane) -> bool:
        return any(self._calls[:lane])

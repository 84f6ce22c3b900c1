"""All flights of one worker at one server of the store: claims renewed, others' progress looked at.

    ask    what a load found missing is claimed, or who computes it followed     a reader's thread
    look   claims are renewed or let go; what was stored of followed runs read   one thread

Nobody waits for this thread: what it does not do in time is given up by the engine (see flight.py), and a
claim that is not renewed ends within a second.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable

from services.cache_store.claims import LIFE_S, Claimed, Followed
from services.cache_store.client import BlockStore
from services.cache_store.known import KnownBlocks
from services.cache_store.link import LinkEstimate
from services.worker.flight import SHARE, Flight, State

log = logging.getLogger(__name__)

#: How often to look whether more of a followed run is stored: little beside what is worth following, and 100
#: times a second two calls of a few microseconds for the server.
POLL_S = 0.01

#: Several times in the life of a claim, so that one that comes late does no harm.
BEAT_S = LIFE_S / 4

#: From a block's being stored to its being here: looks at who computes and what is stored, a lookup, a read.
_ROUND_TRIPS = 4

#: Blocks looked at in one round; what is stored beyond them is seen in the next.
_LOOK_BLOCKS = 64

#: A claim ends when its run should have been stored twice over and so long ago: some of it was not written.
_OVERDUE_S = 5.0

_JOIN_S = 5.0


class Flights:
    """`bring` reads what is stored of a flight, in a thread of its own; `start` begins to look."""

    def __init__(
        self,
        store: BlockStore,
        known: KnownBlocks,
        link: LinkEstimate,
        block_bytes: int,
        bring: Callable[[Flight], None],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._known = known
        self._link = link
        self._block_bytes = block_bytes
        self._bring = bring
        self._clock = clock
        self._work = threading.Condition()
        self._flights: list[Flight] = []
        self._until: dict[Flight, float] = {}  # by flights that are ours
        self._unwritten: set[bytes] = set()
        self._elsewhere: dict[bytes, float] = {}  # blocks that another writer is at, since when
        self._awaited: frozenset[bytes] = frozenset()
        self._woken = self._stopped = False
        self._beat_s = -math.inf
        self._thread = threading.Thread(target=self._run, name="store-flights", daemon=True)

    @property
    def awaited(self) -> frozenset[bytes]:
        """Blocks that are ours to compute, others wait for, and the store does not have yet."""
        return self._awaited

    def start(self) -> None:
        self._thread.start()

    def ask(self, flight: Flight) -> bool:
        """Claim what is missing or learn who has. False: the sequence just computes it."""
        self._ask(flight)
        if flight.state is State.OVER:
            return False
        with self._work:
            self._flights.append(flight)
        self.wake()
        return True

    def wake(self) -> None:
        """Something has changed: look now."""
        with self._work:
            self._woken = True
            self._work.notify()

    def written(self, unwritten: Iterable[bytes], elsewhere: Iterable[bytes]) -> None:
        """Blocks were written, or were to be and are not in the store, or are being written by another."""
        with self._work:
            if self._flights:
                self._unwritten.update(unwritten)
                self._elsewhere.update(dict.fromkeys(elsewhere, self._clock()))
                self._woken = True
                self._work.notify()

    def stop(self) -> None:
        with self._work:
            self._stopped = True
            self._work.notify()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def look(self) -> None:
        """One round."""
        with self._work:
            flights = list(self._flights)
            unwritten, self._unwritten = self._unwritten, set()
        now = self._clock()
        if now - self._beat_s >= BEAT_S:
            self._beat_s = now
            self._renew([flight for flight in flights if flight.key is not None])
        for flight in flights:
            if flight.state is State.THEIRS:
                self._watch(flight)
            elif flight.state is State.OURS:
                self._check_written(flight, unwritten)
        over = [flight for flight in flights if flight.state is State.OVER]
        self._release(over)
        with self._work:
            self._flights = [flight for flight in self._flights if flight not in over]
            if not self._flights:
                self._elsewhere.clear()
        self._note_awaited()

    # ---- inside

    def _run(self) -> None:
        while True:
            with self._work:
                if not self._woken and not self._stopped:
                    self._work.wait(self._rest_s())
                if self._stopped:
                    return
                self._woken = False
            try:
                self.look()
            except Exception:  # a bug must cost these flights, not all to come
                log.exception("flights are given up")
                with self._work:
                    for flight in self._flights:
                        flight.over()

    def _rest_s(self) -> float | None:
        """Until the next round, None = until somebody wakes it."""
        if any(flight.state is State.THEIRS for flight in self._flights):
            return POLL_S
        return max(0.0, self._beat_s + BEAT_S - self._clock()) if self._flights else None

    def _ask(self, flight: Flight) -> None:
        now = self._clock()
        start = flight.brought
        lag_s = POLL_S + _ROUND_TRIPS * self._link.latency_s(now)
        least_s = lag_s / SHARE  # else it is later than following may make a request
        if flight.has_waited_enough or not least_s <= flight.left_s() < math.inf:
            flight.over()
            return
        missing = flight.run[start:]
        times = flight.times(len(missing) * self._block_bytes / self._link.bytes_per_s(now), lag_s)
        before = [*flight.before, *flight.run[:start]]
        answer = self._store.claim(before, missing, times, flight.least(least_s))
        if isinstance(answer, Claimed) and (key := answer.key) is not None:
            stored = self._store.stored(missing)
            self._until[flight] = now + 2 * times.due_s + _OVERDUE_S
            if stored == 0 and flight.ours(key):
                self._store.count("claims")
                return
            self._store.release_claims([key])
            if stored:  # whoever had claimed it has just stored it
                answer = Followed(stored, 0.0, key, b"")
        if not isinstance(answer, Followed) or not flight.theirs(answer, start):
            flight.over()

    def _watch(self, flight: Flight) -> None:
        """See how far the other has come; ask again where it ends."""
        followed = flight.followed
        assert followed is not None
        held = self._store.holds(followed)  # asked first: it stores, then it lets go
        start = max(flight.stored, flight.brought)
        stored = 0
        if start < flight.target:
            more = self._store.stored(flight.run[start : min(flight.target, start + _LOOK_BLOCKS)])
            if more is None:
                flight.over()
                return
            stored = more
        if held is None:
            flight.over()
            return
        flight.heard(start + stored)
        if flight.reading:
            return
        if flight.brought < flight.stored:
            if flight.room > 0:
                flight.reading = True
                self._bring(flight)
        elif flight.brought >= flight.target or not (held or stored):
            self._ask(flight)

    def _check_written(self, flight: Flight, unwritten: set[bytes]) -> None:
        """Let a claim go that is kept, or will not be."""
        run, now = flight.run, self._clock()
        while flight.stored < len(run) and run[flight.stored] in self._known:
            flight.stored += 1
        kept = flight.stored == len(run)
        broken = now > self._until[flight] or not unwritten.isdisjoint(run[flight.stored :])
        if not kept and (since_s := self._elsewhere.get(run[flight.stored])) is not None:
            # Nobody tells us when another has written it; one that died at it has it reserved for some time.
            stored = self._store.stored(run[flight.stored : flight.stored + _LOOK_BLOCKS]) or 0
            self._known.add(run[flight.stored : flight.stored + stored])
            broken |= not stored and now - since_s > LIFE_S
        if kept or broken:
            flight.over()

    def _renew(self, flights: list[Flight]) -> None:
        answers = self._store.renew_claims([flight.key for flight in flights if flight.key is not None])
        for flight, (held, followed) in zip(flights, answers or [], strict=False):
            if not held:
                self._until.pop(flight, None)
                if flight.lost():
                    self._ask(flight)
            elif followed and not flight.awaited:
                flight.awaited = True
                self._store.count("claims_followed")

    def _release(self, flights: list[Flight]) -> None:
        keys = [flight.key for flight in flights if flight.key is not None]
        if keys:
            self._store.release_claims(keys)
        for flight in flights:
            flight.key = None
            self._until.pop(flight, None)

    def _note_awaited(self) -> None:
        awaited = frozenset(
            block
            for flight in self._flights
            if flight.state is State.OURS and flight.awaited
            for block in flight.run[flight.stored :]
        )
        if awaited != self._awaited:
            self._awaited = awaited

"""Loads from the store: a queue, two threads, and the decision what is worth loading.

start -> gate -> queue -> [thread] lookup + lease -> gate -> read and verify, from the back -> release
What the lookup did not find becomes a flight (flights.py); what comes of those is read by the same threads.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

import torch

from kernels.kv_payload import Codec, KVShape, are_finite
from services.cache_store.client import BlockStore, Found
from services.cache_store.frames import HEADER_BYTES, BadFrame, Payload
from services.cache_store.known import KnownBlocks
from services.cache_store.link import LinkEstimate
from services.worker.flight import Flight
from services.worker.flights import Flights
from services.worker.gate import blocks_worth_loading
from services.worker.tiers import EncodedBlock, Outlook

log = logging.getLogger(__name__)

#: Two, so that one slow load does not hold up the next; beyond that the interpreter lock is the limit.
_THREADS = 2
_MOST_WAITING = 64

#: A batch takes about so long: what a load has is known, and its end decided, so often.
_BATCH_S = 0.01

#: A load that is late is expected to stay away this many times as long as it has by now: so few chunks are
#: computed in pieces for a store that is dead.
_DOUBT = 3.0

#: A read that failed counts as one that took so many times as long.
_FAILED = 4.0

_JOIN_S = 5.0


class StoreLoad:
    """A `Load`: a thread adds to it, the engine takes from it, and whichever ends it first wins."""

    def __init__(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        most: int,
        answer_s: float,
        block_s: float,
        clock: Callable[[], float],
        outlook: Outlook | None = None,
    ) -> None:
        """Expected: `answer_s` until the store says what it has, then `block_s` a block."""
        self.hashes = hashes
        self.recompute_s = recompute_s
        self.tenant = tenant
        self.most = most
        self.outlook = outlook
        self.over = False
        self.found: int | None = None
        self.flight: Flight | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._blocks: list[EncodedBlock] = []
        self._brought = 0
        self._left = most  # blocks that may still come
        self._block_s = block_s
        self._heard_s = clock()  # when it was last heard of,
        self._due_s = answer_s  # and how long after that it should be again

    @property
    def left_s(self) -> float:
        """Seconds of the link that it still needs, as far as known."""
        return 0.0 if self.over else self._left * self._block_s

    def take(self) -> list[EncodedBlock]:
        with self._lock:
            blocks, self._blocks = self._blocks, []
            return blocks

    def expected_s(self, blocks: int) -> float:
        with self._lock:
            if self.over:
                return math.inf if blocks else 0.0
            waited_s = self._clock() - self._heard_s
            left_s = blocks * self._block_s - waited_s
            if self.found is None:
                left_s += self._due_s
            late = blocks and waited_s > self._due_s
            return max(left_s, _DOUBT * waited_s if late else 0.0)

    def cancel(self) -> None:
        with self._lock:
            self.over = True
            self._blocks = []

    @property
    def saved_s(self) -> float:
        """Seconds of prefill that the blocks it brought stand for."""
        if not self._brought or self.found is None:
            return 0.0
        front = self.found - self._brought
        return self.recompute_s[self.found - 1] - (self.recompute_s[front - 1] if front else 0.0)

    def depart(self, flight: Flight) -> bool:
        """What the store lacks is a flight. False if nobody will look at it any more."""
        with self._lock:
            if not self.over:
                self.flight = flight
            return not self.over

    def answer(self, found: int) -> None:
        """The store has `found` of the blocks asked for and they are worth loading."""
        with self._lock:
            self.found = found
            self._left = min(self.most, found)
            self._heard_s = self._clock()

    def expect(self, seconds: float) -> None:
        """The next blocks should come within `seconds`."""
        self._due_s = seconds

    def add(self, blocks: list[EncodedBlock], block_s: float) -> None:
        """The next blocks, which took `block_s` each."""
        with self._lock:
            if not self.over:
                self._blocks += blocks
                self._brought += len(blocks)
                self._left -= len(blocks)
                self._block_s = block_s
                self._heard_s = self._clock()

    def finish(self) -> None:
        with self._lock:
            self.over = True


class StoreReader:
    """The threads that load and the queue before them."""

    def __init__(
        self,
        store: BlockStore,
        known: KnownBlocks,
        link: LinkEstimate,
        shape: KVShape,
        block_bytes: int,
        pinned: bool,
        clock: Callable[[], float],
    ) -> None:
        """`block_bytes`: what a payload most likely has, for the time that a load may take. `pinned`: blocks
        are received into memory that a GPU copies from."""
        self._shape = shape
        self._block_bytes = block_bytes
        self._pinned = pinned
        self._store = store
        self._known = known
        self._link = link
        self._clock = clock
        self.flights = Flights(store, known, link, block_bytes, self._bring_soon, clock)
        self._queue: SimpleQueue[StoreLoad | Flight | None] = SimpleQueue()
        self._loads: list[StoreLoad] = []  # under way or queued, and some that are over
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"store-load-{i}", daemon=True) for i in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()
        self.flights.start()

    def start(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        most: int,
        outlook: Outlook | None = None,
    ) -> StoreLoad | None:
        """See `StoreTier.start_load`."""
        self._loads = [load for load in self._loads if not load.over]
        if self._stopped or self._store.is_down() or len(self._loads) >= _MOST_WAITING:
            return None
        queued_s = sum(load.left_s for load in self._loads) / _THREADS
        if not self._worth_loading(recompute_s, queued_s):
            self._store.count("gate_closed")
            return None
        now = self._clock()
        answer_s = queued_s + self._link.latency_s(now)
        block_s = self._block_bytes / self._link.bytes_per_s(now)
        load = StoreLoad(
            hashes, recompute_s, tenant, min(most, len(hashes)), answer_s, block_s, self._clock, outlook
        )
        self._loads.append(load)
        self._queue.put(load)
        return load

    def stop(self) -> None:
        """End all loads; the threads end as soon as the store lets go of them."""
        self._stopped = True
        self.flights.stop()
        for _ in self._threads:
            self._queue.put(None)

    def join(self) -> None:
        self.flights.join()
        for thread in self._threads:
            thread.join(_JOIN_S)
        while True:
            try:
                job = self._queue.get_nowait()
            except Empty:
                return
            if isinstance(job, StoreLoad):
                job.finish()

    def _worth_loading(self, recompute_s: Sequence[float], queued_s: float = 0.0) -> int:
        now = self._clock()
        return blocks_worth_loading(
            recompute_s,
            bandwidth_bytes_s=self._link.bytes_per_s(now),
            latency_s=self._link.latency_s(now) + queued_s,
            bytes_per_block=self._block_bytes,
        )

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if self._stopped:
                    pass
                elif isinstance(job, Flight):
                    self._bring(job)
                elif not job.over:
                    self._load(job)
            except Exception:  # a bug must cost a load, not all loads to come
                log.exception("a load from the store failed")
            finally:
                if isinstance(job, StoreLoad):
                    job.finish()
                else:
                    job.reading = False
                    self.flights.wake()

    def _load(self, load: StoreLoad) -> None:
        self._store.count("loads")
        asked_s = self._clock()
        found = self._store.lookup(load.hashes, load.tenant)
        if found is None:
            return
        answered_s = self._clock()
        self._link.observe_lookup(answered_s - asked_s, answered_s)
        self._known.add(found.hashes)
        self._known.discard(load.hashes[len(found.hashes) :])
        try:
            self._depart(load, len(found.hashes))
            if self._worth_loading(load.recompute_s[: len(found.hashes)]):
                load.answer(len(found.hashes))
                self._read(load, found)
        finally:
            load.finish()  # before the release, which the engine need not wait for
            self._store.release(found, load.saved_s)

    def _depart(self, load: StoreLoad, found: int) -> None:
        """What the store lacks is for one worker to compute."""
        if load.outlook is None or found == len(load.hashes):
            return
        before_s = load.recompute_s[found - 1] if found else 0.0
        flight = Flight(
            load.hashes[found:],
            [seconds - before_s for seconds in load.recompute_s[found:]],
            load.tenant,
            found,
            load.most,
            replace(load.outlook, before=[*load.outlook.before, *load.hashes[:found]]),
            self._store.count,
            self.flights.wake,
            self._clock,
        )
        if self.flights.ask(flight) and not load.depart(flight):
            flight.leave(computed=False)

    def _bring_soon(self, flight: Flight) -> None:
        self._queue.put(flight)

    def _bring(self, flight: Flight) -> None:
        """What the store has by now of a followed run, from the front."""
        start = flight.brought
        stop = min(flight.stored, start + flight.room)
        if stop <= start:
            return
        found = self._store.lookup(flight.run[start:stop], flight.tenant)
        if not found or not found.hashes:
            flight.over()  # the store is down, or has lost them
            return
        self._known.add(found.hashes)
        saved_s = 0.0
        try:
            count = len(found.hashes)
            for at in range(0, count, self._store.batch):
                blocks = self._batch(found, at, min(count, at + self._store.batch))
                saved_s += flight.left_s(len(blocks))
                flight.add(start + at, blocks)
                if len(blocks) < min(count - at, self._store.batch):
                    flight.over()
                    return
        finally:
            self._store.release(found, saved_s)

    def _read(self, load: StoreLoad, found: Found) -> None:
        """From the back: what comes is of use wherever computing has got to."""
        run = replace(found, hashes=found.hashes[::-1], names=found.names[::-1])
        count = min(load.most, len(run.hashes))
        start, size = 0, 0
        began_s = asked_s = self._clock()
        while start < count and not load.over and not self._stopped:
            block_s = self._block_bytes / self._link.bytes_per_s(asked_s)
            # A load begins with one block: what is believed of the link may be wrong.
            stop = min(count, start + max(1, min(self._store.batch, int(_BATCH_S / block_s), 2 * size)))
            size = stop - start
            load.expect(size * block_s)
            blocks = self._batch(run, start, stop)
            now = self._clock()
            if blocks:
                # The slower of the whole and the latest: nothing is gained by believing in a lucky burst.
                pace_s = (now - began_s) / (start + len(blocks)), (now - asked_s) / len(blocks)
                load.add(blocks, max(pace_s))
            if len(blocks) < size:
                return
            start, asked_s = stop, now

    def _batch(self, run: Found, start: int, stop: int) -> list[EncodedBlock]:
        """Read blocks `start` to `stop` of a run: those before the first that is not as it should be."""
        asked_s = self._clock()
        size = stop - start
        block_s = self._block_bytes / self._link.bytes_per_s(asked_s)
        frames = torch.empty((size, self._store.slot_bytes), dtype=torch.uint8, pin_memory=self._pinned)
        payloads = self._store.read(run, start, stop, tensor_bytes(frames))
        blocks = self._sound(payloads, frames)
        now = self._clock()
        if len(blocks) < len(payloads):
            self._store.quarantine(run, start + len(blocks), BadFrame.SCALES)
        if blocks:
            self._link.observe_read(sum(len(block.payload) for block in blocks), now - asked_s, now)
            self._store.count("loaded_blocks", len(blocks))
        elif now - asked_s > size * block_s:  # not for what it should be, for want of it
            self._link.observe_read(size * self._block_bytes, _FAILED * (now - asked_s), now)
        if len(blocks) < size:
            self._known.discard([run.hashes[start + len(blocks)]])
        return blocks

    def _sound(self, payloads: Sequence[Payload], frames: torch.Tensor) -> list[EncodedBlock]:
        """The leading payloads that decode to finite values: parts of the rows of `frames` that they were
        received in, no copies, so each keeps all of `frames`."""
        sound: list[EncodedBlock] = []
        for payload, frame in zip(payloads, frames, strict=False):
            codec = Codec(payload.codec)
            block = frame[HEADER_BYTES : HEADER_BYTES + self._shape.payload_bytes(codec)]
            if not are_finite(block[None], self._shape, codec)[0]:
                break
            sound.append(EncodedBlock(codec, block))
        return sound


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host."""
    view: memoryview = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data
    return view

"""Loads from the store: a queue, two threads, and the decision what is worth loading.

start -> queue -> [thread] lookup + lease -> gate -> read, verify and copy in batches -> release
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import torch

from kernels.kv_payload import Codec, KVShape, are_finite
from services.cache_store.client import BlockStore, Found
from services.cache_store.frames import HEADER_BYTES, BadFrame, Payload
from services.cache_store.known import KnownBlocks
from services.cache_store.link import LinkEstimate
from services.worker.gate import blocks_worth_loading
from services.worker.tiers import EncodedBlock, LoadResult

log = logging.getLogger(__name__)

#: Two, so that one slow load does not hold up the next; beyond that the interpreter lock is the limit.
_THREADS = 2
_MOST_WAITING = 64

#: A load may take so many times what was expected, and at least so long, before it is given up; never longer
#: than computing its blocks would take.
_PATIENCE = 8
_LEAST_PATIENCE_S = 1.0

_JOIN_S = 5.0


class StoreLoad:
    """A `Load`: a thread adds to it, the engine polls it, and whichever ends it first wins."""

    def __init__(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.hashes = hashes
        self.recompute_s = recompute_s
        self.tenant = tenant
        self._clock = clock
        self._started_s = clock()
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._blocks: list[EncodedBlock] = []
        self._seconds: float | None = None  # once it is over
        self.given_up = False

    def poll(self) -> LoadResult | None:
        with self._lock:
            if self._seconds is None and self._clock() - self._started_s > self._patience_s:
                self.given_up = True
                self._end()
            return None if self._seconds is None else LoadResult(self._blocks, self._seconds)

    def cancel(self) -> None:
        with self._lock:
            self._blocks = []
            self._end()

    @property
    def over(self) -> bool:
        return self._seconds is not None

    @property
    def saved_s(self) -> float:
        """Seconds of prefill that the blocks of a load stand for, once it is over; 0 if it was given up."""
        return self.recompute_s[len(self._blocks) - 1] if self._blocks and not self.given_up else 0.0

    def add(self, blocks: list[EncodedBlock]) -> None:
        with self._lock:
            if self._seconds is None:
                self._blocks += blocks

    def finish(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._seconds is None:
            self._seconds = self._clock() - self._started_s


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
        self._queue: SimpleQueue[StoreLoad | None] = SimpleQueue()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"store-load-{i}", daemon=True) for i in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, hashes: Sequence[bytes], recompute_s: Sequence[float], tenant: str) -> StoreLoad | None:
        """See `StoreTier.start_load`."""
        if self._stopped or self._store.is_down() or self._queue.qsize() >= _MOST_WAITING:
            return None
        count = self._worth_loading(recompute_s)
        if not count:
            self._store.count("gate_closed")
            return None
        now = self._clock()
        size = count * self._block_bytes
        expected_s = self._link.latency_s(now) + size / self._link.bytes_per_s(now)
        patience_s = min(max(_LEAST_PATIENCE_S, _PATIENCE * expected_s), recompute_s[count - 1])
        load = StoreLoad(hashes[:count], recompute_s[:count], tenant, patience_s, self._clock)
        self._queue.put(load)
        return load

    def stop(self) -> None:
        """End all loads; the threads end as soon as the store lets go of them."""
        self._stopped = True
        for _ in self._threads:
            self._queue.put(None)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(_JOIN_S)
        while True:
            try:
                load = self._queue.get_nowait()
            except Empty:
                return
            if load is not None:
                load.finish()

    def _worth_loading(self, recompute_s: Sequence[float]) -> int:
        now = self._clock()
        return blocks_worth_loading(
            recompute_s,
            bandwidth_bytes_s=self._link.bytes_per_s(now),
            latency_s=self._link.latency_s(now),
            bytes_per_block=self._block_bytes,
        )

    def _run(self) -> None:
        while (load := self._queue.get()) is not None:
            try:
                if not load.over and not self._stopped:
                    self._load(load)
            except Exception:  # a bug must cost a load, not all loads to come
                log.exception("a load from the store failed")
            finally:
                load.finish()
                if load.given_up:
                    self._store.count("given_up")

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
            self._read(load, found)
        finally:
            load.finish()  # before the release, which the engine need not wait for
            self._store.release(found, load.saved_s)

    def _read(self, load: StoreLoad, found: Found) -> None:
        count = self._worth_loading(load.recompute_s[: len(found.hashes)])
        for start in range(0, count, self._store.batch):
            if load.over or self._stopped:
                return
            stop = min(count, start + self._store.batch)
            asked_s = self._clock()
            frames = torch.empty(
                (stop - start, self._store.slot_bytes), dtype=torch.uint8, pin_memory=self._pinned
            )
            payloads = self._store.read(found, start, stop, tensor_bytes(frames))
            blocks = self._sound(payloads, frames)
            if len(blocks) < len(payloads):
                self._store.quarantine(found, start + len(blocks), BadFrame.SCALES)
            if blocks:
                now = self._clock()
                self._link.observe_read(sum(len(block.payload) for block in blocks), now - asked_s, now)
                self._store.count("loaded_blocks", len(blocks))
                load.add(blocks)
            if len(blocks) < stop - start:
                self._known.discard([found.hashes[start + len(blocks)]])
                return

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

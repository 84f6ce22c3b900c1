"""Blocks to and from the store, beside the steps: loads on admission, copies behind the writes.

Neither ever makes a step wait. Both run on the engine's thread; the tier's own threads do the slow part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import attrgetter

from services.worker.block_copies import BlockCopies, Departure
from services.worker.counters import Counters
from services.worker.pages import PagePool
from services.worker.rates import Rates
from services.worker.sequence import FilledBlock, Sequence
from services.worker.tiers import Load, LoadResult, OfferedBlock, StoreTier

#: Share of a step's time that copying pages out may take after it.
_COPY_SHARE = 0.1

#: Pages copied in a row while no step waits: short enough for a new request not to notice.
_IDLE_PAGES = 8

_COPY_WEIGHT = 0.2  # of the newest copy in the mean copy time


class StoreLoads:
    """The loads under way, by sequence: the scheduler's `BlockLoader`."""

    def __init__(self, store: StoreTier, rates: Rates, block_size: int) -> None:
        self._store = store
        self._rates = rates
        self._block_size = block_size
        self._active: dict[Sequence, Load] = {}

    def __bool__(self) -> bool:
        return bool(self._active)

    def start(self, sequence: Sequence, first_block: int) -> bool:
        hashes = sequence.hashes[first_block:]
        recompute_s = [self._rates.prefill_s((i + 1) * self._block_size) for i in range(len(hashes))]
        load = self._store.start_load(hashes, recompute_s, sequence.request.tenant, sequence.hashes[0])
        if load is None:
            return False
        self._active[sequence] = load
        return True

    def cancel(self, sequence: Sequence) -> None:
        self._active.pop(sequence).cancel()

    def cancel_all(self) -> None:
        for load in self._active.values():
            load.cancel()
        self._active.clear()

    def take_finished(self) -> list[tuple[Sequence, LoadResult]]:
        results = [(sequence, load.poll()) for sequence, load in self._active.items()]
        finished = [(sequence, result) for sequence, result in results if result is not None]
        for sequence, _ in finished:
            del self._active[sequence]
        return finished


class WriteBehind:
    """Full blocks on their way to the store, oldest first.

    A queued block keeps no page: if its page goes to another block before the copy's turn, the store does
    not get it. So offering never holds memory back, and never copies what is not the block.
    """

    def __init__(
        self,
        store: StoreTier,
        copies: BlockCopies,
        pool: PagePool,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._copies = copies
        self._pool = pool
        self._counters = counters
        self._clock = clock
        self._queue: dict[bytes, FilledBlock] = {}
        self._departed: tuple[list[FilledBlock], Departure, float] | None = None  # since when
        self._copy_s = 0.0  # mean seconds a page

    def __bool__(self) -> bool:
        return bool(self._queue) or self._departed is not None

    def add(self, filled: Iterable[FilledBlock]) -> None:
        """Queue blocks, parents before their children."""
        self._queue.update((block.hash, block) for block in filled)
        while len(self._queue) > self._pool.pages:  # more than there are pages cannot all be there still
            self._next()
            self._counters.unoffered_blocks += 1

    def add_missing(self, sequence: Sequence, blocks: int) -> None:
        """Queue those of the first `blocks` blocks of a sequence that are here and not in the store, which
        may have lost or never had them: it takes no block without its parent."""
        hashes = sequence.hashes[:blocks]
        if not hashes:
            return
        for index, wanted in enumerate(self._store.wants(hashes, hashes[0])):
            page = self._pool.lookup(hashes[index])
            if wanted and page is not None:
                self.add([sequence.block(index, page)])

    def retain(self, sequence: Sequence) -> None:
        """A prompt is computed: pass on what it says of its blocks, for those that it hit are not offered."""
        if not sequence.gpu_tokens and not sequence.store_tokens:
            return
        blocks = [index for index in sequence.wishes if index < len(sequence.hashes)]
        for wish, indices in groupby(sorted(blocks), key=sequence.retention):
            hashes = [sequence.hashes[index] for index in indices]
            self._store.retain(hashes, *wish, sequence.request.tenant, sequence.hashes[0])

    def copy(self, step_s: float) -> None:
        """Copy for a share of the `step_s` seconds that the step just done took; a little more freely when
        there was none (0)."""
        if not self._hand_over():
            return  # one departure at a time
        if not step_s:
            most = _IDLE_PAGES
        elif self._copy_s:
            most = max(1, int(_COPY_SHARE * step_s / self._copy_s))
        else:
            most = 1
        present: list[FilledBlock] = []
        while self._queue and len(present) < most:
            block = self._next()
            if self._pool.lookup(block.hash) == block.page:
                present.append(block)
            else:
                self._counters.unoffered_blocks += 1
        blocks: list[FilledBlock] = []
        for first, run in groupby(present, attrgetter("first")):
            of_prefix = list(run)
            wishes = self._store.wants([block.hash for block in of_prefix], first)
            blocks += [block for block, wish in zip(of_prefix, wishes, strict=True) if wish]
        if blocks:
            started_s = self._clock()
            self._departed = blocks, self._copies.read([block.page for block in blocks]), started_s
            self._hand_over()

    def _hand_over(self) -> bool:
        """Offer what has departed to the store. False while it is on its way."""
        if self._departed is None:
            return True
        blocks, departure, started_s = self._departed
        if not departure.arrived():
            return False
        self._departed = None
        seconds = departure.device_s()
        copy_s = (self._clock() - started_s if seconds is None else seconds) / len(blocks)
        self._copy_s = copy_s if not self._copy_s else self._copy_s + _COPY_WEIGHT * (copy_s - self._copy_s)
        offers = [
            OfferedBlock(
                hash=block.hash,
                parent=block.parent,
                first=block.first,
                depth=block.depth,
                kv=encoded,
                priority=block.priority,
                ttl_s=block.ttl_s,
                tenant=block.tenant,
            )
            for block, encoded in zip(blocks, departure.blocks(), strict=True)
            if encoded is not None
        ]
        taken = self._store.offer(offers)
        self._counters.offered_blocks += taken
        self._counters.unoffered_blocks += len(blocks) - taken
        return True

    def _next(self) -> FilledBlock:
        """Take the oldest out of the queue."""
        return self._queue.pop(next(iter(self._queue)))

"""Blocks to and from the store, beside the steps: loads ahead of the prefill, copies behind the writes.

Neither makes a step wait; a sequence may, for what another worker computes (flight.py). Both run on the
engine's thread; the tier's own threads do the slow part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from services.worker.block_copies import BlockCopies, Departure
from services.worker.counters import Counters
from services.worker.gate import meeting_point
from services.worker.host_tier import HostTier
from services.worker.pages import PagePool
from services.worker.plan import StepPlan
from services.worker.rates import Rates
from services.worker.sequence import FilledBlock, Sequence
from services.worker.tiers import EncodedBlock, Flight, Load, OfferedBlock, Outlook, StoreTier

log = logging.getLogger(__name__)

#: Blocks on the host for sequences that compute nothing yet have so much memory together.
_HOST_BYTES = 1 << 30

#: How often a turn without a step looks at loads under way, and at blocks that another worker computes: those
#: come a step's at a time.
_LOAD_POLL_S = 0.0005
_FLIGHT_POLL_S = 0.002

#: A request lets so much time pass in all without computing, when a load is expected to be done in that.
_MOST_STALLED_S = 0.005

#: Share of a step's time that copying pages out may take after it.
_COPY_SHARE = 0.1

#: Pages copied in a row while no step waits: short enough for a new request not to notice.
_IDLE_PAGES = 8

_COPY_WEIGHT = 0.2  # of the newest copy in the mean copy time


@dataclass(slots=True)
class _Active:
    """A load of blocks `first` to `end` of a sequence, of which `tail` are in its pages."""

    load: Load
    first: int
    end: int  # no more than that; where the tail begins if there is one, else the load tells
    most: int  # blocks that the load may bring
    taken: int = 0  # of these
    tail: range = range(0)
    stalled_since: float | None = None

    @property
    def on_host(self) -> int:
        """Blocks at most that the load holds or will hold."""
        if self.load.found is None:
            return 0 if self.load.over else self.most
        return min(self.most, self.load.found) - self.taken


@dataclass(frozen=True, slots=True)
class _Missing:
    """What the store lacked of a sequence's blocks, from block `first` on."""

    flight: Flight
    first: int


class StoreLoads:
    """The loads and flights of sequences, under way or waiting for their pages: the scheduler's
    `BlockLoader`. A step computes `max_step_tokens` at most."""

    def __init__(
        self,
        store: StoreTier,
        copies: BlockCopies,
        rates: Rates,
        block_size: int,
        max_step_tokens: int,
        host: HostTier | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._copies = copies
        self._rates = rates
        self._block_size = block_size
        self._max_step_tokens = max_step_tokens
        self._host_blocks = _HOST_BYTES // copies.shape.payload_bytes(copies.codec)
        self._active: dict[Sequence, _Active] = {}
        self._missing: dict[Sequence, _Missing] = {}

    def __bool__(self) -> bool:
        return bool(self._active or self._missing)

    @property
    def look_again_s(self) -> float:
        """How soon something may have come when there is nothing to compute."""
        if self._active:
            return _LOAD_POLL_S
        return (
            _FLIGHT_POLL_S
            if any(missing.flight.waits(-1) for missing in self._missing.values())
            else math.inf
        )

    def held(self, sequence: Sequence, first_block: int) -> int:
        return self._host.held(sequence.hashes[first_block:]) if self._host is not None else 0

    def restore(self, sequence: Sequence, first_block: int) -> int:
        if self._host is None:
            return 0
        return self._host.load(sequence.hashes[first_block:], sequence.pages[first_block:])

    def start(self, sequence: Sequence, first_block: int, ahead_tokens: int) -> bool:
        outlook = Outlook(
            before=sequence.hashes[:first_block],
            ahead_s=self._rates.step_s(ahead_tokens, 0),
            step_s=self._rates.prefill_s(self._max_step_tokens),
        )
        active = self._start(sequence, first_block, len(sequence.hashes), outlook)
        if active is not None:
            self._active[sequence] = active
        return active is not None

    def fill(self, sequence: Sequence, front: int) -> range | None:
        active = self._active[sequence]
        load = active.load
        over = load.over  # asked first: what comes later is taken the next time
        blocks = load.take()
        if load.found is not None:
            self._place(active, sequence, blocks, load.found, front)
        if over or load.found is not None:
            self._note_missing(sequence, active)
        tail = active.tail
        if not over or (tail and tail.start <= front):
            return None if load.found is not None and front >= max(tail.stop, active.end) else tail
        if not tail:
            return None
        if active.taken == active.most and (rest := self._start(sequence, front, tail.start)):
            rest.tail = tail  # there is more in the store than the host had room for
            self._active[sequence] = rest
            return tail
        # To end a chunk before it costs another step.
        return tail if len(tail) * self._block_size > self._rates.step_tokens else None

    def most_tokens(self, sequence: Sequence, wanted: int, plan: StepPlan, now: float, busy_s: float) -> int:
        active = self._active[sequence]
        if active.stalled_since is not None:
            sequence.stalled_s += now - active.stalled_since
            active.stalled_since = None
        load = active.load
        if load.over:
            return wanted
        front = -(-sequence.computed // self._block_size)
        left = max(0, (active.tail.start if active.tail else active.end) - front)  # blocks nobody has yet
        rest_s = load.expected_s(0 if load.found is None else left)
        ahead_s = busy_s + self._rates.step_s(plan.prefill_tokens, 0)
        beside_s = self._rates.step_s(0, len(plan.decodes))
        if rest_s < ahead_s:
            return 0  # the device is busy for so long anyway
        if sequence.stalled_s + max(rest_s, beside_s) <= _MOST_STALLED_S:
            active.stalled_since = now
            return 0
        if not self._rates.prefill_tokens_per_s:
            return wanted

        def compute_s(blocks: int) -> float:
            return ahead_s + beside_s + self._rates.prefill_s(blocks * self._block_size)

        blocks = meeting_point(left, compute_s, load.expected_s)
        # Another step costs something, so it must be for something.
        blocks = max(blocks, math.ceil(self._rates.step_tokens / self._block_size), 1)
        tokens = (front + blocks) * self._block_size - sequence.computed
        return wanted if wanted - tokens <= self._rates.step_tokens else tokens

    def follows(self, sequence: Sequence, front: int) -> int | None:
        missing = self._missing.get(sequence)
        if missing is None or not missing.flight.waits(front - missing.first):
            return None
        return max(front, missing.first)

    def receive(self, sequence: Sequence, front: int) -> int:
        missing = self._missing[sequence]
        blocks = missing.flight.take(front - missing.first)
        try:
            self._copies.write(sequence.pages[front : front + len(blocks)], blocks)
        except ValueError:
            log.exception("blocks of the store do not fit the KV cache")
            self._missing.pop(sequence).flight.leave(computed=False)
            return 0
        return len(blocks)

    def cancel(self, sequence: Sequence) -> None:
        active = self._active.pop(sequence)
        active.load.cancel()
        self._note_missing(sequence, active)

    def leave(self, sequence: Sequence) -> None:
        if (missing := self._missing.pop(sequence, None)) is not None:
            missing.flight.leave(len(sequence.tokens) > sequence.prompt_length)

    def cancel_all(self) -> None:
        for sequence in list(self._active):
            self.cancel(sequence)
        for missing in self._missing.values():
            missing.flight.leave(computed=False)
        self._missing.clear()

    def _note_missing(self, sequence: Sequence, active: _Active) -> None:
        if active.load.flight is not None and sequence not in self._missing:
            flight = active.load.flight
            self._missing[sequence] = _Missing(flight, active.first + flight.first)

    def _start(
        self, sequence: Sequence, first: int, end: int, outlook: Outlook | None = None
    ) -> _Active | None:
        hashes = sequence.hashes[first:end]
        most = min(len(hashes), self._host_blocks - self._on_host())
        if most <= 0:
            return None
        recompute_s = [self._rates.prefill_s((i + 1) * self._block_size) for i in range(len(hashes))]
        tenant = sequence.request.tenant
        load = self._store.start_load(hashes, recompute_s, tenant, sequence.hashes[0], most, outlook)
        return None if load is None else _Active(load, first, end, most)

    def _on_host(self) -> int:
        """Blocks at most that all loads and flights hold or will hold."""
        loads = sum(active.on_host for active in self._active.values())
        return loads + sum(missing.flight.held for missing in self._missing.values())

    def _place(
        self, active: _Active, sequence: Sequence, blocks: list[EncodedBlock], found: int, front: int
    ) -> None:
        """Write `blocks` into the pages before the tail, as far down as `front`."""
        active.taken += len(blocks)
        if not active.tail:
            active.end = active.first + found
            active.tail = range(active.end, active.end)
        elif active.first + found < active.end:  # the store has lost what joins the tail
            active.load.cancel()
            return
        start = active.tail.start
        blocks = blocks[: max(0, start - front)]
        try:
            self._copies.write([sequence.pages[start - 1 - i] for i in range(len(blocks))], blocks)
        except ValueError:
            log.exception("blocks of the store do not fit the KV cache")
            active.load.cancel()
            return
        active.tail = range(start - len(blocks), active.tail.stop)


class WriteBehind:
    """Full blocks on their way to the store, those of each server oldest first.

    A queued block keeps no page: if its page goes to another block before the copy's turn, the store does
    not get it. So offering never holds memory back, and never copies what is not the block; and blocks can
    wait here for a server that takes them more slowly than they are computed.
    """

    def __init__(
        self,
        store: StoreTier,
        copies: BlockCopies,
        pool: PagePool,
        counters: Counters,
        clock: Callable[[], float],
        host: HostTier | None = None,
    ) -> None:
        self._store = store
        self._host = host
        self._copies = copies
        self._pool = pool
        self._counters = counters
        self._clock = clock
        self._queues: dict[int, dict[bytes, FilledBlock]] = {}  # by server
        self._awaited: Set[bytes] = frozenset()
        self._departed: tuple[list[FilledBlock], Departure, float] | None = None  # since when
        self._copy_s = 0.0  # mean seconds a page

    def __bool__(self) -> bool:
        return any(self._queues.values()) or self._departed is not None

    def add(self, filled: Iterable[FilledBlock]) -> None:
        """Queue blocks, parents before their children."""
        for block in filled:
            self._queues.setdefault(self._store.server(block.first), {})[block.hash] = block
        while sum(map(len, self._queues.values())) > self._pool.pages:  # they cannot all be there still
            _next(max(self._queues.values(), key=len))
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
        """A prompt is computed: pass on which blocks it hit and what it says of them, for those are not
        offered."""
        hit_tokens = sequence.gpu_tokens + sequence.host_tokens
        if self._host is not None:
            self._host.use(sequence.hashes[: hit_tokens // self._copies.shape.tokens])
        if not hit_tokens and not sequence.store_tokens:
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
        self._hurry()
        if not step_s:
            most = _IDLE_PAGES
        elif self._copy_s:
            most = max(1, int(_COPY_SHARE * step_s / self._copy_s))
        else:
            most = 1
        present: list[FilledBlock] = []
        for server in list(self._queues):
            queue = self._queues.pop(server)
            self._queues[server] = queue  # the others go first the next time
            room = self._store.room(server)
            while queue and room > 0 and (len(present) < most or next(iter(queue)) in self._awaited):
                block = _next(queue)
                if self._pool.lookup(block.hash) == block.page:
                    present.append(block)
                    room -= 1
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

    def _hurry(self) -> None:
        """What another worker waits for goes first, all at once; host memory gives what it has of it."""
        awaited = self._store.awaited
        if awaited is self._awaited or not (awaited or self._awaited):
            return
        self._awaited = awaited
        for server, queue in self._queues.items():
            self._queues[server] = {hash: queue[hash] for hash in queue if hash in awaited} | queue
        if self._host is not None:
            self._host.give(awaited)

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


def _next(queue: dict[bytes, FilledBlock]) -> FilledBlock:
    """Take the oldest out of a queue."""
    return queue.pop(next(iter(queue)))

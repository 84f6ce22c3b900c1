"""The prefix index: which worker holds which block, in which tier.

Fed by the workers' snapshots and events, and by guesses: a prompt sent to a worker will soon be there, so
its blocks count as held until the worker's own events confirm them or the guess expires. Workers are
numbered by the caller with small integers, so that "who holds this block" is one bit mask and matching a
prompt against all workers at once is one walk along its blocks.

The store tier is shared: a block is in it or not, whichever worker said so.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.wire.hashes import split_hashes
from services.wire.messages import Events, Snapshot, Tier

#: Bits of a block's entry in one worker's account.
_GPU, _HOST, _GUESS = 1, 2, 4
_BIT: dict[Tier, int] = {"gpu": _GPU, "host": _HOST}

#: The store's part of the index at most; the oldest entries go first. 100 bytes each.
MAX_STORE_BLOCKS = 4_000_000


@dataclass(frozen=True, slots=True)
class Hit:
    """Leading blocks of a prompt that a worker has (`local`: GPU or host memory), and those that follow
    them in the store."""

    local: int
    store: int


class PrefixIndex:
    """Pure: time comes in as an argument, in seconds of any clock that does not go back."""

    def __init__(self, max_store_blocks: int = MAX_STORE_BLOCKS) -> None:
        self._holders: dict[bytes, int] = {}  # block -> mask of workers that hold it or are guessed to
        self._accounts: dict[int, _Account] = {}
        self._store: dict[bytes, None] = {}  # ordered by arrival
        self._max_store_blocks = max_store_blocks
        self._ticket = itertools.count()  # orders guesses that expire at the same time

    # ---- workers ---------------------------------------------------------------------------------

    def join(self, worker: int, max_blocks: int) -> None:
        """A worker connected, perhaps with a new epoch: nothing is known of its blocks.

        `max_blocks` bounds its account, whatever it reports; the oldest entries go first. Too small a bound
        costs far more than too large a one: take several times the worker's pages.
        """
        self.leave(worker)
        self._accounts[worker] = _Account(max_blocks)

    def leave(self, worker: int) -> None:
        """The worker is gone: forget its blocks, not the store's."""
        account = self._accounts.pop(worker, None)
        if account is not None:
            self._release(worker, account.blocks)

    def apply_snapshot(self, worker: int, snapshot: Snapshot) -> None:
        """Replace all that was known of the worker. Guesses stay: they may be ahead of the snapshot."""
        account = self._accounts[worker]
        for block, bits in list(account.blocks.items()):
            self._set(worker, account, block, bits & _GUESS)
        self._apply(worker, snapshot.held, {})

    def apply_events(self, worker: int, events: Events) -> None:
        """Apply a change that follows what is known (the channel sees to that)."""
        self._apply(worker, events.stored, events.removed)

    # ---- requests --------------------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes], workers: Iterable[int]) -> dict[int, Hit]:
        """For each of `workers`: how much of the prompt it need not compute."""
        local = dict.fromkeys(workers, 0)
        alive = sum(1 << worker for worker in local)
        for depth, block in enumerate(hashes):
            holders = self._holders.get(block, 0)
            fallen = alive & ~holders
            if fallen:
                for worker in local:
                    if fallen >> worker & 1:
                        local[worker] = depth
                alive &= holders
            if not alive:
                break
        for worker in local:
            if alive >> worker & 1:
                local[worker] = len(hashes)
        runs: dict[int, int] = {}
        for depth in set(local.values()):
            end = depth
            while end < len(hashes) and hashes[end] in self._store:
                end += 1
            runs[depth] = end - depth
        return {worker: Hit(depth, runs[depth]) for worker, depth in local.items()}

    def guess(self, worker: int, hashes: Sequence[bytes], until_s: float) -> None:
        """The worker is about to hold these blocks: count them as held until `until_s`, longer if events
        confirm them by then."""
        account = self._accounts.get(worker)
        if account is None:
            return
        for block in hashes:
            self._set(worker, account, block, account.blocks.get(block, 0) | _GUESS)
            account.guessed_until[block] = until_s
        heapq.heappush(account.guesses, (until_s, next(self._ticket), hashes))

    def not_in_store(self, hashes: Iterable[bytes]) -> None:
        """A worker looked for these blocks in the store and they were not there."""
        for block in hashes:
            self._store.pop(block, None)

    def expire(self, now_s: float) -> None:
        """Drop guesses that were not confirmed in time. Call it a few times a second."""
        for worker, account in self._accounts.items():
            while account.guesses and account.guesses[0][0] <= now_s:
                for block in heapq.heappop(account.guesses)[2]:
                    if account.guessed_until.get(block, now_s + 1) <= now_s:
                        self._set(worker, account, block, account.blocks.get(block, 0) & ~_GUESS)

    # ---- figures ---------------------------------------------------------------------------------

    @property
    def store_blocks(self) -> int:
        """Blocks known to be in the store."""
        return len(self._store)

    @property
    def local_blocks(self) -> int:
        """Distinct blocks that some worker holds or is guessed to."""
        return len(self._holders)

    # ---- accounts --------------------------------------------------------------------------------

    def _apply(self, worker: int, stored: dict[Tier, bytes], removed: dict[Tier, bytes]) -> None:
        account = self._accounts[worker]
        for tier, packed in removed.items():
            if tier == "store":
                self.not_in_store(split_hashes(packed))
                continue
            for block in split_hashes(packed):
                self._set(worker, account, block, account.blocks.get(block, 0) & ~_BIT[tier])
        for tier, packed in stored.items():
            if tier == "store":
                self._add_to_store(split_hashes(packed))
                continue
            for block in split_hashes(packed):
                self._set(worker, account, block, account.blocks.get(block, 0) & ~_GUESS | _BIT[tier])

    def _add_to_store(self, hashes: Iterable[bytes]) -> None:
        for block in hashes:
            self._store.pop(block, None)
            self._store[block] = None
        while len(self._store) > self._max_store_blocks:
            del self._store[next(iter(self._store))]

    def _set(self, worker: int, account: _Account, block: bytes, bits: int) -> None:
        """Change one entry of an account and of the mask that goes with it."""
        if not bits & _GUESS:
            account.guessed_until.pop(block, None)
        if bits:
            if block not in account.blocks:
                self._holders[block] = self._holders.get(block, 0) | 1 << worker
            account.blocks[block] = bits
            if len(account.blocks) > account.max_blocks:
                oldest = next(iter(account.blocks))
                self._set(worker, account, oldest, 0)
        elif account.blocks.pop(block, 0):
            self._release(worker, (block,))

    def _release(self, worker: int, blocks: Iterable[bytes]) -> None:
        for block in blocks:
            others = self._holders[block] & ~(1 << worker)
            if others:
                self._holders[block] = others
            else:
                del self._holders[block]


class _Account:
    """What one worker holds."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.blocks: dict[bytes, int] = {}  # block -> _GPU | _HOST | _GUESS, ordered by arrival
        self.guessed_until: dict[bytes, float] = {}
        self.guesses: list[tuple[float, int, Sequence[bytes]]] = []  # heap of (until, ticket, blocks)

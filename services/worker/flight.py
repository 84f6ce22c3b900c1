"""Single flight: a run of blocks that the store lacks is computed by one worker, and the others follow.

A flight is one sequence's part in it:

    OURS    this worker has claimed the run (services.cache_store.claims): it computes as always, and others
            may wait for what it stores. The claim is let go when all is stored, or at once when it won't be.
    THEIRS  another worker has. The sequence computes nothing of the run; its blocks come from the first one
            on, as the other stores them, and the sequence takes them in its turn.
    OVER    the sequence computes what is left, and nobody waits for it.

A claim goes to who expects to be done first: who lost it so, as is noticed when it is renewed, follows like
others, from where it is.

How late that can make a request, R being the predicted seconds of computing all that it waits for: it waits
only for what is expected to be here R/4 after it would have computed it itself, or sooner. If that promise
is not kept it goes on alone as soon as it would be R/4 later by that than promised, so what has come
counts. The worst is one that dies in the last moment of a promise and has brought nothing: 3/2 R. Mostly it
is much less: a worker that dies loses its claims within a second, and a store that says nothing is not
waited for longer. When that happens the request may follow one more, so that of many who followed a dead
worker one computes and not all; who breaks a second promise is the last. Time before the sequence's turn is
nobody's loss.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from enum import Enum

from services.cache_store.claims import LIFE_S, Followed, Times
from services.worker.tiers import EncodedBlock, Outlook

#: How much later than computing alone a request may be expected to be for following, as a share of computing
#: alone; the device is spared all of it.
SHARE = 0.25

#: A store that says nothing for so long is not waited for: many looks at it, as long as a dead worker is, and
#: longer than a busy machine keeps a thread from running.
_SILENCE_S = LIFE_S


class State(Enum):
    ASKING = "asking"
    OURS = "ours"
    THEIRS = "theirs"
    OVER = "over"


class Flight:
    """The missing blocks `run` of one sequence; `recompute_s[i]` are the predicted seconds to compute the
    first i+1 of them. Blocks are numbered within the run. Any method may be called from any thread.

    `first`: number of blocks of the load that the run follows. `most`: blocks on the host at a time. `count`
    takes (what, by): `follows`, `followed_blocks`, `follows_recomputed` (ended without all that was awaited);
    `wake` is called when somebody should look at it.
    """

    def __init__(
        self,
        run: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        first: int,
        most: int,
        outlook: Outlook,
        count: Callable[[str, int], None],
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.run = run
        self.tenant = tenant
        self.first = first
        self.most = most
        self.before = outlook.before
        self.state = State.ASKING
        self.followed: Followed | None = None  # while THEIRS
        self.key: bytes | None = None  # of the claim that is ours, until it was released
        self.awaited = False  # somebody follows it
        self.stored = 0  # leading blocks that are known to be in the store
        self.reading = False  # somebody reads what is stored and not here
        self._recompute_s = recompute_s
        self._begins_s = clock() + outlook.ahead_s
        self._step_s = outlook.step_s
        self._count = count
        self._wake = wake
        self._clock = clock
        self._lock = threading.Lock()
        self._front = 0  # blocks that the sequence has taken, or computed
        self._blocks: list[EncodedBlock] = []  # from there on
        self._target = 0  # blocks that the other computes
        self._promised_s = 0.0  # when they should be stored,
        self._promised_at = 0  # with so many here at the time of the promise
        self._heard_s = 0.0
        self._turn_s: float | None = None  # when the sequence would have begun to compute,
        self._turn_at = 0  # with so many taken
        self._excused_s = 0.0  # late through one that broke its promise
        self._broken = 0  # promises
        self._left = False

    # ---- for the engine

    def waits(self, front: int) -> bool:
        """Whether the sequence, whose turn it is and which has the blocks before `front`, is not to compute
        but to `take`. A negative front: its turn at the run has not come yet."""
        with self._lock:
            if front < 0:
                return bool(self._blocks) or self.state is State.THEIRS
            self._advance(front)
            if self._blocks:
                return True
            if self.state is State.THEIRS:
                now = self._clock()
                if self._turn_s is None:
                    self._turn_s, self._turn_at = now, front
                if now - self._heard_s <= _SILENCE_S and self._late_s(now) <= self._patience_s():
                    return True
                self._end()
            return False

    def take(self, front: int) -> list[EncodedBlock]:
        """What is here of the blocks from `front` on, in order."""
        with self._lock:
            self._advance(front)
            blocks, self._blocks = self._blocks, []
            self._front += len(blocks)
            return blocks

    def leave(self, computed: bool) -> None:
        """The sequence ends, or gives its pages back. `computed`: it has computed its prompt, which is on its
        way to the store."""
        with self._lock:
            self._left = True
            self._blocks = []
            if self.state is not State.OURS or not computed:
                self.state = State.OVER
        self._wake()

    @property
    def held(self) -> int:
        """Blocks of host memory that it may take."""
        return self.most if self.state is State.THEIRS else len(self._blocks)

    # ---- for those who ask and read the store

    @property
    def brought(self) -> int:
        """Leading blocks that are here, or have been."""
        return self._front + len(self._blocks)

    @property
    def room(self) -> int:
        """Blocks that may be brought now."""
        return self.most - len(self._blocks)

    @property
    def target(self) -> int:
        """Leading blocks that are waited for."""
        return self._target

    @property
    def has_waited_enough(self) -> bool:
        """It is not to ask again when the other that it follows now computes no more."""
        return self._broken > 0 and self._is_broken()

    def left_s(self, blocks: int | None = None) -> float:
        """Predicted seconds to compute the next `blocks`, by default all, that are not here."""
        end = len(self.run) if blocks is None else self.brought + blocks
        return self._seconds(self.brought, end)

    def least(self, seconds: float) -> int:
        """How many blocks that are not here take so long to compute."""
        at = bisect_left(self._recompute_s, self._seconds(0, self.brought) + seconds)
        return at + 1 - self.brought

    def times(self, transfer_s: float, lag_s: float) -> Times:
        """What to tell of the blocks that are not here: all of them take `transfer_s` to the store, and as
        long back, beside the steps that compute them; `lag_s` passes before anybody notices."""
        with self._lock:
            now = self._clock()
            begins_s = max(0.0, self._begins_s - now) if self._turn_s is None else 0.0
            compute_s = self.left_s()
            steps = max(1.0, compute_s / self._step_s) if self._step_s else 1.0
            last_s = min(compute_s, transfer_s) / steps
            late_s = 0.0 if self._is_broken() else max(0.0, self._late_s(now) - self._excused_s)
            spare_s = SHARE * self._seconds(self._turn_at, len(self.run)) - late_s
            return Times(
                begins_s,
                waits_s=max(0.0, begins_s + compute_s + spare_s - last_s - lag_s),
                due_s=begins_s + max(compute_s, transfer_s) + last_s,
            )

    def ours(self, key: bytes) -> bool:
        """The claim is made. False if it is of no use any more: let it go."""
        with self._lock:
            if self._left:
                return False
            self._end_follow()
            self.state, self.key, self.stored = State.OURS, key, self.brought
            return True

    def theirs(self, followed: Followed, start: int) -> bool:
        """Another worker computes the blocks from `start` on. False if that is of no use any more."""
        with self._lock:
            if self._left or self.state is State.OVER:
                self.state = State.OVER
                return False
            if self._is_broken():
                self._broken += 1
                self._excused_s = max(0.0, self._late_s(self._clock()))
            if self.state is not State.THEIRS:
                self._count("follows", 1)
            self.state, self.followed = State.THEIRS, followed
            self.stored = self.brought
            self._target = start + followed.blocks
            self._heard_s = self._clock()
            self._promised_s, self._promised_at = self._heard_s + followed.expected_s, start
            return True

    def lost(self) -> bool:
        """The claim is another's. Whether to ask who that is."""
        with self._lock:
            self.key = None
            if self._left:
                self.state = State.OVER
            return self.state is not State.OVER

    def over(self) -> None:
        with self._lock:
            self._end()

    def heard(self, stored: int) -> None:
        """So many leading blocks are in the store; while THEIRS."""
        with self._lock:
            self.stored = max(stored, self.brought)
            self._heard_s = self._clock()

    def add(self, start: int, blocks: list[EncodedBlock]) -> None:
        """Blocks from number `start` on were read; none between them and `brought` is missing."""
        with self._lock:
            new = blocks[max(0, self.brought - start) :]
            self._count("followed_blocks", len(new))
            if not self._left:
                self._blocks += new

    # ---- inside, under the lock

    def _advance(self, front: int) -> None:
        front = min(front, len(self.run))  # the prompt's last tokens make no block
        del self._blocks[: max(0, front - self._front)]
        self._front = max(self._front, front)

    def _seconds(self, start: int, end: int) -> float:
        first_s = self._recompute_s[start - 1] if start else 0.0
        return (self._recompute_s[end - 1] if end else 0.0) - first_s

    def _late_s(self, now: float) -> float:
        """How much later than alone the sequence would be if it went on alone now."""
        if self._turn_s is None:
            return 0.0
        return now - self._turn_s - self._seconds(self._turn_at, max(self._turn_at, self.brought))

    def _patience_s(self) -> float:
        """How late it may be before it goes on alone: as late as it would be when all comes as promised, and
        a bit."""
        assert self._turn_s is not None
        promised_s = self._promised_s - self._turn_s
        promised_s -= self._seconds(self._turn_at, max(self._turn_at, self._promised_at))
        return max(0.0, promised_s) + SHARE * self._seconds(self._turn_at, max(self._turn_at, self._target))

    def _end(self) -> None:
        self._end_follow()
        self.state = State.OVER

    def _is_broken(self) -> bool:
        """Whether, if the other computes no more, that is less than it promised."""
        return self.state is State.THEIRS and self.brought < self._target

    def _end_follow(self) -> None:
        if self._is_broken() and not self._left:
            self._count("follows_recomputed", 1)

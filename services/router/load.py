"""One worker's load: what it reported last, and what this router has sent it since.

The ledger of requests in flight is the truth about this router's own share: an entry is made when a request
is sent and removed exactly once, however the request ends.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from services.router.rates import WEIGHT, Rates
from services.wire.messages import Hello, Stats

#: A report arrives this long after the worker counted, at most: requests sent in between are not in it.
REPORT_DELAY_S = 0.02

#: Before anything finished: tokens of a typical answer, and seconds from submit to finish.
TYPICAL_OUTPUT_TOKENS = 256.0
TYPICAL_RESIDENCE_S = 10.0

#: Requests that may wait inside a worker, as a part of what runs: enough that a finished sequence is
#: replaced in the next step, few enough that the router still decides.
QUEUE_PART = 1 / 8


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of a worker."""

    uncached_tokens: int  # to be computed
    store_tokens: int  # to be fetched
    blocks: int  # pages it needs beyond those it shares
    sequences: int  # its `n`


@dataclass(frozen=True, slots=True)
class _Entry:
    work: Work
    sent_s: float


class WorkerLoad:
    """Pure: time comes in as an argument, in seconds."""

    def __init__(self, hello: Hello, rates: Rates) -> None:
        self.rates = rates
        self.block_size = hello.block_size
        self.capacity_blocks = hello.gpu_blocks
        self.max_sequences = hello.max_running + max(1, int(hello.max_running * QUEUE_PART))
        self.sequences = 0  # this router's, in flight
        self.output_tokens = TYPICAL_OUTPUT_TOKENS
        self.residence_s = TYPICAL_RESIDENCE_S
        self._ledger: dict[Hashable, _Entry] = {}
        self._unreported: dict[Hashable, Work] = {}  # not started, and sent after the last report
        self._report = Stats(0, 0, 0, hello.gpu_blocks, 0.0, 0.0, 0.0)

    # ---- events ----------------------------------------------------------------------------------

    def sent(self, key: Hashable, work: Work, now_s: float) -> None:
        """The request was submitted to this worker."""
        self._ledger[key] = _Entry(work, now_s)
        self._unreported[key] = work
        self.sequences += work.sequences

    def started(self, key: Hashable) -> None:
        """The request's first token came: its prefill is done."""
        self._unreported.pop(key, None)

    def ended(self, key: Hashable, now_s: float, output_tokens: int | None = None) -> None:
        """The request left the worker; `output_tokens` where it was served to the end. Idempotent."""
        entry = self._ledger.pop(key, None)
        if entry is None:
            return
        self._unreported.pop(key, None)
        self.sequences -= entry.work.sequences
        if output_tokens is not None:
            self.output_tokens += WEIGHT * (output_tokens - self.output_tokens)
            self.residence_s += WEIGHT * (now_s - entry.sent_s - self.residence_s)

    def reported(self, stats: Stats, now_s: float) -> None:
        """The worker's own account arrived; it covers what was sent before."""
        self._report = stats
        self.rates.learn_stats(stats)
        for key in list(self._unreported):
            if self._ledger[key].sent_s > now_s - REPORT_DELAY_S:
                break  # later ones are younger still
            del self._unreported[key]

    # ---- figures ---------------------------------------------------------------------------------

    @property
    def requests(self) -> int:
        """This router's requests in flight on the worker."""
        return len(self._ledger)

    @property
    def running(self) -> int:
        """Sequences on the worker, other routers' included."""
        unreported = sum(work.sequences for work in self._unreported.values())
        return max(self.sequences, self._report.running + self._report.waiting + unreported)

    def has_room(self, sequences: int) -> bool:
        """May another request of `sequences` be sent? One larger than the limit may when nothing runs."""
        running = self.running
        return running == 0 or running + sequences <= self.max_sequences

    @property
    def queued_s(self) -> float:
        """Seconds of prefill ahead of a request that is sent now."""
        tokens = self._report.queued_prefill_tokens
        fetch = 0
        for work in self._unreported.values():
            tokens += work.uncached_tokens
            fetch += work.store_tokens
        seconds = tokens / self.rates.prefill
        return seconds + fetch / self.rates.store if fetch and self.rates.store else seconds

    def memory_wait_s(self, blocks: int) -> float:
        """Seconds until `blocks` more pages can be had: by Little's law a full worker frees its capacity
        once in a request's mean residence."""
        free = self._report.free_blocks - sum(work.blocks for work in self._unreported.values())
        missing = min(blocks, self.capacity_blocks) - free
        return max(0, missing) / max(1, self.capacity_blocks) * self.residence_s

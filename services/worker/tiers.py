"""Where blocks live besides the GPU: the contract between the engine and the shared store.

The engine never waits for a tier. It starts a load and takes what has come between steps; it offers blocks
and forgets them. A tier answers every failure with fewer blocks, never with an exception and never with wrong
data.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.kv_payload import Codec


@dataclass(frozen=True)
class EncodedBlock:
    """A block's KV as it travels: a payload (kernels.kv_payload), uint8 [bytes] on the host, never written
    again."""

    codec: Codec
    payload: torch.Tensor


@dataclass(frozen=True)
class OfferedBlock:
    """A full block that the engine computed; `kv` is by the worker's codec."""

    hash: bytes
    parent: bytes  # hash of the block before it; the root for block 0
    first: bytes  # hash of its prefix's first block
    depth: int  # blocks before it in its prefix
    kv: EncodedBlock
    priority: int
    ttl_s: float | None
    tenant: str


@dataclass(frozen=True)
class Outlook:
    """What the engine expects where it computes the blocks that a load is asked for."""

    before: Sequence[bytes]  # hashes of the blocks before them
    ahead_s: float  # until it would begin
    step_s: float  # of a full step


class Flight(Protocol):
    """What the store lacks behind the run of a load, where one worker computes it for all (see flight.py).
    Blocks are numbered from the first one that is missing. No method blocks."""

    @property
    def first(self) -> int:
        """How many blocks of the load's come before it."""

    @property
    def held(self) -> int:
        """Blocks of host memory that it may take."""

    def waits(self, front: int) -> bool:
        """Whether the sequence, whose turn it is and which has the blocks before `front`, is to wait and to
        `take` what comes, not to compute. Negative: its turn at the run has not come yet."""

    def take(self, front: int) -> Sequence[EncodedBlock]:
        """What has come of the blocks from `front` on, in order."""

    def leave(self, computed: bool) -> None:
        """The sequence ends or gives its pages back; `computed`: its prompt is computed, and offered."""


class Load(Protocol):
    """A run of blocks on its way from a tier, the last one first. No method blocks."""

    @property
    def found(self) -> int | None:
        """Blocks of the run: as many of those asked for, from the first one on, as the tier has and is
        willing to bring. None until it knows."""

    @property
    def over(self) -> bool:
        """Nothing comes any more than what `take` gives now."""

    @property
    def flight(self) -> Flight | None:
        """Of what the store lacks, known by the time that `found` is or the load is over. It goes on when the
        load is cancelled: whoever has seen it has to `leave` it."""

    def take(self) -> list[EncodedBlock]:
        """What has come since the last call: each is the KV of the block before the one that came before it,
        the first that of block `found - 1`. Codecs may differ, none is less exact than the worker's own."""

    def expected_s(self, blocks: int) -> float:
        """Predicted seconds until `blocks` more have come, by what this load has shown so far; until `found`
        is known, for 0 blocks. One that stands still is expected to go on so for longer and longer."""

    def cancel(self) -> None:
        """No more blocks are wanted: free what the load holds. Safe to call at any time, more than once."""


class StoreTier(Protocol):
    """The shared store as the engine sees it. All methods return at once.

    Blocks of one call belong to one prefix, whose first block's hash is `first`: it says where in the store
    they are.
    """

    def start_load(
        self,
        hashes: Sequence[bytes],
        recompute_s: Sequence[float],
        tenant: str,
        first: bytes,
        most: int,
        outlook: Outlook | None = None,
    ) -> Load | None:
        """Begin to fetch a leading run of `hashes` from its back, or None when the store cannot help (down,
        gate closed). At most `most` blocks are brought; the load is over then.

        `recompute_s[i]` is the predicted time to compute the first i+1 of them instead, which goes on
        meanwhile. The tier decides whether a load is worth it from its measured bandwidth and latency. With
        an `outlook`, what it lacks may become a flight.
        """

    @property
    def awaited(self) -> Set[bytes]:
        """Blocks that this worker computes, another waits for, and the store does not have yet: to be offered
        before others, whatever they are worth."""

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        """Write behind, blocks of any prefixes. Returns how many were taken; the rest is dropped: bytes in
        flight are bounded."""

    def wants(self, hashes: Sequence[bytes], first: bytes) -> Sequence[bool]:
        """Which of these blocks `offer` would take now, so that the engine copies no page in vain."""

    def server(self, first: bytes) -> int:
        """Which of the store's servers a prefix lives on, from 0 on."""

    def room(self, server: int) -> int:
        """Blocks that `offer` would take for this server now. One that is down has room, and wants none."""

    def threshold(self, first: bytes) -> float:
        """What a block must be worth, in hits a second (services.cache_store.worth), to be written rather
        than what would go for it. 0 while there is room, or nobody knows."""

    def retain(
        self, hashes: Sequence[bytes], priority: int, ttl_s: float | None, tenant: str, first: bytes
    ) -> None:
        """A request hit these blocks, so nobody offers them again, and wants them kept like this."""

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """(stored, removed) block hashes of this tier since the last call."""

    def tokens_per_s(self) -> float:
        """Measured load rate; 0 while the store is unreachable."""

    def close(self) -> None:
        """Stop threads and connections; pending offers are dropped."""

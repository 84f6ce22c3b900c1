"""Where blocks live besides the GPU: the contract between the engine and the shared store.

The engine never waits for a tier. It starts a load and polls it between steps; it offers blocks and forgets
them. A tier answers every failure with fewer blocks, never with an exception and never with wrong data.
"""

from __future__ import annotations

from collections.abc import Sequence
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
class LoadResult:
    """`blocks[i]` holds the KV of the i-th block asked for; a leading run, possibly empty. Codecs may differ,
    none is less exact than the worker's own."""

    blocks: list[EncodedBlock]
    seconds: float


class Load(Protocol):
    """A load under way."""

    def poll(self) -> LoadResult | None:
        """The result once there is one; None while the load runs. Never blocks."""

    def cancel(self) -> None:
        """The request is gone: free what the load holds. Safe to call at any time, more than once."""


class StoreTier(Protocol):
    """The shared store as the engine sees it. All methods return at once.

    Blocks of one call belong to one prefix, whose first block's hash is `first`: it says where in the store
    they are.
    """

    def start_load(
        self, hashes: Sequence[bytes], recompute_s: Sequence[float], tenant: str, first: bytes
    ) -> Load | None:
        """Begin to fetch a leading run of `hashes`, or None when the store cannot help (down, gate closed).

        `recompute_s[i]` is the predicted time to compute the first i+1 of them instead. The tier decides
        how many blocks are worth loading from its measured bandwidth and latency; zero is an answer.
        """

    def offer(self, blocks: Sequence[OfferedBlock]) -> int:
        """Write behind, blocks of any prefixes. Returns how many were taken; the rest is dropped: bytes in
        flight are bounded."""

    def wants(self, hashes: Sequence[bytes], first: bytes) -> Sequence[bool]:
        """Which of these blocks `offer` would take now, so that the engine copies no page in vain."""

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

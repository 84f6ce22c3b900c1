"""Load or recompute: a prefix that the store has is done from both ends until they meet.

The engine computes it from the front while a load brings it from the back: computing never waits for the
load, so a slow store costs nothing, and the back is what costs most to compute and no more to load. (Jin et
al., "Compute or Load KV Cache? Why Not Both?", ICML 2025.)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

#: A load must save so much of computing, and so many seconds, to be worth the store's and the link's time.
_LEAST_SHARE = 0.05
_LEAST_SAVED_S = 0.001


def meeting_point(blocks: int, compute_s: Callable[[int], float], arrive_s: Callable[[int], float]) -> int:
    """How many of `blocks` the front computes until the load has all others: the smallest m with
    `arrive_s(blocks - m) <= compute_s(m)`; `blocks` if there is none.

    `compute_s(i)`: seconds until i blocks are computed from the front; `arrive_s(i)`: until i more have come
    from the back. Neither ever decreases.
    """
    return bisect_left(range(blocks), True, key=lambda m: arrive_s(blocks - m) <= compute_s(m))


def blocks_worth_loading(
    recompute_s: Sequence[float], *, bandwidth_bytes_s: float, latency_s: float, bytes_per_block: int
) -> int:
    """How many blocks, from the back of a run, a load should bring; 0 = compute them all.

    `recompute_s[i]`: predicted seconds to compute the first i+1 blocks of the run, non-decreasing, infinity
    if nothing is known: then all are loaded. `latency_s` passes before the first block begins to come, what
    is queued before it included. More bandwidth, less latency and slower computing never give fewer blocks.
    Raises ValueError on a negative or non-positive measure that makes no sense.
    """
    if bandwidth_bytes_s < 0 or latency_s < 0 or bytes_per_block <= 0:
        raise ValueError(
            f"bandwidth and latency must not be negative and bytes_per_block must be positive, got "
            f"{bandwidth_bytes_s} B/s, {latency_s} s, {bytes_per_block} B"
        )
    count = len(recompute_s)
    if not count or not bandwidth_bytes_s:
        return 0
    if math.isinf(recompute_s[-1]):
        return count
    block_s = bytes_per_block / bandwidth_bytes_s

    def arrive_s(blocks: int) -> float:
        return latency_s + blocks * block_s if blocks else 0.0

    def compute_s(blocks: int) -> float:
        return recompute_s[blocks - 1] if blocks else 0.0

    computed = meeting_point(count, compute_s, arrive_s)
    done_s = compute_s(computed)
    if computed and arrive_s(count - computed + 1) < done_s:
        computed -= 1  # the load has this block too before it is computed
        done_s = arrive_s(count - computed)
    saved_s = recompute_s[-1] - done_s
    return 0 if saved_s < max(_LEAST_SAVED_S, _LEAST_SHARE * recompute_s[-1]) else count - computed

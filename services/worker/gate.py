"""Load or recompute: how many leading blocks are worth fetching from the store.

A load of n blocks takes `latency_s + n * bytes_per_block / bandwidth`, computing the same tokens takes
`recompute_s[n-1]`. The request waits for either, so the best n is the one that saves most seconds; zero when
nothing saves any. Attention makes later blocks dearer to compute and no dearer to load, so a slow link may
be worth a long load and not a short one.
"""

from __future__ import annotations

from collections.abc import Sequence


def blocks_worth_loading(
    recompute_s: Sequence[float], *, bandwidth_bytes_s: float, latency_s: float, bytes_per_block: int
) -> int:
    """The number of leading blocks whose load saves the most time; 0 = compute them all.

    `recompute_s[i]`: predicted seconds to compute the first i+1 blocks, non-decreasing. Of equal savings the
    longer load wins: it leaves the device to others. More bandwidth, less latency and slower computing never
    give fewer blocks. Raises ValueError on a negative or non-positive measure that makes no sense.
    """
    if bandwidth_bytes_s < 0 or latency_s < 0 or bytes_per_block <= 0:
        raise ValueError(
            f"bandwidth and latency must not be negative and bytes_per_block must be positive, got "
            f"{bandwidth_bytes_s} B/s, {latency_s} s, {bytes_per_block} B"
        )
    if not bandwidth_bytes_s:
        return 0
    best, most_saved_s = 0, 0.0
    block_s = bytes_per_block / bandwidth_bytes_s
    for blocks, compute_s in enumerate(recompute_s, start=1):
        saved_s = compute_s - latency_s - blocks * block_s
        if saved_s > 0 and saved_s >= most_saved_s:
            best, most_saved_s = blocks, saved_s
    return best

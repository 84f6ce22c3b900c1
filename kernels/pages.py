"""Block tables as the attention kernels read them.

A loop over tiles of keys loads the page of the next tile while it works on this one. Asked for in the same
turn, the page would be a load that other loads wait for, and Triton's software pipeline would spend a stage
on it: with three stages, none was left to load keys and values ahead of their use.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_of(table, start, context, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Page of the KEYS keys from `start` on, int64; of smaller pages a vector, the page of every key before
    `context`. `start` is a multiple of KEYS or of BLOCK_SIZE, whichever is less."""
    if BLOCK_SIZE >= KEYS:
        page = tl.load(table + start // BLOCK_SIZE)
    else:
        key = start + tl.arange(0, KEYS)
        page = tl.load(table + key // BLOCK_SIZE, mask=key < context, other=0)
    return page.to(tl.int64)


@triton.jit
def places_of(
    page, start, N_KV: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr
):
    """Where the KEYS keys from `start` on lie in one head's pages: elements from its start to the first of
    them, and from there to each. Within one page the latter stay the same from tile to tile."""
    entry = tl.arange(0, KEYS)
    if BLOCK_SIZE >= KEYS:
        origin = page * (N_KV * BLOCK_SIZE * DIM) + start % BLOCK_SIZE * DIM
        rows = entry * DIM
    else:
        origin = 0
        rows = page * (N_KV * BLOCK_SIZE * DIM) + (start + entry) % BLOCK_SIZE * DIM
    return origin, rows

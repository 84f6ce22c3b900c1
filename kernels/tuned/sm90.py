"""Tiles for H100 and H200. `tests/kernels/test_compile.py` compiles what stands here and counts registers,
spills, shared memory and tensor-core instructions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How one program of attention is cut; pages larger than `keys` are read in parts."""

    rows: int  # (query, head of the group) pairs
    keys: int
    warps: int
    stages: int


# 16 rows are the least that a tensor core takes. From 64 on, Triton emits wgmma instead of mma.sync; 128 rows
# need 8 warps. At head dimension 128 registers decide: 128 rows with 4 warps spill, so do 128 keys with 64 or
# 128 rows, and 64 rows with 64 keys take 228 of 255.
_ATTENTION = (
    Tile(rows=16, keys=64, warps=4, stages=3),
    Tile(rows=64, keys=64, warps=4, stages=3),
    Tile(rows=128, keys=64, warps=8, stages=2),
)


def attention_tile(group: int, max_query: int) -> Tile:
    """The smallest tile that holds all (query, head) pairs of a row, or else the largest.

    `group` is the number of query heads that share a KV head.
    """
    return next((tile for tile in _ATTENTION if group * max_query <= tile.rows), _ATTENTION[-1])


def norm_warps(columns: int) -> int:
    """Warps for a row of `columns` elements: 16 elements a thread."""
    return min(16, max(1, columns // 512))


#: Columns of one program of SwiGLU, which has 4 warps: 8 elements a thread, one 16-byte load in bf16.
SWIGLU_COLUMNS = 1024

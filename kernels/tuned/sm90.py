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


# 16 rows are the least that a tensor core takes. From 64 on, Triton emits wgmma instead of mma.sync. The
# registers of a thread decide the rest, at head dimension 128: these tiles take 96, 210 and 186 of 255; 128
# rows with 4 warps spill 272 bytes, 64 rows with 128 keys 64 bytes, and 128 rows with 128 keys take 254.
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

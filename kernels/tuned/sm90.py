"""Tiles for H100 and H200. `tests/kernels/test_compile.py` compiles what stands here and counts registers,
spills, shared memory and tensor-core instructions."""

from __future__ import annotations

from dataclasses import dataclass

#: Streaming multiprocessors.
SMS = 132


@dataclass(frozen=True)
class Tile:
    """How one program of attention is cut."""

    rows: int  # (query, head of the group) pairs
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecodeTile:
    """How one program of decode attention is cut, and how the batch is cut into programs."""

    keys: int
    warps: int
    stages: int
    programs_per_sm: int  # all of them on the device at once: what is left over would wait for a second wave
    least_tiles: int  # of a program: a shorter piece costs more to combine than it saves
    combined: int  # elements of partial results of a row that are loaded together

    @property
    def registers(self) -> int:
        """Of a thread, so that `programs_per_sm` fit. Said to ptxas, which else aims at the next step of
        occupancy and spills to reach it."""
        return min(255, 65536 // (32 * self.warps * self.programs_per_sm) // 8 * 8)


# Decode is bound by the bytes in flight: an SM needs some 23 KB under way to draw its share of 3.0 TB/s at
# 1 us of latency. `stages` - 1 tiles of K and V are under way or ready in every program: 192 KB of an SM at
# head dimensions 128 and 64. The other programs of an SM draw while one begins a row and waits for its table.
# Pieces of at least 4 tiles: 8 rows of 256 tokens take 7.4 us (Llama-8B), 12.1 us with pieces of 2.
_DECODE = {
    64: DecodeTile(keys=64, warps=4, stages=5, programs_per_sm=3, least_tiles=2, combined=1024),
    128: DecodeTile(keys=64, warps=4, stages=4, programs_per_sm=2, least_tiles=4, combined=4096),
    256: DecodeTile(keys=32, warps=4, stages=4, programs_per_sm=2, least_tiles=2, combined=4096),
}

#: What benchmarks/attention.py times at head dimension 128 to choose the entry above.
DECODE_CANDIDATES = (
    _DECODE[128],
    DecodeTile(keys=64, warps=4, stages=4, programs_per_sm=2, least_tiles=2, combined=4096),
    DecodeTile(keys=64, warps=4, stages=4, programs_per_sm=2, least_tiles=8, combined=4096),
    DecodeTile(keys=32, warps=4, stages=5, programs_per_sm=3, least_tiles=4, combined=2048),
)

# From 64 rows on, Triton emits wgmma instead of mma.sync. The registers of a thread decide the rest, at head
# dimension 128: these tiles take 243 and 206 of 255; 128 rows with 4 warps spill 424 bytes, 64 rows with 128
# keys 64 bytes. Two programs of 64 rows fit an SM, one of 128: each half waits less, but reads twice from L2.
_PREFILL = {
    128: (Tile(rows=64, keys=64, warps=4, stages=3), Tile(rows=128, keys=64, warps=8, stages=3)),
    256: (Tile(rows=64, keys=32, warps=8, stages=2), Tile(rows=128, keys=32, warps=8, stages=2)),
}
#: What benchmarks/attention.py times at head dimension 128 to choose the entry above.
PREFILL_CANDIDATES = (
    *_PREFILL[128],
    Tile(rows=64, keys=64, warps=4, stages=2),
    Tile(rows=128, keys=64, warps=8, stages=2),
    Tile(rows=128, keys=64, warps=8, stages=4),
    Tile(rows=128, keys=128, warps=8, stages=2),
)
#: Queries of a chunk that count as few.
_SHORT_CHUNK = 256

_SHARED = {
    128: Tile(rows=128, keys=64, warps=8, stages=3),
    256: Tile(rows=128, keys=32, warps=8, stages=2),
}

#: (query, head) pairs of decode rows that share a prefix, whatever the head dimension.
SHARED_LANES = 128


def decode_tile(dim: int) -> DecodeTile:
    """For heads of `dim` elements."""
    return next(tile for most, tile in _DECODE.items() if dim <= most)


def prefill_tile(group: int, dim: int, max_query: int, heads: int) -> Tile:
    """The smallest tile that holds a group, but for many short chunks the largest.

    `group` is the number of query heads that share a KV head, `heads` the KV heads of all rows together.
    Short chunks are the ends of long contexts, which a large tile reads half as often: 16 of 128 queries
    after 4,096 tokens take 391 us with 128 rows (Llama-8B), 567 us with 64. Long chunks see as many keys as
    they have queries, and the two programs that fit an SM hide each other's waits: 4,096 tokens take 313 us
    with 64 rows, 327 us with 128.
    """
    tiles = next(tiles for most, tiles in _PREFILL.items() if dim <= most)
    fitting = [tile for tile in tiles if tile.rows >= group]
    programs = heads * -(-max_query // (fitting[-1].rows // group))
    return fitting[-1] if max_query <= _SHORT_CHUNK and programs >= SMS else fitting[0]


def shared_tile(dim: int) -> Tile:
    """For decode rows that read a common prefix together."""
    return next(tile for most, tile in _SHARED.items() if dim <= most)


def norm_warps(columns: int) -> int:
    """Warps for a row of `columns` elements: 16 elements a thread."""
    return min(16, max(1, columns // 512))


#: Columns of one program of SwiGLU, which has 4 warps: 8 elements a thread, one 16-byte load in bf16.
SWIGLU_COLUMNS = 1024


def rope_tile(tokens: int) -> tuple[int, int]:
    """(tokens, warps) of one program of rope, which has one head. Few tokens: as many programs as there are
    (token, head) pairs, up to what the device holds at once (4,224 of one warp). Many: 393,216 programs of
    one warp for 8,192 tokens would be launched for longer than they run."""
    if tokens <= 64:
        return 1, 1
    return (4, 1) if tokens <= 256 else (16, 4)


#: Of one program of the KV codec: 32 elements a thread. They move bytes and little else; what counts is that
#: many programs are on an SM at the same time, and the registers of this size (64 at most) let 8 of them.
KV_CODEC_ELEMENTS = 4096
KV_CODEC_WARPS = 4

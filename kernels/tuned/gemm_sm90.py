"""Tiles of the decode GEMM for H100 and H200: measured ones for the shapes that we serve, a rule for others.

The rows of `MEASURED` come from `python -m benchmarks.linear --tune` on an H100 80GB (3.0 TB/s): the best
tile for N rows of K weights and up to `bucket` tokens, its microseconds, and those of the same layer through
cuBLAS with norm, SwiGLU and sum as kernels of their own. None: cuBLAS is faster.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmTile:
    """How a product is cut into programs, and what one program holds."""

    rows: int  # of W; 16 and 32 run on mma.sync, from 64 on on wgmma
    tokens: int
    depth: int  # of K, in one step
    split: int  # parts of K
    warps: int
    stages: int
    prefetch: int = 0  # elements of each row requested before the kernels before have finished
    norm_first: bool = False  # a norm is a kernel of its own: summing squares would hold up many tokens

    @property
    def shared_bytes(self) -> int:
        """At most, for 2-byte elements."""
        return 2 * self.stages * (self.rows + self.tokens) * self.depth


#: Tokens up to which a tile is chosen. Beyond the last one cuBLAS has the layer.
BUCKETS = (16, 32, 64, 128, 256)

MEASURED: dict[tuple[int, int, int], tuple[GemmTile | None, float, float]] = {
    # N, K, bucket: tile(rows, tokens, depth, split, warps, stages, prefetch), its us, cuBLAS's us
    (6144, 4096, 16): (GemmTile(64, 16, 64, 1, 4, 8), 21.3, 24.1),  # llama-8b qkv
    (6144, 4096, 32): (GemmTile(64, 32, 256, 1, 4, 4, 256), 22.1, 24.9),  # llama-8b qkv
    (6144, 4096, 64): (GemmTile(64, 64, 64, 1, 4, 8, norm_first=True), 23.1, 24.2),  # llama-8b qkv
    (6144, 4096, 128): (GemmTile(128, 64, 64, 1, 4, 8, norm_first=True), 24.7, 25.1),  # llama-8b qkv
    (6144, 4096, 256): (None, 28.0, 28.0),  # llama-8b qkv
    (4096, 4096, 16): (GemmTile(64, 16, 256, 1, 4, 5), 14.0, 17.1),  # llama-8b o
    (4096, 4096, 32): (GemmTile(64, 32, 128, 1, 4, 8, 512), 14.6, 15.0),  # llama-8b o
    (4096, 4096, 64): (None, 15.3, 15.3),  # llama-8b o
    (4096, 4096, 128): (None, 15.9, 15.9),  # llama-8b o
    (4096, 4096, 256): (None, 18.3, 18.3),  # llama-8b o
    (28672, 4096, 16): (GemmTile(64, 16, 128, 1, 4, 5, 256), 84.4, 90.8),  # llama-8b gate_up
    (28672, 4096, 32): (GemmTile(64, 32, 128, 1, 4, 4, 512), 86.7, 92.0),  # llama-8b gate_up
    (28672, 4096, 64): (GemmTile(64, 64, 128, 1, 4, 3, norm_first=True), 89.2, 96.9),  # llama-8b gate_up
    (28672, 4096, 128): (GemmTile(64, 128, 64, 1, 4, 4, norm_first=True), 97.8, 102.1),  # llama-8b gate_up
    (28672, 4096, 256): (None, 118.4, 118.4),  # llama-8b gate_up
    (4096, 14336, 16): (GemmTile(64, 16, 128, 1, 4, 8), 43.8, 46.7),  # llama-8b down
    (4096, 14336, 32): (GemmTile(64, 32, 128, 1, 4, 8), 45.9, 47.9),  # llama-8b down
    (4096, 14336, 64): (GemmTile(64, 64, 128, 2, 4, 6, 256), 47.5, 49.5),  # llama-8b down
    (4096, 14336, 128): (GemmTile(64, 128, 64, 2, 4, 8), 52.5, 55.3),  # llama-8b down
    (4096, 14336, 256): (None, 58.8, 58.8),  # llama-8b down
    (128256, 4096, 16): (GemmTile(128, 16, 128, 1, 4, 3), 350.3, 385.2),  # llama-8b head
    (128256, 4096, 32): (GemmTile(64, 32, 128, 1, 4, 3), 358.4, 389.2),  # llama-8b head
    (128256, 4096, 64): (GemmTile(64, 64, 128, 1, 4, 3, norm_first=True), 370.8, 392.6),  # llama-8b head
    (128256, 4096, 128): (GemmTile(128, 128, 64, 1, 8, 3, norm_first=True), 392.8, 401.7),  # llama-8b head
    (128256, 4096, 256): (None, 445.8, 445.8),  # llama-8b head
    (4096, 1024, 16): (GemmTile(64, 16, 128, 1, 4, 5), 5.2, 7.5),  # qwen3-0.6b qkv
    (4096, 1024, 32): (GemmTile(64, 32, 128, 1, 4, 8, 1024), 5.6, 7.6),  # qwen3-0.6b qkv
    (4096, 1024, 64): (GemmTile(64, 64, 64, 1, 4, 6, norm_first=True), 6.7, 7.7),  # qwen3-0.6b qkv
    (4096, 1024, 128): (None, 7.9, 7.9),  # qwen3-0.6b qkv
    (4096, 1024, 256): (GemmTile(64, 128, 64, 1, 4, 8, norm_first=True), 9.1, 9.0),  # qwen3-0.6b qkv
    (1024, 2048, 16): (GemmTile(64, 16, 128, 4, 4, 5), 4.4, 5.8),  # qwen3-0.6b o
    (1024, 2048, 32): (GemmTile(32, 32, 64, 4, 4, 8), 4.8, 5.8),  # qwen3-0.6b o
    (1024, 2048, 64): (GemmTile(64, 64, 128, 4, 4, 3), 5.7, 5.9),  # qwen3-0.6b o
    (1024, 2048, 128): (None, 6.0, 6.0),  # qwen3-0.6b o
    (1024, 2048, 256): (None, 6.3, 6.3),  # qwen3-0.6b o
    (6144, 1024, 16): (GemmTile(64, 16, 128, 1, 4, 5, 512), 6.3, 9.9),  # qwen3-0.6b gate_up
    (6144, 1024, 32): (GemmTile(64, 32, 128, 1, 4, 4, 512), 6.6, 10.1),  # qwen3-0.6b gate_up
    (6144, 1024, 64): (GemmTile(64, 64, 64, 1, 4, 8, norm_first=True), 7.8, 10.4),  # qwen3-0.6b gate_up
    (6144, 1024, 128): (GemmTile(128, 64, 64, 1, 4, 8, norm_first=True), 8.5, 10.4),  # qwen3-0.6b gate_up
    (6144, 1024, 256): (GemmTile(128, 128, 64, 1, 8, 6, norm_first=True), 11.4, 11.5),  # qwen3-0.6b gate_up
    (1024, 3072, 16): (GemmTile(64, 16, 128, 4, 4, 5), 5.0, 7.9),  # qwen3-0.6b down
    (1024, 3072, 32): (GemmTile(32, 32, 64, 4, 4, 8), 5.5, 8.0),  # qwen3-0.6b down
    (1024, 3072, 64): (GemmTile(32, 64, 128, 4, 4, 4), 6.8, 8.1),  # qwen3-0.6b down
    (1024, 3072, 128): (None, 7.6, 7.6),  # qwen3-0.6b down
    (1024, 3072, 256): (None, 8.6, 8.6),  # qwen3-0.6b down
    (151936, 1024, 16): (GemmTile(128, 16, 128, 1, 4, 3), 108.6, 119.7),  # qwen3-0.6b head
    (151936, 1024, 32): (GemmTile(64, 32, 128, 1, 4, 4, norm_first=True), 113.6, 125.6),  # qwen3-0.6b head
    (151936, 1024, 64): (GemmTile(64, 64, 128, 1, 4, 3, norm_first=True), 119.6, 128.1),  # qwen3-0.6b head
    (151936, 1024, 128): (GemmTile(128, 128, 64, 1, 8, 6, norm_first=True), 129.7, 135.3),  # qwen3-0.6b head
    (151936, 1024, 256): (None, 148.9, 148.9),  # qwen3-0.6b head
}


def gemm_tile(rows: int, depth: int, tokens: int) -> GemmTile | None:
    """The tile for W [rows, depth] and so many tokens; None where cuBLAS is to be called."""
    bucket = next((bucket for bucket in BUCKETS if tokens <= bucket), None)
    if bucket is None:
        return None
    measured = MEASURED.get((rows, depth, bucket))
    return measured[0] if measured else _tile_of_unmeasured(rows, depth, bucket)


def _tile_of_unmeasured(rows: int, depth: int, bucket: int) -> GemmTile | None:
    """One or two programs for each of 132 SMs, with all the memory of an SM under way as stages.

    A part of K below 8 steps would not fill the stages; more than 4 parts cost more than they bring.
    """
    if bucket > 64:
        return None
    tile_rows = 32 if bucket == 16 and rows < 64 * 96 else 64
    step = 128 if depth % 128 == 0 else 64
    programs, split = -(-rows // tile_rows), 1
    while split < 4 and programs * split < 96 and depth >= 2 * split * 8 * step:
        split *= 2
    shared_bytes = (100 if programs * split > 132 else 200) * 1024
    stages = min(6, shared_bytes // (2 * (tile_rows + bucket) * step))
    return GemmTile(tile_rows, bucket, step, split, 4, stages)

"""Decode rows attend together to the prefix that they share, whose pages are read once for all of them.

The rows of one tensor-core tile are the (row, head) pairs of up to 128 / group decode rows whose block tables
begin with the same pages. `decode_map` deals the tiles of keys out to a fixed number of programs; each piece
of a tile leaves its part (weighted sum of values, greatest score, sum of weights; fp32) in the workspace, and
`decode_attention`, launched after, begins its own rows with these: exact, as the online softmax does not mind
where its keys come from. No masks: every row sees the whole prefix.

Bytes: K and V of every prefix once for each tile, 2 n_kv D elements a token, and the parts, 4 n_q D a row
and piece. Limit: memory bandwidth, or tensor cores from about 100 rows a prefix on (4 D n_q FLOP a key).

Source: Ye et al., "Cascade Inference" (flashinfer.ai, 2024); Juravsky et al., "Hydragen" (arXiv 2402.05099).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.decode_map import Workspace
from kernels.pages import page_of
from kernels.pdl import PDL, launch_dependents, wait
from kernels.prefill_attention import attend
from kernels.tuned import sm90

_LOG2_E = 1.4426950408889634


def launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    task_map: torch.Tensor,
    shared_tiles: torch.Tensor,
    workspace: Workspace,
    *,
    scale: float,
) -> None:
    """Leave in `workspace` what the rows of `shared_tiles` [n, rows_a_tile] int32 see of their shared
    prefixes. `task_map` was made with these tiles; the rest is as in `decode_attention.launch`."""
    w = workspace
    _, n_kv, block_size, dim = k_pages.shape
    tile = sm90.shared_tile(dim)
    launcher.launch(
        shared_kernel,
        (n_kv, w.shared_programs),
        q,
        k_pages,
        v_pages,
        block_tables,
        task_map,
        shared_tiles,
        w.shared_sums,
        w.shared_stats,
        scale * _LOG2_E,
        block_tables.stride(0),
        GROUP=w.group,
        N_KV=n_kv,
        BLOCK_SIZE=block_size,
        DIM=dim,
        ROWS=tile.rows,
        KEYS=tile.keys,
        ROWS_A_TILE=w.rows_a_tile,
        PROGRAMS=w.shared_programs,
        MAX_TILES=w.max_tiles,
        FIRST_LINE=2 * w.programs + 2 * w.max_rows,
        PDL=PDL,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=PDL,
    )


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables", "shared_tiles"]
)
def shared_kernel(
    q,
    k_pages,
    v_pages,
    block_tables,
    task_map,
    shared_tiles,
    shared_sums,
    shared_stats,
    scale,  # times log2(e)
    table_stride,
    GROUP: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS_A_TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MAX_TILES: tl.constexpr,
    FIRST_LINE: tl.constexpr,  # of the map's part for this kernel
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    line = task_map + (FIRST_LINE + program) * 4
    first_tile = tl.load(line)
    last_tile = tl.load(line + 1)
    per = tl.load(line + 2)
    wait(PDL)
    launch_dependents(PDL)
    lane = tl.arange(0, ROWS)
    member = lane // GROUP
    column = tl.arange(0, triton.next_power_of_2(DIM))
    k_head = k_pages + kv_head * BLOCK_SIZE * DIM
    v_head = v_pages + kv_head * BLOCK_SIZE * DIM
    for tile in range(first_tile, last_tile + 1):
        group = task_map + (FIRST_LINE + PROGRAMS + tile) * 4
        start = tl.load(group)
        tokens = tl.load(group + 1)
        table = block_tables + tl.load(group + 2).to(tl.int64) * table_stride
        row = tl.load(shared_tiles + tile * ROWS_A_TILE + member, mask=member < ROWS_A_TILE, other=-1)
        place = (row * N_KV + kv_head) * GROUP + lane % GROUP
        mine = (row >= 0)[:, None] & (column < DIM)[None, :]
        q_tile = tl.load(q + place[:, None] * DIM + column[None, :], mask=mine, other=0.0)

        position = tl.zeros_like(lane) + tokens - 1
        top = tl.full([ROWS], -1.0e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, column.shape[0]], tl.float32)
        from_piece = tl.maximum(program * per - start, 0)
        to_piece = tl.minimum((program + 1) * per - start, tl.cdiv(tokens, KEYS))
        page = page_of(table, from_piece * KEYS, tokens, BLOCK_SIZE, KEYS)
        for piece in range(from_piece, to_piece):
            here = page
            page = page_of(table, tl.minimum(piece + 1, to_piece - 1) * KEYS, tokens, BLOCK_SIZE, KEYS)
            # Smaller pages than tiles: the last tile may be partly of the rows' own pages.
            top, mass, acc = attend(
                q_tile, top, mass, acc, piece * KEYS, here, k_head, v_head, column, position, tokens, scale,
                MASKED=BLOCK_SIZE < KEYS, N_KV=N_KV, BLOCK_SIZE=BLOCK_SIZE, DIM=DIM, WINDOW=0, KEYS=KEYS,
            )  # fmt: skip

        # Program + tile: no two pieces have the same, and those of a tile follow each other.
        part = (kv_head * (PROGRAMS + MAX_TILES) + program + tile) * ROWS + lane
        tl.store(shared_stats + part * 2, top, mask=row >= 0)
        tl.store(shared_stats + part * 2 + 1, mass, mask=row >= 0)
        tl.store(shared_sums + part.to(tl.int64)[:, None] * DIM + column[None, :], acc, mask=mine)

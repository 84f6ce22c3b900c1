"""Attention of one new token a row over paged KV: every program reads the same number of keys.

Split-KV with a fixed grid: `decode_map` deals the tiles of all rows out to the programs of a KV head. A row
that one program reads whole is written at once; of a row that is cut, each program leaves its part (weighted
sum of values, greatest score, sum of weights; fp32) in the workspace, and the last one to arrive combines
them in their order, so the result does not depend on who that is. All query heads of a KV head are the rows
of one tensor-core tile (16, of which a group of 4 uses 4: free, the kernel waits for memory). Online softmax
in base 2, fp32 accumulation on bf16, fp16 or fp32 tensors.

Bytes: K and V of every row's context once, 2 n_kv D elements a token, from the row's first key on (after its
shared prefix, or the first tile that its window reaches). Limit: memory bandwidth; for short contexts at
small batch the latency of program line -> block table -> keys.

Source: Sanovar et al., "Lean Attention" (arXiv 2405.10480); Kwon et al., "PagedAttention" (arXiv 2309.06180).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.decode_map import Workspace
from kernels.pages import page_of, places_of
from kernels.pdl import PDL, launch_dependents, wait

_LOG2_E = 1.4426950408889634


def launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    task_map: torch.Tensor,
    workspace: Workspace,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    shared: bool = False,
) -> None:
    """Write `out` [T, n_q, D] of the decode rows that `task_map` was made of; row r owns token r.

    q [T, n_q, D]; k_pages, v_pages [P, n_kv, block_size, D]; block_tables [S, max_blocks] int32. `shared`:
    `shared_attention.launch` has left the rows' shared prefixes in the workspace. All tensors are contiguous,
    but for the rows of block_tables. A padding row gets zeros.
    """
    w = workspace
    _, n_kv, block_size, dim = k_pages.shape
    tile = w.tile
    columns = triton.next_power_of_2(dim)
    heads = triton.next_power_of_2(w.group)
    launcher.launch(
        decode_kernel,
        (n_kv, w.programs),
        q,
        k_pages,
        v_pages,
        block_tables,
        task_map,
        w.sums,
        w.stats,
        w.arrived,
        w.shared_sums if shared else None,
        w.shared_stats if shared else None,
        out,
        scale * _LOG2_E,
        block_tables.stride(0),
        GROUP=w.group,
        N_KV=n_kv,
        BLOCK_SIZE=block_size,
        DIM=dim,
        WINDOW=window,
        ROWS=max(16, heads),
        KEYS=tile.keys,
        PROGRAMS=w.programs,
        MAX_ROWS=w.max_rows,
        AT_ONCE=max(1, tile.combined // (heads * columns)),
        SHARED_PIECES=w.shared_programs + w.max_tiles,
        SHARED_LANES=w.shared_sums.shape[1],
        PDL=PDL,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        launch_pdl=PDL,
    )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables"])
def decode_kernel(
    q,
    k_pages,
    v_pages,
    block_tables,
    task_map,
    sums,
    stats,
    arrived,
    shared_sums,
    shared_stats,
    out,
    scale,  # times log2(e)
    table_stride,
    GROUP: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,  # power of two of at least 16; holds a group
    KEYS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SHARED_PIECES: tl.constexpr,
    SHARED_LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    COLUMNS: tl.constexpr = triton.next_power_of_2(DIM)
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mine = (lane < GROUP)[:, None] & (column < DIM)[None, :]
    in_row = lane[:, None] * DIM + column[None, :]
    k_head = k_pages + kv_head * BLOCK_SIZE * DIM
    v_head = v_pages + kv_head * BLOCK_SIZE * DIM
    first_row = tl.load(task_map + program * 4)
    last_row = tl.load(task_map + program * 4 + 1)
    per = tl.load(task_map + program * 4 + 2)
    line = task_map + (PROGRAMS + program) * 4
    start = tl.load(line)
    begin = tl.load(line + 1)
    context = tl.load(line + 2)
    table = block_tables + tl.load(line + 3).to(tl.int64) * table_stride
    page = page_of(table, begin + (program * per - start) * KEYS, context, BLOCK_SIZE, KEYS)
    wait(PDL)  # so far only the step's map and tables were read, which are older than the kernel before
    launch_dependents(PDL)
    for row in range(first_row, last_row + 1):
        # The line of the next row is there when this one is done.
        next_line = task_map + (2 * PROGRAMS + tl.minimum(row + 1, last_row)) * 4
        next_start = tl.load(next_line)
        next_begin = tl.load(next_line + 1)
        next_context = tl.load(next_line + 2)
        next_slot = tl.load(next_line + 3)
        tiles = tl.maximum(tl.cdiv(context - begin, KEYS), 1)
        from_tile = tl.maximum(program * per - start, 0)
        to_tile = tl.minimum((program + 1) * per - start, tiles)
        token = (row * N_KV + kv_head) * GROUP * DIM
        q_tile = tl.load(q + token + in_row, mask=mine, other=0.0)

        # Lower than any score, but finite: where nothing is seen, differences are 0 and not NaN.
        top = tl.full([ROWS], -1.0e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if shared_sums is not None:
            share = task_map + (2 * PROGRAMS + MAX_ROWS + row) * 4
            # Whoever reads the row's first own key begins with what it has seen of the shared prefix.
            pieces = tl.where(from_tile == 0, tl.load(share + 1), 0)
            first = tl.load(share)
            there = (kv_head * SHARED_PIECES + first) * SHARED_LANES + tl.load(share + 2) + lane
            for _ in range(0, pieces):
                part_top = tl.load(shared_stats + there * 2, mask=lane < GROUP, other=-1.0e30)
                part_mass = tl.load(shared_stats + there * 2 + 1, mask=lane < GROUP, other=0.0)
                where = there.to(tl.int64)[:, None] * DIM + column[None, :]
                part = tl.load(shared_sums + where, mask=mine, other=0.0)
                new_top = tl.maximum(top, part_top)
                rescale = tl.exp2(top - new_top)
                weight = tl.exp2(part_top - new_top)
                acc = acc * rescale[:, None] + part * weight[:, None]
                mass = mass * rescale + part_mass * weight
                top = new_top
                there += SHARED_LANES

        # Summed up over the keys after the loop: a sum across warps less in each turn.
        masses = tl.zeros([ROWS, KEYS], tl.float32)
        for tile in range(from_tile, to_tile):
            key = begin + tile * KEYS + tl.arange(0, KEYS)
            # After the context comes whatever the page held before: zeros instead, because 0 * NaN is NaN.
            known = key < context
            origin, rows = places_of(page, begin + tile * KEYS, N_KV, BLOCK_SIZE, DIM, KEYS)
            k_place = (k_head + origin) + (rows[None, :] + column[:, None])
            v_place = (v_head + origin) + (rows[:, None] + column[None, :])
            k = tl.load(k_place, mask=known[None, :] & (column < DIM)[:, None], other=0.0)
            v = tl.load(v_place, mask=known[:, None] & (column < DIM)[None, :], other=0.0)
            page = page_of(table, begin + tl.minimum(tile + 1, to_tile - 1) * KEYS, context, BLOCK_SIZE, KEYS)
            scores = tl.dot(q_tile, k.to(q_tile.dtype), input_precision="ieee") * scale
            seen = known
            if WINDOW:
                seen &= key >= context - WINDOW
            scores = tl.where(seen[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            acc = tl.dot(
                weights.to(q_tile.dtype), v.to(q_tile.dtype), acc * rescale[:, None], input_precision="ieee"
            )
            masses = masses * rescale[:, None] + weights
            mass *= rescale
            top = new_top
        mass += tl.sum(masses, 1)
        next_table = block_tables + next_slot.to(tl.int64) * table_stride
        page = page_of(next_table, next_begin, next_context, BLOCK_SIZE, KEYS)

        first = start // per
        pieces = (start + tiles - 1) // per - first + 1
        if pieces == 1:
            result = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]  # a padding row has seen nothing: zeros
            tl.store(out + token + in_row, result.to(out.dtype.element_ty), mask=mine)
        else:
            home = kv_head * (PROGRAMS + MAX_ROWS) + row
            place = (home + program) * GROUP + lane
            tl.store(stats + place * 2, top, mask=lane < GROUP)
            tl.store(stats + place * 2 + 1, mass, mask=lane < GROUP)
            tl.store(sums + place.to(tl.int64)[:, None] * DIM + column[None, :], acc, mask=mine)
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter = arrived + row * N_KV + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
                tl.store(counter, 0)
                _combine(
                    sums, stats, home + first, pieces, out + token, GROUP=GROUP, DIM=DIM, AT_ONCE=AT_ONCE
                )  # fmt: skip

        start = next_start
        begin = next_begin
        context = next_context
        table = next_table


@triton.jit
def _combine(sums, stats, first, pieces, out, GROUP: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr):
    """Write the result of a row whose parts are the `pieces` from `first` on. `AT_ONCE` of them are loaded
    together: one after the other would wait for the L2 cache as many times."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    COLUMNS: tl.constexpr = triton.next_power_of_2(DIM)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    index = tl.arange(0, AT_ONCE)
    mine = (head < GROUP)[:, None] & (column < DIM)[None, :]
    top = tl.full([HEADS], -1.0e30, tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, COLUMNS], tl.float32)
    for done in range(0, pieces, AT_ONCE):
        known = (done + index < pieces)[:, None] & (head < GROUP)[None, :]
        place = (first + done + index)[:, None] * GROUP + head[None, :]
        # Other SMs wrote these: past the L1 cache.
        part_top = tl.load(stats + place * 2, mask=known, other=-1.0e30, cache_modifier=".cg")
        part_mass = tl.load(stats + place * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            sums + place.to(tl.int64)[:, :, None] * DIM + column[None, None, :],
            mask=known[:, :, None] & (column < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(part_top, 0))
        weight = tl.exp2(part_top - new_top[None, :])
        rescale = tl.exp2(top - new_top)
        acc = acc * rescale[:, None] + tl.sum(parts * weight[:, :, None], 0)
        mass = mass * rescale + tl.sum(part_mass * weight, 0)
        top = new_top
    result = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
    tl.store(out + head[:, None] * DIM + column[None, :], result.to(out.dtype.element_ty), mask=mine)

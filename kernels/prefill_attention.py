"""Causal attention of prompt chunks over paged KV, on large tensor-core tiles.

The rows of a tile are (query, head) pairs of one KV head, so K and V are read once for the whole group of
heads. Tiles whose keys every query sees run unmasked, only those at the diagonal (or at the edge of the
window) compare positions. Tiles with the most keys start first: what starts last finishes the launch, and
should be short. Online softmax in base 2, fp32 accumulation on bf16, fp16 or fp32 tensors.

Bytes: K and V of a row's context once for each tile of its queries, from L2 for all but the first. Limit:
tensor cores, 4 D n_q FLOP a (query, key) pair; for few queries over a long context the length of a program.

Source: Dao, "FlashAttention-2" (arXiv 2307.08691); Kwon et al., "PagedAttention" (arXiv 2309.06180).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.pages import page_of, places_of
from kernels.pdl import PDL, launch_dependents, wait
from kernels.tuned import sm90

_LOG2_E = 1.4426950408889634


def launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int,
    max_query: int,
    scale: float,
    window: int = 0,
    tile: sm90.Tile | None = None,
) -> None:
    """Write `out` [T, n_q, D] of the rows from `first_row` on.

    q [T, n_q, D]; k_pages, v_pages [P, n_kv, block_size, D]; block_tables [S, max_blocks], slots [R],
    query_start [R + 1], context_len [R] int32; max_query bounds the queries of these rows. All tensors are
    contiguous, but for the rows of block_tables. `tile` overrides the table in tuned/; its rows must be a
    power of two of at least 16 and hold a whole group of heads.
    """
    _, n_kv, block_size, dim = k_pages.shape
    group = q.shape[1] // n_kv
    rows = len(context_len) - first_row
    tile = tile or sm90.prefill_tile(group, dim, max_query, rows * n_kv)
    launcher.launch(
        prefill_kernel,
        (n_kv, rows, triton.cdiv(max_query, tile.rows // group)),
        q,
        k_pages,
        v_pages,
        block_tables,
        slots,
        query_start,
        context_len,
        out,
        scale * _LOG2_E,
        first_row,
        block_tables.stride(0),
        GROUP=group,
        N_KV=n_kv,
        BLOCK_SIZE=block_size,
        DIM=dim,
        WINDOW=window,
        ROWS=tile.rows,
        KEYS=tile.keys,
        PDL=PDL,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=PDL,
    )


@triton.jit(
    do_not_specialize=["first_row", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "slots", "query_start", "context_len"],
)
def prefill_kernel(
    q,
    k_pages,
    v_pages,
    block_tables,
    slots,
    query_start,
    context_len,
    out,
    scale,  # times log2(e)
    first_row,
    table_stride,
    GROUP: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP  # of a tile; the last ROWS % GROUP rows compute for nothing
    kv_head = tl.program_id(0)
    row = first_row + tl.program_id(1)
    first = tl.load(query_start + row)
    queries = tl.load(query_start + row + 1) - first
    context = tl.load(context_len + row)
    wait(PDL)
    launch_dependents(PDL)
    tile_start = (tl.num_programs(2) - 1 - tl.program_id(2)) * QUERIES  # the last queries see the most
    if tile_start < queries:
        lane = tl.arange(0, ROWS)
        query = tile_start + lane // GROUP  # within the row
        mine = (lane < QUERIES * GROUP) & (query < queries)
        column = tl.arange(0, triton.next_power_of_2(DIM))
        place = ((first + query).to(tl.int64) * N_KV + kv_head) * GROUP + lane % GROUP
        place = place[:, None] * DIM + column[None, :]
        stored = mine[:, None] & (column < DIM)[None, :]
        q_tile = tl.load(q + place, mask=stored, other=0.0)

        position = context - queries + query  # within the row's context
        earliest = tl.maximum(context - queries + tile_start, 0)
        beyond = tl.minimum(context, earliest + QUERIES)  # no query of this tile sees this key or a later one
        begin = 0
        masked_begin = 0
        if WINDOW:
            begin = tl.maximum(earliest - WINDOW + 1, 0) // KEYS
            # From here on the last query sees whole tiles, so all do.
            masked_begin = tl.cdiv(tl.maximum(beyond - WINDOW, 0), KEYS)
        unmasked_end = tl.minimum(earliest + 1, context) // KEYS
        masked_begin = tl.minimum(masked_begin, unmasked_end)

        table = block_tables + tl.maximum(tl.load(slots + row), 0).to(tl.int64) * table_stride
        k_head = k_pages + kv_head * BLOCK_SIZE * DIM
        v_head = v_pages + kv_head * BLOCK_SIZE * DIM
        # Lower than any score, but finite: where nothing is seen, differences are 0 and not NaN.
        top = tl.full([ROWS], -1.0e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, column.shape[0]], tl.float32)
        last = tl.cdiv(beyond, KEYS) - 1
        page = page_of(table, begin * KEYS, context, BLOCK_SIZE, KEYS)
        if WINDOW:
            for index in range(begin, masked_begin):
                here = page
                page = page_of(table, tl.minimum(index + 1, last) * KEYS, context, BLOCK_SIZE, KEYS)
                top, mass, acc = attend(
                    q_tile, top, mass, acc, index * KEYS, here, k_head, v_head, column, position, context,
                    scale, MASKED=True, N_KV=N_KV, BLOCK_SIZE=BLOCK_SIZE, DIM=DIM, WINDOW=WINDOW, KEYS=KEYS,
                )  # fmt: skip
        for index in range(masked_begin, unmasked_end):
            here = page
            page = page_of(table, tl.minimum(index + 1, last) * KEYS, context, BLOCK_SIZE, KEYS)
            top, mass, acc = attend(
                q_tile, top, mass, acc, index * KEYS, here, k_head, v_head, column, position, context, scale,
                MASKED=False, N_KV=N_KV, BLOCK_SIZE=BLOCK_SIZE, DIM=DIM, WINDOW=WINDOW, KEYS=KEYS,
            )  # fmt: skip
        for index in range(unmasked_end, last + 1):
            here = page
            page = page_of(table, tl.minimum(index + 1, last) * KEYS, context, BLOCK_SIZE, KEYS)
            top, mass, acc = attend(
                q_tile, top, mass, acc, index * KEYS, here, k_head, v_head, column, position, context, scale,
                MASKED=True, N_KV=N_KV, BLOCK_SIZE=BLOCK_SIZE, DIM=DIM, WINDOW=WINDOW, KEYS=KEYS,
            )  # fmt: skip

        result = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]  # a padding row has seen nothing: zeros
        tl.store(out + place, result.to(out.dtype.element_ty), mask=stored)


@triton.jit
def attend(
    q_tile,
    top,
    mass,
    acc,
    start,  # of the keys
    page,  # as `page_of` gives it
    k_head,
    v_head,
    column,
    position,
    context,
    scale,
    MASKED: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One step of the online softmax: the KEYS keys from `start` on. Where MASKED, a query at `position` sees
    the keys up to itself (with WINDOW, the last so many of them); else all, and all are within `context`."""
    key = start + tl.arange(0, KEYS)
    k_inside = (column < DIM)[:, None]
    v_inside = (column < DIM)[None, :]
    if MASKED:
        # After the context comes whatever the page held before. Zeros instead, because 0 * NaN is NaN.
        k_inside &= (key < context)[None, :]
        v_inside &= (key < context)[:, None]
    origin, rows = places_of(page, start, N_KV, BLOCK_SIZE, DIM, KEYS)
    k = tl.load((k_head + origin) + (rows[None, :] + column[:, None]), mask=k_inside, other=0.0)
    v = tl.load((v_head + origin) + (rows[:, None] + column[None, :]), mask=v_inside, other=0.0)

    scores = tl.dot(q_tile, k.to(q_tile.dtype), input_precision="ieee")
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, -float("inf"))
    # Scaled after the maximum is found: scale and subtraction are one instruction an element.
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(q_tile.dtype), v.to(q_tile.dtype), acc * rescale[:, None], input_precision="ieee")
    return new_top, mass * rescale + tl.sum(weights, 1), acc

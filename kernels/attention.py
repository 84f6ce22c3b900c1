"""Causal attention of a mixed batch (prefill chunks and decodes) over paged KV, with grouped heads.

Online softmax in base 2, one page or part of it at a time; the queries of a tile are (token, head) pairs of
one KV head, so that its K and V are read once for the whole group. fp32 accumulation on bf16, fp16 or fp32
tensors.

Bytes: K and V of every row's context once for each tile of its queries, 2 n_kv D elements a token. Limit:
memory bandwidth in decode; tensor cores in prefill, 4 D n_q FLOP a (query, key) pair.

Source: Kwon et al., "PagedAttention" (arXiv 2309.06180); Dao, "FlashAttention-2" (arXiv 2307.08691).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.tuned import sm90

_LOG2_E = 1.4426950408889634


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    *,
    scale: float,
    max_query: int,
    window: int = 0,
) -> torch.Tensor:
    """Attend from every query to the tokens before it and itself.

    q [T, n_q, D]; k_pages, v_pages [P, n_kv, block_size, D], this step's KV already written; block_tables
    [R, max_blocks] int32, page of each block of each row; query_start [R + 1] int32: row r owns the queries
    query_start[r] to query_start[r + 1], which are the LAST of its context_len[r] (int32) tokens; a row with
    context_len 0 is padding and gets zeros; scale multiplies the scores; max_query is the largest number of
    queries of a row; window > 0 lets a token see itself and the window - 1 tokens before it only.
    Returns [T, n_q, D]; what tokens that no row owns get is unspecified.
    """
    run = launch if q.is_cuda else reference
    return run(
        q,
        k_pages,
        v_pages,
        block_tables,
        query_start,
        context_len,
        scale=scale,
        max_query=max_query,
        window=window,
    )


def reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    *,
    scale: float,
    max_query: int,
    window: int = 0,
) -> torch.Tensor:
    """`paged_attention` in PyTorch."""
    # Row by row: a gather of the row's pages, then one fused SDPA. Padded to one batch, 16 decodes over 100
    # to 2,000 tokens (9 heads, 3 KV heads of 64) take 28 ms on 2 cores against 3.2 ms so, and a row's result
    # would depend on the lengths of the others. All rows gather into the same memory, which stays in the
    # cache and takes another quarter off.
    n_kv, block_size, dim = k_pages.shape[1:]
    starts, contexts = query_start.tolist(), context_len.tolist()
    heads = torch.arange(n_kv, device=q.device).unsqueeze(-1)
    boxes = block_tables.long().unsqueeze(1) * n_kv + heads  # [R, n_kv, max_blocks]: one (page, head) each
    k_boxes, v_boxes = (pages.view(-1, block_size * dim) for pages in (k_pages, v_pages))
    most = n_kv * -(-max(contexts, default=0) // block_size)
    k_row, v_row = (k_boxes.new_empty(most, block_size * dim) for _ in range(2))

    out = torch.zeros_like(q)
    for row, context in enumerate(contexts):
        first, last = starts[row], starts[row + 1]
        if context == 0 or first == last:
            continue
        position = context - (last - first)  # of the first query
        oldest = max(0, position - window + 1) // block_size if window else 0  # block
        index = boxes[row, :, oldest : -(-context // block_size)].flatten()
        tokens = context - oldest * block_size
        k, v = (
            torch.index_select(pages, 0, index, out=gathered[: len(index)])
            .view(1, n_kv, -1, dim)[:, :, :tokens]
            .to(q.dtype)
            for pages, gathered in ((k_boxes, k_row), (v_boxes, v_row))
        )
        seen = None  # a single query sees everything
        if last - first > 1 or window:
            key = torch.arange(oldest * block_size, context, device=q.device)
            query = torch.arange(position, context, device=q.device).unsqueeze(-1)
            seen = key <= query
            if window:
                seen &= key > query - window
        out[first:last] = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None], k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
    return out


def launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    *,
    scale: float,
    max_query: int,
    window: int = 0,
    tile: sm90.Tile | None = None,
) -> torch.Tensor:
    """`paged_attention` in Triton: one program for each row, KV head and tile of queries.

    All tensors are contiguous, but for the rows of block_tables. `tile` overrides the table in tuned/; its
    rows must be a power of two of at least 16 and hold a whole group of heads.
    """
    out = torch.empty_like(q)
    n_kv, block_size, dim = k_pages.shape[1:]
    group = q.shape[1] // n_kv
    tile = tile or sm90.attention_tile(group, max_query)
    grid = (len(context_len), n_kv, triton.cdiv(max_query, tile.rows // group))
    if all(grid):
        attention_kernel[grid](
            q,
            k_pages,
            v_pages,
            block_tables,
            query_start,
            context_len,
            out,
            scale * _LOG2_E,
            block_tables.stride(0),
            GROUP=group,
            N_KV=n_kv,
            BLOCK_SIZE=block_size,
            DIM=dim,
            WINDOW=window,
            ROWS=tile.rows,
            KEYS=min(block_size, tile.keys),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


@triton.jit(do_not_specialize=["table_stride"])
def attention_kernel(
    q,
    k_pages,
    v_pages,
    block_tables,
    query_start,
    context_len,
    out,
    scale,  # times log2(e)
    table_stride,
    GROUP: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # divides BLOCK_SIZE
):
    QUERIES: tl.constexpr = ROWS // GROUP  # of a tile; the last ROWS % GROUP rows compute for nothing
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(query_start + row)
    queries = tl.load(query_start + row + 1) - first
    context = tl.load(context_len + row)
    tile_start = tl.program_id(2) * QUERIES
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
        if WINDOW:
            begin = tl.maximum(earliest - WINDOW + 1, 0) // KEYS
            unmasked_end = begin
        else:
            begin = 0
            unmasked_end = tl.minimum(earliest + 1, context) // KEYS

        table = block_tables + row.to(tl.int64) * table_stride
        k_head = k_pages + kv_head * BLOCK_SIZE * DIM
        v_head = v_pages + kv_head * BLOCK_SIZE * DIM
        top = tl.full([ROWS], -float("inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, column.shape[0]], tl.float32)
        for index in range(begin, unmasked_end):
            top, mass, acc = _attend(
                q_tile, top, mass, acc, index * KEYS, table, k_head, v_head, column, position, context, scale,
                MASKED=False, N_KV=N_KV, BLOCK_SIZE=BLOCK_SIZE, DIM=DIM, WINDOW=WINDOW, KEYS=KEYS,
            )  # fmt: skip
        for index in range(unmasked_end, tl.cdiv(beyond, KEYS)):
            top, mass, acc = _attend(
                q_tile, top, mass, acc, index * KEYS, table, k_head, v_head, column, position, context, scale,
                MASKED=True, N_KV=N_KV, BLOCK_SIZE=BLOCK_SIZE, DIM=DIM, WINDOW=WINDOW, KEYS=KEYS,
            )  # fmt: skip

        result = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]  # a padding row has seen nothing: zeros
        tl.store(out + place, result.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _attend(
    q_tile,
    top,
    mass,
    acc,
    start,  # of the keys; they lie in one page
    table,
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
    """One step of the online softmax: the keys from `start` on."""
    key = start + tl.arange(0, KEYS)
    k_inside = (column < DIM)[:, None]
    v_inside = (column < DIM)[None, :]
    if MASKED:
        # After the context comes whatever the page held before. Zeros instead, because 0 * NaN is NaN.
        k_inside &= (key < context)[None, :]
        v_inside &= (key < context)[:, None]
    page = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
    place = page * (N_KV * BLOCK_SIZE * DIM) + (key % BLOCK_SIZE) * DIM
    k = tl.load(k_head + place[None, :] + column[:, None], mask=k_inside, other=0.0).to(q_tile.dtype)
    v = tl.load(v_head + place[:, None] + column[None, :], mask=v_inside, other=0.0).to(q_tile.dtype)

    scores = tl.dot(q_tile, k, input_precision="ieee") * scale
    if MASKED:
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key seen yet: inf - inf would be NaN
    weights = tl.exp2(scores - origin[:, None])
    rescale = tl.exp2(top - origin)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_top, mass * rescale + tl.sum(weights, 1), acc

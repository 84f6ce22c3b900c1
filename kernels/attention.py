"""Causal attention of a mixed batch (decodes and prefill chunks) over paged KV, with grouped heads.

The one operation that all models attend by. On a GPU each kind of row has a kernel of its own, and a batch
of one kind launches nothing for the other: `decode_attention` for rows with one query, `shared_attention`
before it for the prefixes that some of them share, `prefill_attention` for chunks. What is the same for all
layers of a step is made once, by `plan`.

Bytes, limit and sources: see those modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import decode_attention, decode_map, prefill_attention, shared_attention
from kernels.decode_map import Workspace, shared_rows
from kernels.tuned import sm90

__all__ = [
    "AttentionBatch",
    "AttentionPlan",
    "SharedPrefixes",
    "Workspace",
    "paged_attention",
    "plan",
    "shared_rows",
]


@dataclass(frozen=True)
class SharedPrefixes:
    """Decode rows that begin with the same pages, so that those pages are read once for all of them."""

    #: [decodes] int32: leading tokens of each row that its tile covers, 0 = none. A multiple of block_size,
    #: less than the row's context.
    tokens: torch.Tensor
    #: [n, shared_rows(n_q, n_kv)] int32: the rows of each tile, -1 = no more. A row is in one tile at most;
    #: all rows of a tile have the same first tokens in the same pages. A tile may be empty.
    tiles: torch.Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """R rows of one step. The first `decodes` of them have one query each, query i that of row i; the others
    are prefill chunks. A row's queries are the last of its tokens."""

    block_tables: torch.Tensor  # [S, max_blocks] int32: page of each block, a line a slot
    slots: torch.Tensor  # [R] int32: line of block_tables of each row; -1 = padding
    query_start: torch.Tensor  # [R + 1] int32: row r owns the queries query_start[r] to query_start[r + 1]
    context_len: torch.Tensor  # [R] int32: tokens with KV after this step; 0 = padding
    decodes: int
    max_query: int  # most queries of one row
    shared: SharedPrefixes | None = None
    workspace: Workspace | None = None  # needed on a GPU for decodes


@dataclass(frozen=True)
class AttentionPlan:
    """A batch, ready for all layers of one window."""

    batch: AttentionBatch
    window: int
    task_map: torch.Tensor | None  # of the decodes

    @property
    def shared(self) -> SharedPrefixes | None:
        """Within a window rows see little of what they share, and not the same: each reads its own."""
        return None if self.window else self.batch.shared


def plan(batch: AttentionBatch, *, window: int = 0) -> AttentionPlan:
    """Prepare one step for the layers that attend within `window` (0: to everything before).

    On a GPU it launches the kernel that deals out the decodes. Raises ValueError if the batch's workspace is
    missing or too small.
    """
    result = AttentionPlan(batch, window, None)
    if not batch.decodes or (batch.workspace is None and not batch.context_len.is_cuda):
        return result
    if batch.workspace is None:
        raise ValueError("decode attention on a GPU needs AttentionBatch.workspace, got None")
    task_map = decode_map.launch(
        batch.context_len,
        batch.slots,
        batch.decodes,
        batch.workspace,
        window=window,
        shared_tokens=result.shared.tokens if result.shared else None,
        shared_tiles=result.shared.tiles if result.shared else None,
    )
    return AttentionPlan(batch, window, task_map)


def paged_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """Attend from every query to the tokens before it and itself.

    q [T, n_q, D]; k_pages, v_pages [P, n_kv, block_size, D], this step's KV already written; scale, positive,
    multiplies the scores; a plan with a window lets a token see itself and the window - 1 tokens before it
    only. Returns [T, n_q, D]; padding rows get zeros, what tokens that no row owns get is unspecified.
    """
    run = launch if q.is_cuda else reference
    return run(q, k_pages, v_pages, plan, scale=scale)


def reference(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, plan: AttentionPlan, *, scale: float
) -> torch.Tensor:
    """`paged_attention` in PyTorch."""
    # Row by row: a gather of the row's pages, then one fused SDPA. Padded to one batch, 16 decodes over 100
    # to 2,000 tokens (9 heads, 3 KV heads of 64) take 28 ms on 2 cores against 3.2 ms so, and a row's result
    # would depend on the lengths of the others. All rows gather into the same memory, which stays in the
    # cache and takes another quarter off.
    batch, window = plan.batch, plan.window
    n_kv, block_size, dim = k_pages.shape[1:]
    starts, contexts = batch.query_start.tolist(), batch.context_len.tolist()
    blocks = -(-max(contexts, default=0) // block_size)
    heads = torch.arange(n_kv, device=q.device).unsqueeze(-1)
    tables = batch.block_tables[:, :blocks][batch.slots.clamp(min=0)].long()
    boxes = tables.unsqueeze(1) * n_kv + heads  # [R, n_kv, blocks]: one (page, head) each
    k_boxes, v_boxes = (pages.view(-1, block_size * dim) for pages in (k_pages, v_pages))
    k_row, v_row = (k_boxes.new_empty(n_kv * blocks, block_size * dim) for _ in range(2))

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
    plan: AttentionPlan,
    *,
    scale: float,
    tile: sm90.Tile | None = None,
) -> torch.Tensor:
    """`paged_attention` in Triton. All tensors are contiguous, but for the rows of the block tables; `tile`
    overrides that of prefill."""
    batch = plan.batch
    out = torch.empty_like(q)
    if plan.task_map is not None and batch.workspace is not None:
        if plan.shared is not None:
            shared_attention.launch(
                q,
                k_pages,
                v_pages,
                batch.block_tables,
                plan.task_map,
                plan.shared.tiles,
                batch.workspace,
                scale=scale,
            )
        decode_attention.launch(
            q,
            k_pages,
            v_pages,
            batch.block_tables,
            plan.task_map,
            batch.workspace,
            out,
            scale=scale,
            window=plan.window,
            shared=plan.shared is not None,
        )
    if len(batch.context_len) > batch.decodes and batch.max_query:
        prefill_attention.launch(
            q,
            k_pages,
            v_pages,
            batch.block_tables,
            batch.slots,
            batch.query_start,
            batch.context_len,
            out,
            first_row=batch.decodes,
            max_query=batch.max_query,
            scale=scale,
            window=plan.window,
            tile=tile,
        )
    return out

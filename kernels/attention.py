"""Causal attention of a mixed batch (prefill chunks and decodes) over paged KV, with grouped heads.

Source: Kwon et al., "PagedAttention" (arXiv 2309.06180); Dao, "FlashAttention-2" (arXiv 2307.08691).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    return reference(
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
    # Row by row: a gather of the row's pages, then one fused SDPA. Padded to one batch, 16 decodes over 100 to
    # 2,000 tokens (9 heads, 3 KV heads of 64) take 28 ms on 2 cores against 3.2 ms so, and a row's result would
    # depend on the lengths of the others.
    n_kv, block_size, dim = k_pages.shape[1:]
    k_boxes, v_boxes = (pages.view(-1, block_size * dim) for pages in (k_pages, v_pages))
    heads = torch.arange(n_kv, device=q.device).unsqueeze(-1)
    boxes = block_tables.long().unsqueeze(1) * n_kv + heads  # [R, n_kv, max_blocks]: one (page, head) each
    starts, contexts = query_start.tolist(), context_len.tolist()

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
            pages.index_select(0, index).view(1, n_kv, -1, dim)[:, :, :tokens].to(q.dtype)
            for pages in (k_boxes, v_boxes)
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

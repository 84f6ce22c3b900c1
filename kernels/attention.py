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
    out = torch.zeros_like(q)
    starts, contexts = query_start.tolist(), context_len.tolist()
    block_size = k_pages.shape[2]
    for row, context in enumerate(contexts):
        first, last = starts[row], starts[row + 1]
        if first == last or context == 0:
            continue
        pages = block_tables[row, : -(-context // block_size)].long()
        k = k_pages[pages].transpose(0, 1).flatten(1, 2)[:, :context]  # [n_kv, context, D]
        v = v_pages[pages].transpose(0, 1).flatten(1, 2)[:, :context]
        key = torch.arange(context, device=q.device)
        query = torch.arange(context - (last - first), context, device=q.device).unsqueeze(1)
        seen = key <= query
        if window:
            seen &= key > query - window
        out[first:last] = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out

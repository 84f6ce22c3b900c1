"""From the QKV projection to attention: split, optional q/k norm, rotary embedding, KV write.

One pass over the projection's output instead of four: q and k heads are optionally RMS-normed (Qwen3),
rotated in halves ("NeoX": element i pairs with i + D/2), q is returned, k and v go to their pages.

Source: Su et al., "RoFormer" (arXiv 2104.09864).
"""

from __future__ import annotations

import torch

from kernels import norm


def rope_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    eps: float = 1e-6,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k, write k and v, return q.

    qkv [T, (n_q + 2 n_kv) * D], heads in the order q | k | v; cos_sin [max_position, D] fp32, cosines in the
    first half of a row, sines in the second; positions [T]; slots [T] int64 = page * block_size + offset,
    negative = padding, nothing is written; k_pages, v_pages [P, n_kv, block_size, D], updated in place;
    q_norm, k_norm [D] with eps, or None. Returns q [T, n_q, D].
    """
    return reference(qkv, cos_sin, positions, slots, k_pages, v_pages, eps=eps, q_norm=q_norm, k_norm=k_norm)


def reference(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    *,
    eps: float = 1e-6,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    _, n_kv, block_size, dim = k_pages.shape
    heads = qkv.view(qkv.shape[0], -1, dim)
    q, k, v = heads.split([heads.shape[1] - 2 * n_kv, n_kv, n_kv], dim=1)
    if q_norm is not None:
        q = norm.reference(q, q_norm, eps)
    if k_norm is not None:
        k = norm.reference(k, k_norm, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if bool((slots < 0).any()):
        real = slots >= 0
        slots, k, v = slots[real], k[real], v[real]
    page, offset = slots // block_size, slots % block_size
    k_pages[page, :, offset] = k.to(k_pages.dtype)
    v_pages[page, :, offset] = v.to(v_pages.dtype)
    return q


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

"""From the QKV projection to attention: split, optional q/k norm, rotary embedding, KV write.

One pass over the projection's output instead of four: q and k heads are optionally RMS-normed (Qwen3),
rotated in halves ("NeoX": element i pairs with i + D/2), q is returned, k and v go to their pages. fp32
arithmetic, rounded once, on bf16, fp16 or fp32 tensors.

Bytes: 2 T (n_q + 2 n_kv) D elements and a row of the table a token. Limit: memory bandwidth; for the few
tokens of a decode, the launch.

Source: Su et al., "RoFormer" (arXiv 2104.09864).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher, norm
from kernels.pdl import PDL, launch_dependents, wait
from kernels.tuned import sm90


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
    run = launch if qkv.is_cuda else reference
    return run(qkv, cos_sin, positions, slots, k_pages, v_pages, eps=eps, q_norm=q_norm, k_norm=k_norm)


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
    """`rope_kv_write` in PyTorch."""
    _, n_kv, block_size, dim = k_pages.shape
    heads = qkv.view(len(qkv), qkv.shape[1] // dim, dim)
    q, k, v = heads.split([heads.shape[1] - 2 * n_kv, n_kv, n_kv], dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2]
    q = _rotate(q.float(), q_norm, eps, cos, sin).to(qkv.dtype)
    k = _rotate(k.float(), k_norm, eps, cos, sin).to(k_pages.dtype)
    if bool((slots < 0).any()):
        real = slots >= 0
        slots, k, v = slots[real], k[real], v[real]
    page, offset = slots // block_size, slots % block_size
    k_pages[page, :, offset] = k
    v_pages[page, :, offset] = v.to(v_pages.dtype)
    return q


def _rotate(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    if weight is not None:
        x = norm.reference(x, weight, eps)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def launch(
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
    """`rope_kv_write` in Triton: one program for each head and tile of tokens. All tensors are contiguous."""
    tokens = qkv.shape[0]
    _, n_kv, block_size, dim = k_pages.shape
    n_q = qkv.shape[1] // dim - 2 * n_kv
    q = qkv.new_empty(tokens, n_q, dim)
    tile, warps = sm90.rope_tile(tokens)
    if tokens:
        launcher.launch(
            rope_kernel,
            (triton.cdiv(tokens, tile), n_q + 2 * n_kv),
            qkv,
            cos_sin,
            positions,
            slots,
            k_pages,
            v_pages,
            q_norm,
            k_norm,
            q,
            tokens,
            eps,
            N_Q=n_q,
            N_KV=n_kv,
            BLOCK_SIZE=block_size,
            DIM=dim,
            HALF=triton.next_power_of_2(dim // 2),
            TOKENS=tile,
            PDL=PDL,
            num_warps=warps,
            launch_pdl=PDL,
        )
    return q


@triton.jit(do_not_specialize=["tokens"])
def rope_kernel(
    qkv,
    cos_sin,
    positions,
    slots,
    k_pages,
    v_pages,
    q_norm,
    k_norm,
    q,
    tokens,
    eps,
    N_Q: tl.constexpr,
    N_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # DIM / 2, rounded up to a power of two
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    column = tl.arange(0, HALF)[None, :]
    real = token < tokens
    inside = real[:, None] & (column < DIM // 2)
    position = tl.load(positions + token, mask=real, other=0).to(tl.int64)
    table = cos_sin + position[:, None] * DIM + column
    cos = tl.load(table, mask=inside, other=0.0)
    sin = tl.load(table + DIM // 2, mask=inside, other=0.0)
    slot = tl.load(slots + token, mask=real, other=-1)

    wait(PDL)
    launch_dependents(PDL)
    source = qkv + (token * (N_Q + 2 * N_KV) + head)[:, None] * DIM + column
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if head < N_Q:
        if q_norm is not None:
            a, b = _normed(a, b, q_norm, column, eps, DIM)
        target = q + (token * N_Q + head)[:, None] * DIM + column
        _store(target, a * cos - b * sin, b * cos + a * sin, inside, DIM)
    else:
        inside &= (slot >= 0)[:, None]
        in_page = (slot // BLOCK_SIZE * N_KV * BLOCK_SIZE + slot % BLOCK_SIZE)[:, None] * DIM + column
        if head < N_Q + N_KV:
            if k_norm is not None:
                a, b = _normed(a, b, k_norm, column, eps, DIM)
            target = k_pages + in_page + (head - N_Q) * BLOCK_SIZE * DIM
            _store(target, a * cos - b * sin, b * cos + a * sin, inside, DIM)
        else:
            _store(v_pages + in_page + (head - N_Q - N_KV) * BLOCK_SIZE * DIM, a, b, inside, DIM)


@triton.jit
def _normed(a, b, weight, column, eps, DIM: tl.constexpr):
    scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)
    inside = column < DIM // 2
    a *= scale[:, None] * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b *= scale[:, None] * tl.load(weight + DIM // 2 + column, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(target, a, b, inside, DIM: tl.constexpr):
    tl.store(target, a.to(target.dtype.element_ty), mask=inside)
    tl.store(target + DIM // 2, b.to(target.dtype.element_ty), mask=inside)

"""RMS norm with an optional residual add: y = x / sqrt(mean(x^2) + eps) * weight, per token.

With `residual`, residual += x first (rounded to its dtype) and the norm is taken of the sum, so that a
decoder layer needs one kernel where it would need two. fp32 arithmetic on bf16, fp16 or fp32 tensors.

Bytes: x and y once, residual twice: 4 T H elements with residual, 2 T H without. Limit: memory bandwidth; for
the few tokens of a decode, the launch.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.tuned import sm90


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, H], weight [H], residual [T, H] (updated in place) -> y [T, H] in x's dtype."""
    return (launch if x.is_cuda else reference)(x, weight, eps, residual)


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`rms_norm` in PyTorch; x may have any leading dimensions."""
    if residual is not None:
        residual += x
        x = residual
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def launch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`rms_norm` in Triton: one program a token, the row in registers. x and residual are contiguous."""
    y = torch.empty_like(x)
    tokens, hidden = x.shape
    if tokens:
        block = triton.next_power_of_2(hidden)
        norm_kernel[(tokens,)](x, weight, residual, y, eps, hidden, block, num_warps=sm90.norm_warps(block))
    return y


@triton.jit
def norm_kernel(x, weight, residual, y, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    row = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        row += tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
        rounded = row.to(residual.dtype.element_ty)
        tl.store(residual + start + column, rounded, mask=inside)
        row = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, 0) / HIDDEN + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + column, (row * scale * gain).to(y.dtype.element_ty), mask=inside)

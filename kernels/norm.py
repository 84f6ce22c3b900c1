"""RMS norm: y = x / sqrt(mean(x^2) + eps) * gain, per token.

fp32 arithmetic on bf16, fp16 or fp32 tensors. A GPU needs it on its own for more tokens than the decode GEMM
takes, which norms its input itself.

Bytes: x and y once: 2 T H elements. Limit: memory bandwidth; for few tokens, the launch.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import launcher
from kernels.pdl import PDL, launch_dependents, wait
from kernels.tuned import sm90


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [T, H], gain [H] (None = 1) -> y [T, H] in x's dtype."""
    return (launch if x.is_cuda else reference)(x, gain, eps)


def reference(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`rms_norm` in PyTorch; x may have any leading dimensions."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if gain is None else y * gain.float()).to(x.dtype)


def launch(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`rms_norm` in Triton: one program a token, the row in registers. x is contiguous."""
    y = torch.empty_like(x)
    tokens, hidden = x.shape
    if tokens:
        block = triton.next_power_of_2(hidden)
        warps = sm90.norm_warps(block)
        launcher.launch(
            norm_kernel,
            (tokens,),
            x,
            gain,
            y,
            eps,
            HIDDEN=hidden,
            BLOCK=block,
            PDL=PDL,
            num_warps=warps,
            launch_pdl=PDL,
        )
    return y


@triton.jit
def norm_kernel(x, gain, y, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    if gain is not None:
        factor = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    launch_dependents(PDL)
    row = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    row *= 1.0 / tl.sqrt(tl.sum(row * row, 0) / HIDDEN + eps)
    if gain is not None:
        row *= factor
    tl.store(y + start + column, row.to(y.dtype.element_ty), mask=inside)

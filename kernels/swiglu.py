"""SwiGLU: silu(gate) * up, where gate and up lie side by side in one row.

fp32 arithmetic on bf16, fp16 or fp32 tensors. A GPU needs it on its own for more tokens than the decode GEMM
takes, which has it as its epilogue.

Bytes: 2 T F elements read, T F written. Limit: memory bandwidth.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import launcher
from kernels.pdl import PDL, launch_dependents, wait
from kernels.tuned import sm90


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2F] (gate first) -> silu(gate) * up [T, F] in its dtype."""
    return (launch if gate_up.is_cuda else reference)(gate_up)


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def launch(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in Triton: one program for each token and block of columns. gate_up is contiguous."""
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, columns)
    if tokens:
        block = sm90.SWIGLU_COLUMNS
        grid = (tokens, triton.cdiv(columns, block))
        launcher.launch(
            swiglu_kernel,
            grid,
            gate_up,
            out,
            COLUMNS=columns,
            BLOCK=block,
            PDL=PDL,
            num_warps=4,
            launch_pdl=PDL,
        )
    return out


@triton.jit
def swiglu_kernel(gate_up, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait(PDL)
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    row = gate_up + token * 2 * COLUMNS + column
    gate = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + COLUMNS, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + token * COLUMNS + column, result.to(out.dtype.element_ty), mask=inside)

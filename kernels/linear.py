"""Linear layer with what surrounds it in a decoder: y = f(n(x) W^T + b).

n is an RMS norm or nothing; f is SwiGLU, the addition to the residual stream, or nothing. On CUDA one kernel
does it all while the tokens are few (`decode_gemm`; `kernels/tuned/gemm_sm90.py` says up to where); beyond,
cuBLAS has the product and the addition, and norm and SwiGLU are kernels before and after it.

Limit: the bytes of W over the memory bandwidth for few tokens, the tensor cores for many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import decode_gemm
from kernels.norm import rms_norm
from kernels.swiglu import swiglu as silu_times
from kernels.tuned.gemm_sm90 import gemm_tile


@dataclass(frozen=True)
class Norm:
    """RMS norm of a layer's input."""

    eps: float
    gain: torch.Tensor | None  # [K]; None = folded into the weight


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    swiglu: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype. All tensors are contiguous.

    `norm` is applied to x first. With `swiglu`, W is [2F, K], gate rows first, and the result silu(gate) * up
    [T, F]. The result is added to `add_to` [T, N] (another tensor than x), in place, if that is given; then
    that is returned.
    """
    on_tensor_cores = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    run = launch if on_tensor_cores else reference
    return run(x, weight, bias, norm=norm, swiglu=swiglu, add_to=add_to)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    swiglu: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` with PyTorch's product; on CUDA, what `launch` does for many tokens."""
    if norm is not None:
        x = rms_norm(x, norm.gain, norm.eps)
    if add_to is not None and bias is None and not swiglu:
        return add_to.addmm_(x, weight.t())
    y = F.linear(x, weight, bias)
    if swiglu:
        y = silu_times(y)
    return y if add_to is None else add_to.add_(y)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    swiglu: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` on a GPU, bf16 or fp16."""
    tile = gemm_tile(weight.shape[0], weight.shape[1], len(x))
    if tile is None:
        return reference(x, weight, bias, norm=norm, swiglu=swiglu, add_to=add_to)
    if norm is not None and (norm.gain is not None or tile.norm_first):
        x, norm = rms_norm(x, norm.gain, norm.eps), None
    eps = None if norm is None else norm.eps
    return decode_gemm.launch(x, weight, bias, tile, norm_eps=eps, swiglu=swiglu, add_to=add_to)

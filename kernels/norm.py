"""RMS norm with an optional residual add: y = x / sqrt(mean(x^2) + eps) * weight, per token.

With `residual`, residual += x first (rounded to its dtype) and the norm is taken of the sum, so that a
decoder layer needs one kernel where it would need two. Arithmetic in fp32, whatever the dtype.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, H], weight [H], residual [T, H] (updated in place) -> y [T, H] in x's dtype."""
    return reference(x, weight, eps, residual)


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    if residual is not None:
        residual += x
        x = residual
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)

"""Linear layer y = x W^T + b.

cuBLAS and oneDNN through torch; the place of the decode GEMM (few tokens, weights streamed once) and of its
quantised twins. Limit: with T tokens small, the bytes of W over the memory bandwidth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype."""
    return F.linear(x, weight, bias)

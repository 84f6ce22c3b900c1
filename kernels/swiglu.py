"""SwiGLU: silu(gate) * up, where gate and up lie side by side in one row.

Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2F] (gate first) -> silu(gate) * up [T, F] in its dtype; arithmetic in fp32."""
    return reference(gate_up)


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)

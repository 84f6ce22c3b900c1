"""The paged KV cache: one tensor for the whole model, a page per block.

Layout version 1: `[layer, K|V, page, kv_head, token, head_dim]`. Within a layer one (page, head) is
contiguous, the box an attention tile loads; across layers a page is read and written as one block
`[layer, 2, kv_head, token, head_dim]` (see `block_copies`).
"""

from __future__ import annotations

import torch

from services.worker.models.spec import ModelSpec

#: Part of every fingerprint: raise it whenever the bytes of a block mean something else.
KV_LAYOUT_VERSION = 1


def page_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return spec.layers * 2 * spec.kv_heads * block_size * spec.head_dim * dtype.itemsize


class KVCache:
    """Storage of `pages` blocks of `block_size` tokens. Who holds which page is the engine's business."""

    def __init__(
        self, spec: ModelSpec, pages: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        # Zeros, not garbage: attention multiplies what its mask hides by 0, and 0 * NaN is NaN.
        self.storage = torch.zeros(
            (spec.layers, 2, pages, spec.kv_heads, block_size, spec.head_dim), dtype=dtype, device=device
        )
        self.pages = pages
        self.block_size = block_size
        self.bytes_per_page = page_bytes(spec, block_size, dtype)

    def k(self, layer: int) -> torch.Tensor:
        """Keys of one layer, a view [page, kv_head, token, head_dim]."""
        return self.storage[layer, 0]

    def v(self, layer: int) -> torch.Tensor:
        """Values of one layer, a view [page, kv_head, token, head_dim]."""
        return self.storage[layer, 1]

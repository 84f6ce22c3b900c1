"""The paged KV cache: one tensor for the whole model, a page per block.

Layout version 1: `[layer, K|V, page, kv_head, token, head_dim]`. Within a layer one (page, head) is
contiguous, the box an attention tile loads; across layers a page is read and written as one block
`[layer, 2, kv_head, token, head_dim]`, the form in which blocks travel to the other tiers.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    def read_page(self, page: int) -> torch.Tensor:
        """The block in `page`: a contiguous copy on the host, [layer, 2, kv_head, token, head_dim]."""
        return self.storage[:, :, page].to("cpu", copy=True, memory_format=torch.contiguous_format)

    def write_pages(self, pages: Sequence[int], blocks: Sequence[torch.Tensor]) -> None:
        """Put `blocks[i]`, as `read_page` gives them, into `pages[i]`.

        Raises ValueError, with nothing written, if a block has another shape or dtype than the cache's.
        """
        shape = self.storage[:, :, 0].shape
        for block in blocks:
            if block.shape != shape or block.dtype != self.storage.dtype:
                raise ValueError(
                    f"block must be {self.storage.dtype} {list(shape)}, got {block.dtype} {list(block.shape)}"
                )
        for page, block in zip(pages, blocks, strict=True):
            self.storage[:, :, page].copy_(block, non_blocking=True)

"""The decoder, one definition for all families: only kernels and matrices, no text, no files."""

from __future__ import annotations

import torch

from kernels.attention import paged_attention
from kernels.linear import linear
from kernels.norm import rms_norm
from kernels.rope import rope_kv_write
from kernels.swiglu import swiglu
from services.worker.batch import Batch
from services.worker.kv import KVCache
from services.worker.models.spec import ModelSpec
from services.worker.models.weights import LayerWeights, Weights


class Decoder:
    """Pre-norm transformer over paged KV.

    The residual stream lives in one tensor that every norm updates in place (`rms_norm` adds its input to
    it), so a layer is two norms, four matrices, and one kernel each for rope + KV write, attention, SwiGLU.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, device: torch.device | str, max_model_len: int | None = None
    ) -> None:
        """`max_model_len` bounds the positions in tokens (the model's own limit by default)."""
        self.spec = spec
        self.weights = weights
        self.device = torch.device(device)
        self.dtype = weights.embedding.dtype
        self.cos_sin = spec.rope.table(max_model_len or spec.max_position, device)

    def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """Run one step: write the K and V of every token of `batch` into `kv`, attend, and return the
        logits [L, vocab] fp32 of the tokens `batch.logit_rows`."""
        spec, weights = self.spec, self.weights
        x = weights.embedding[batch.token_ids]
        residual = torch.zeros_like(x)
        for i, layer in enumerate(weights.layers):
            x = rms_norm(x, layer.attn_norm, spec.norm_eps, residual)
            x = self._attention(i, layer, x, batch, kv)
            x = rms_norm(x, layer.mlp_norm, spec.norm_eps, residual)
            x = linear(swiglu(linear(x, layer.gate_up)), layer.down)
        x = rms_norm(x[batch.logit_rows], weights.norm, spec.norm_eps, residual[batch.logit_rows])
        return linear(x, weights.head).float()

    def _attention(
        self, index: int, layer: LayerWeights, x: torch.Tensor, batch: Batch, kv: KVCache
    ) -> torch.Tensor:
        k_pages, v_pages = kv.k(index), kv.v(index)
        q = rope_kv_write(
            linear(x, layer.qkv, layer.qkv_bias),
            self.cos_sin,
            batch.positions,
            batch.slots,
            k_pages,
            v_pages,
            eps=self.spec.norm_eps,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
        out = paged_attention(
            q,
            k_pages,
            v_pages,
            batch.block_tables,
            batch.query_start,
            batch.context_len,
            scale=self.spec.head_dim**-0.5,
            max_query=batch.max_query,
            window=self.spec.windows[index],
        )
        return linear(out.flatten(1), layer.o, layer.o_bias)

"""The decoder, one definition for all families: only kernels and matrices, no text, no files."""

from __future__ import annotations

import torch

from kernels.attention import AttentionPlan, paged_attention, plan
from kernels.linear import Norm, linear
from kernels.rope import rope_kv_write
from kernels.step_inputs import step_inputs
from services.worker.batch import Batch
from services.worker.kv import KVCache
from services.worker.models.spec import ModelSpec
from services.worker.models.weights import LayerWeights, Weights, fold_norms

#: Tokens from one size of products to the next.
_PRODUCT_STEP = 128


class Decoder:
    """Pre-norm transformer over paged KV.

    The residual stream lives in one tensor that the output projections add to; norms and SwiGLU belong to
    the projections around them. So a layer is four linears, rope + KV write, and attention: six launches on
    a GPU.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, device: torch.device | str, max_model_len: int | None = None
    ) -> None:
        """`max_model_len` bounds the positions in tokens (the model's own limit by default). The weights
        become the decoder's own: for a GPU they are changed in place."""
        self.spec = spec
        self.device = torch.device(device)
        self.weights = fold_norms(weights) if self.device.type == "cuda" else weights
        self.dtype = weights.embedding.dtype
        self.cos_sin = spec.rope.table(max_model_len or spec.max_position, device)

    def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """Run one step: write the K and V of every token of `batch` into `kv`, attend, and return the
        logits [L, vocab] of the tokens `batch.logit_rows`, in the dtype of the weights."""
        spec, weights, attention = self.spec, self.weights, batch.attention
        plans = {window: plan(attention, window=window) for window in set(spec.windows)}
        x, kv_slots = step_inputs(
            batch.slots,
            batch.positions,
            batch.write_from,
            batch.tokens,
            attention.block_tables,
            weights.embedding,
            block_size=kv.block_size,
        )
        for i, layer in enumerate(weights.layers):
            attended = self._attend(i, layer, x, kv_slots, batch, plans[spec.windows[i]], kv)
            linear(attended, layer.o, layer.o_bias, add_to=x)
            hidden = linear(x, layer.gate_up, norm=Norm(spec.norm_eps, layer.mlp_norm), swiglu=True)
            linear(hidden, layer.down, add_to=x)
        if batch.logit_rows is not None:
            x = x.index_select(0, batch.logit_rows)
        return linear(x, weights.head, norm=Norm(spec.norm_eps, weights.norm))

    def load_products(self, most: int) -> None:
        """Multiply one layer's matrices by up to `most` tokens. cuBLAS chooses a kernel by their number and
        loads it when it is first chosen, which takes milliseconds: better now than in a request."""
        layer = self.weights.layers[0]
        for tokens in range(_PRODUCT_STEP, most + 1, _PRODUCT_STEP):
            for matrix, added in (
                (layer.qkv, False),
                (layer.o, True),
                (layer.gate_up, False),
                (layer.down, True),
            ):
                x = matrix.new_zeros(tokens, matrix.shape[1])
                linear(x, matrix, add_to=matrix.new_zeros(tokens, matrix.shape[0]) if added else None)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        kv_slots: torch.Tensor,
        batch: Batch,
        plan: AttentionPlan,
        kv: KVCache,
    ) -> torch.Tensor:
        """What the heads of layer `index` give for every token: [T, heads * head_dim]."""
        k_pages, v_pages = kv.k(index), kv.v(index)
        q = rope_kv_write(
            linear(x, layer.qkv, layer.qkv_bias, norm=Norm(self.spec.norm_eps, layer.attn_norm)),
            self.cos_sin,
            batch.positions,
            kv_slots,
            k_pages,
            v_pages,
            eps=self.spec.norm_eps,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )
        return paged_attention(q, k_pages, v_pages, plan, scale=self.spec.head_dim**-0.5).flatten(1)

"""The decoder's weights: projections that read the same input are one matrix each (qkv, gate_up)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from services.worker.models.spec import ModelSpec


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. H hidden size, D head_dim, F ffn size; matrices are [out, in]."""

    attn_norm: torch.Tensor | None  # [H]; None = folded into qkv
    qkv: torch.Tensor  # [(heads + 2 kv_heads) * D, H], rows in the order q | k | v
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None
    o: torch.Tensor  # [H, heads * D]
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor | None  # [H]; None = folded into gate_up
    gate_up: torch.Tensor  # [2 F, H], gate first
    down: torch.Tensor  # [H, F]


@dataclass(frozen=True)
class Weights:
    """The whole model. `head` is `embedding` itself when tied."""

    embedding: torch.Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor | None  # [H]; None = folded into head
    head: torch.Tensor  # [V, H]


def allocate(spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Uninitialised weights; on device "meta" only their shapes."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def layer() -> LayerWeights:
        qkv_size = spec.q_size + 2 * spec.kv_size
        return LayerWeights(
            attn_norm=new(spec.hidden_size),
            qkv=new(qkv_size, spec.hidden_size),
            qkv_bias=new(qkv_size) if spec.qkv_bias else None,
            q_norm=new(spec.head_dim) if spec.qk_norm else None,
            k_norm=new(spec.head_dim) if spec.qk_norm else None,
            o=new(spec.hidden_size, spec.q_size),
            o_bias=new(spec.hidden_size) if spec.o_bias else None,
            mlp_norm=new(spec.hidden_size),
            gate_up=new(2 * spec.ffn_size, spec.hidden_size),
            down=new(spec.hidden_size, spec.ffn_size),
        )

    embedding = new(spec.vocab_size, spec.hidden_size)
    return Weights(
        embedding=embedding,
        layers=tuple(layer() for _ in range(spec.layers)),
        norm=new(spec.hidden_size),
        head=embedding if spec.tied else new(spec.vocab_size, spec.hidden_size),
    )


def fold_norms(weights: Weights) -> Weights:
    """Multiply the gain of each norm into the columns of the matrix that reads it, in place.

    What is left of a norm is one factor a token, which the matrix product's epilogue applies; a rounding of
    each weight takes the place of one of each normed activation. A tied head keeps its norm: its matrix is
    the embedding too.
    """
    layers = []
    for layer in weights.layers:
        for matrix, gain in ((layer.qkv, layer.attn_norm), (layer.gate_up, layer.mlp_norm)):
            if gain is not None:
                matrix.mul_(gain)
        layers.append(replace(layer, attn_norm=None, mlp_norm=None))
    norm = weights.norm
    if norm is not None and weights.head is not weights.embedding:
        weights.head.mul_(norm)
        norm = None
    return replace(weights, layers=tuple(layers), norm=norm)


def named_parts(spec: ModelSpec, weights: Weights) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face checkpoint of this model -> the view of `weights` that it fills."""
    parts: dict[str, torch.Tensor | None] = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.norm,
        "lm_head.weight": None if spec.tied else weights.head,
    }
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}."
        q, k, v = layer.qkv.split([spec.q_size, spec.kv_size, spec.kv_size])
        gate, up = layer.gate_up.chunk(2)
        parts |= {
            f"{prefix}input_layernorm.weight": layer.attn_norm,
            f"{prefix}self_attn.q_proj.weight": q,
            f"{prefix}self_attn.k_proj.weight": k,
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}self_attn.q_norm.weight": layer.q_norm,
            f"{prefix}self_attn.k_norm.weight": layer.k_norm,
            f"{prefix}self_attn.o_proj.weight": layer.o,
            f"{prefix}self_attn.o_proj.bias": layer.o_bias,
            f"{prefix}post_attention_layernorm.weight": layer.mlp_norm,
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": layer.down,
        }
        if layer.qkv_bias is not None:
            biases = layer.qkv_bias.split([spec.q_size, spec.kv_size, spec.kv_size])
            for name, bias in zip("qkv", biases, strict=True):
                parts[f"{prefix}self_attn.{name}_proj.bias"] = bias
    return {name: part for name, part in parts.items() if part is not None}

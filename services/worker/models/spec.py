"""What the decoder needs to know of a model, read from the checkpoint's own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.worker.models.config import Config, ModelError
from services.worker.models.families import FAMILIES
from services.worker.models.rope import Rope, rope_from_config

#: Far above any model; what is beyond is a damaged config.
MAX_LAYERS = 1024
MAX_HEAD_DIM = 1024


@dataclass(frozen=True)
class ModelSpec:
    """One decoder-only transformer: RMS norm, rotary grouped-query attention, SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    max_position: int  # longest context, in tokens
    windows: tuple[int, ...]  # per layer: sliding window in tokens, 0 = full attention
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tied: bool  # the output head is the embedding

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @classmethod
    def from_config(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """Read a Hugging Face style config. Raises ModelError naming what is missing or not supported."""
        config = Config(fields)
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        _refuse_unsupported(config)
        layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
        heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
        kv_heads = config.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(
                f"config.num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
            )
        head_dim = config.integer("head_dim", family.head_dim or hidden_size // heads, maximum=MAX_HEAD_DIM)
        if head_dim % 2:
            raise ModelError(f"config.head_dim must be even, got {head_dim}")
        rope = rope_from_config(config, head_dim)
        option_bias = family.bias_option and config.flag("attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            ffn_size=config.integer("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=rope,
            max_position=max(config.integer("max_position_embeddings"), rope.max_position),
            windows=family.windows(config, layers),
            qkv_bias=family.qkv_bias or option_bias,
            o_bias=option_bias,
            qk_norm=family.qk_norm,
            tied=config.flag("tie_word_embeddings"),
        )


def _architecture(config: Config) -> str:
    named = config.get("architectures") or []
    if len(named) != 1 or named[0] not in FAMILIES:
        raise ModelError(
            f"architecture {', '.join(map(str, named)) or '(none)'} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return str(named[0])


def _refuse_unsupported(config: Config) -> None:
    if config.get("quantization_config"):
        method = config.section("quantization_config").get("quant_method")
        raise ModelError(f"config.quantization_config: quant_method {method!r} is not supported")
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise ModelError(f"config.hidden_act must be 'silu', got {config.get('hidden_act')!r}")
    if config.flag("mlp_bias"):
        raise ModelError("config.mlp_bias: true is not supported")
